"""Runs each part in its own process, so that one that fails or hangs does not stop the others."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu.machine import ROOT, missing
from tests.gpu.parts import Part

MARK = "MEGAMEM_GPU_MARK"
"""Environment variable that all processes of a part inherit, in any session."""

# with less time left, a part is not started
LEAST_SECONDS = 5.0


@dataclass
class Outcome:
    """How a part ended."""

    part: Part
    verdict: str
    """passed, failed, skipped, or the reason why there is no result."""

    seconds: float = 0.0
    content: dict[str, Any] = field(default_factory=dict)
    """The content of the part's JSON file."""

    @property
    def failed(self) -> bool:
        """Whether it neither passed nor was skipped."""
        return self.verdict not in ("passed", "skipped")

    @property
    def summary(self) -> str:
        """The main numbers in one line; "" if there are none."""
        return self.content.get("summary", "")


@dataclass(frozen=True)
class Runner:
    """The folder and the time limits of parts."""

    work: Path
    """Folder for JSON files and logs."""

    scale: int
    deadline: float
    """When all parts must have ended, on the monotonic clock."""

    patience: float = 1.0
    """The time limit of every part is multiplied by this, as a CPU needs longer."""

    dry_run: bool = False
    """Whether parts run on a CPU, and then one after the other. On a GPU, parts that measure no
    times run at the same time."""

    environment: dict[str, str] = field(default_factory=dict)

    def run(self, parts: list[Part]) -> Iterator[Outcome]:
        """Run the parts; yield the outcome of each when it has ended."""
        for batch in self._batches(parts):
            yield from self._run_batch(batch)

    def _batches(self, parts: list[Part]) -> Iterator[list[Part]]:
        batch: list[Part] = []
        for part in parts:
            if batch and (self.dry_run or not (part.beside and batch[-1].beside)):
                yield batch
                batch = []
            batch.append(part)
        if batch:
            yield batch

    def _run_batch(self, batch: list[Part]) -> Iterator[Outcome]:
        running: list[_Running] = []
        try:
            for part in batch:
                left = self.deadline - time.monotonic()
                (self.work / f"{part.name}.json").unlink(missing_ok=True)
                if lacking := missing(part.needs):
                    yield Outcome(part, f"not run: needs {', '.join(lacking)}")
                elif left < LEAST_SECONDS:
                    yield Outcome(part, "not started: the time limit was reached")
                else:
                    limit = min(part.limit * self.patience, left)
                    running.append(_Running.start(part, limit, self))
            while running:
                for one in list(running):
                    if (outcome := one.poll()) is not None:
                        running.remove(one)
                        yield outcome
                time.sleep(0.05)
        except KeyboardInterrupt:
            # their results so far are kept
            while running:
                yield running.pop(0).ended("interrupted")
            raise
        finally:
            for one in running:
                end_marked(MARK, one.mark)


@dataclass
class _Running:
    part: Part
    process: subprocess.Popen
    mark: str
    started: float
    limit: float
    result: Path

    @classmethod
    def start(cls, part: Part, limit: float, runner: Runner) -> "_Running":
        mark = uuid.uuid4().hex
        runner.work.mkdir(parents=True, exist_ok=True)
        where = ("--out", str(runner.work), "--scale", str(runner.scale))
        with (runner.work / f"{part.name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", part.where, *where],
                cwd=ROOT,
                env={**os.environ, **runner.environment, MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        result = runner.work / f"{part.name}.json"
        return cls(part, process, mark, time.monotonic(), limit, result)

    def poll(self) -> Outcome | None:
        """The outcome if the part has ended or has reached its time limit; else None."""
        seconds, status = time.monotonic() - self.started, self.process.poll()
        if status is None and seconds < self.limit:
            return None
        if status is None:
            return self.ended(f"stopped after {seconds:.0f} s")
        content = self.ended("").content
        if content.get("skipped") and status == 0:
            verdict = "skipped"
        elif content.get("ok") and status == 0:
            verdict = "passed"
        else:
            verdict = "failed"
        if verdict == "failed" and not (content.get("rows") or status == 1):
            verdict = f"failed: ended with status {status}"
        return Outcome(self.part, verdict, seconds, content)

    def ended(self, verdict: str) -> Outcome:
        """Kill all processes of the part; return its outcome."""
        end_marked(MARK, self.mark)
        self.process.wait()
        return Outcome(self.part, verdict, time.monotonic() - self.started, self._read())

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self.result.read_text())
        except (OSError, ValueError):
            return {}


def end_marked(variable: str, mark: str) -> None:
    """Kill all processes with this mark in their environment, and wait until they have ended."""
    wanted = f"{variable}={mark}".encode()
    # repeated, as processes may fork meanwhile
    for _ in range(100):
        found = [pid for pid in _processes() if wanted in _environment(pid)]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _processes() -> Iterable[int]:
    me = os.getpid()
    pids = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    return [pid for pid in pids if pid != me and _is_alive(pid)]


def _is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
