"""Trains and probes what a plan asks for, some at a time, and keeps a record of what is finished.

    OUT/runs/KEY/train.log, checkpoints/, probe.log   while it is at work
    OUT/runs/KEY/record.json                          when it is finished: never run again

Every training is `python -m megamem.run ... examples/pretrain_gpt.py FLAGS` with --save and --load
on one folder, so whatever ended it, the same command goes on from its last checkpoint.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from experiment import logs
from experiment.plan import Run, words
from experiment.records import make_record

ROOT = Path(__file__).parents[3]
TRAIN, PROBE = ROOT / "examples" / "pretrain_gpt.py", ROOT / "examples" / "facts" / "probe.py"
POLL_SECONDS = 0.25
# a run that is asked to stop saves a checkpoint first
SECONDS_TO_STOP = 180.0
TAIL_BYTES, TAIL_LINES = 8000, 25


class RunFailed(Exception):
    """A training or a probe ended with an error; the message shows the end of its log."""


@dataclass
class Job:
    """A run at work: its training, then one probe after the other.

    Attributes:
        bar: its line among the progress shown.
        steps: what is still to be launched, the step at work first: name of its log, command.
        peak: most bytes that its training was seen to hold.
        shown: iteration and loss logged last.
    """

    run: Run
    folder: Path
    bar: TaskID
    steps: list[tuple[str, list[str]]]
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    peak: int = 0
    shown: tuple[int, float] | None = None


class Runner:
    """Executes runs.

    Args:
        output: folder of the experiment; corpora and runs lie in it.
        device: cpu or gpu.
        jobs: runs at a time.
        deadline: of time.monotonic(); what is at work then saves and stops.
    """

    def __init__(
        self, output: Path, device: str, jobs: int, deadline: float, console: Console
    ) -> None:
        self.output, self.device, self.jobs = output, device, jobs
        self.deadline, self.console = deadline, console

    def folder(self, key: str) -> Path:
        return self.output / "runs" / key

    def record(self, run: Run) -> dict[str, Any] | None:
        """Of a finished run."""
        path = self.folder(run.key) / "record.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def execute(self, title: str, runs: Sequence[Run]) -> bool:
        """Finish every run, each once; return False where time ran out before.

        Raises:
            RunFailed: one ended with an error; the others were stopped and can go on.
        """
        waiting = [run for run in runs if self.record(run) is None]
        done = len(runs) - len(waiting)
        if done:
            self.console.print(f"{title}: {done} of {len(runs)} runs are finished already")
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"),
        )
        live: list[Job] = []
        with Progress(*columns, console=self.console) as progress:
            overall = progress.add_task(title, total=len(runs), completed=done, said="")
            try:
                while waiting or live:
                    if time.monotonic() > self.deadline:
                        return False
                    # what starts from another run's checkpoint waits for it
                    for run in [r for r in waiting if self._ready(r)][: self.jobs - len(live)]:
                        waiting.remove(run)
                        live.append(self._start(run, progress))
                    for job in list(live):
                        if self._poll(job, progress):
                            live.remove(job)
                            done += 1
                    parts = sum((j.shown or (0, 0.0))[0] / j.run.iterations for j in live)
                    progress.update(overall, completed=round(done + 0.9 * parts, 2))
                    time.sleep(POLL_SECONDS)
                progress.update(overall, completed=done)
            finally:
                self._stop(live)
        return True

    def _ready(self, run: Run) -> bool:
        return not run.start or (self.folder(run.start) / "record.json").is_file()

    def _start(self, run: Run, progress: Progress) -> Job:
        folder = self.folder(run.key)
        folder.mkdir(parents=True, exist_ok=True)
        _end_leftover(folder)
        (folder / "flags.json").write_text(json.dumps(run.flags, indent=1) + "\n")
        steps = [] if self._is_trained(run) else [("train", self._train_command(run))]
        steps += [
            (f"probe-{name}", self._probe_command(run, name))
            for name in probed_corpora(run)
            if not (folder / f"probe-{name}.json").is_file()
        ]
        bar = progress.add_task(f"  {run.name}", total=run.iterations, said="starting")
        return Job(run, folder, bar, steps)

    def _poll(self, job: Job, progress: Progress) -> bool:
        """Look after a job; return whether it is finished."""
        if job.process is not None:
            code = job.process.poll()
            self._watch(job, progress)
            if code is None:
                return False
            self._ended(job, code)
        if job.steps:
            self._launch(job, progress)
            return False
        record = make_record(job.run, job.folder, self.output, self.device)
        part = job.folder / "record.json.part"
        part.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(part, job.folder / "record.json")
        self._clean(job)
        progress.remove_task(job.bar)
        if not self.console.is_terminal:
            loss = f", last loss {job.shown[1]:.3f}" if job.shown else ""
            self.console.print(f"finished {job.run.name}{loss}", highlight=False)
        return True

    def _launch(self, job: Job, progress: Progress) -> None:
        name, command = job.steps[0]
        job.log = (job.folder / f"{name}.log").open("ab")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.device == "cpu":
            environment["OMP_NUM_THREADS"] = "1"
        # in a session of its own: Ctrl-C reaches this process alone, which asks it to save
        job.process = subprocess.Popen(
            command,
            stdout=job.log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        (job.folder / "pid").write_text(str(job.process.pid))
        progress.update(job.bar, said="starting" if name == "train" else "asking")

    def _watch(self, job: Job, progress: Progress) -> None:
        name = job.steps[0][0]
        if name != "train" or job.process is None:
            return
        with contextlib.suppress(psutil.Error):
            job.peak = max(job.peak, psutil.Process(job.process.pid).memory_info().rss)
        if shown := logs.last_iteration(_tail(job.folder / "train.log")):
            job.shown = shown
            progress.update(job.bar, completed=shown[0], said=f"loss {shown[1]:.3f}")

    def _ended(self, job: Job, code: int) -> None:
        name, _ = job.steps.pop(0)
        assert job.log is not None
        job.log.close()
        job.process = job.log = None
        log = job.folder / f"{name}.log"
        if name == "train" and code == 0:
            (job.folder / "peak.json").write_text(json.dumps({"rss": job.peak}) + "\n")
        if code != 0 or (name == "train" and not self._is_trained(job.run)):
            why = f"ended with {code}" if code else "ended before its last iteration"
            end = "\n".join(_tail(log).splitlines()[-TAIL_LINES:])
            raise RunFailed(f"{job.run.name} {why}; the end of {log}:\n{end}")

    def _stop(self, live: Sequence[Job]) -> None:
        """Ask what is at work to save and leave; what does not in time is killed."""
        processes = [job.process for job in live if job.process is not None]
        for process in processes:
            process.send_signal(signal.SIGTERM)
        if processes:
            self.console.print(f"stopping {len(processes)} runs; they save first")
        deadline = time.monotonic() + SECONDS_TO_STOP
        try:
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(deadline - time.monotonic(), 0.1))
        finally:
            # also at a second Ctrl-C
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        for job in live:
            if job.log is not None:
                job.log.close()

    def _is_trained(self, run: Run) -> bool:
        saved = self.folder(run.key) / "checkpoints" / "latest_checkpointed_iteration.txt"
        return saved.is_file() and saved.read_text().strip() == str(run.iterations)

    def _clean(self, job: Job) -> None:
        """Checkpoints that nothing starts from are large, and asked already."""
        shutil.rmtree(job.folder / "cache", ignore_errors=True)
        last = f"iter_{job.run.iterations:07d}"
        for folder in (job.folder / "checkpoints").glob("iter_*"):
            if not (job.run.keep and folder.name == last):
                shutil.rmtree(folder)

    def _command(self, script: Path, run: Run) -> list[str]:
        launcher = [sys.executable, "-m", "megamem.run"]
        launcher += ["--cpu=force"] if self.device == "cpu" else []
        corpus = self.output / run.corpus
        data = {
            "train_data_path": corpus / "facts_train",
            "valid_data_path": corpus / "facts_valid",
            "tokenizer_type": "SentencePieceTokenizer",
            "tokenizer_model": self.output / "corpus" / "tokenizer.model",
            # of its own: two runs that write one cache at a time could read half of it
            "data_cache_path": self.folder(run.key) / "cache",
            "num_workers": 0,
            "load": self.folder(run.key) / "checkpoints",
        }
        files = words({name: str(value) for name, value in data.items()})
        return [*launcher, str(script), *words(run.flags), *files]

    def _train_command(self, run: Run) -> list[str]:
        saves = ["--save", str(self.folder(run.key) / "checkpoints"), "--exit-signal-handler"]
        if run.start:
            saves += ["--pretrained-checkpoint", str(self.folder(run.start) / "checkpoints")]
        return [*self._command(TRAIN, run), *saves]

    def _probe_command(self, run: Run, corpus: str) -> list[str]:
        asked = ["--facts", str(self.output / corpus / "facts.json"), "--phrasing", "both-at-last"]
        asked += ["--probe-output", str(self.folder(run.key) / f"probe-{corpus}.json")]
        asked += ["--probe-iterations", *map(str, run.points)]
        return [*self._command(PROBE, run), *asked]


def _end_leftover(folder: Path) -> None:
    """End what an experiment that was killed left at work on a run: two would share a folder."""
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int((folder / "pid").read_text()))
        # the number may long be another process's
        if any(folder.name in word for word in process.cmdline()):
            process.kill()
            process.wait(SECONDS_TO_STOP)


def probed_corpora(run: Run) -> list[str]:
    """What a run is asked: its own facts, and those that it knew before it learnt them."""
    return list(dict.fromkeys((run.corpus, "corpus")))


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
        return file.read().decode(errors="replace")
