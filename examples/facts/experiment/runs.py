"""Trains and probes what a plan asks for, some at a time, and keeps a record of what is finished.

    OUT/runs/KEY/train.log, tensorboard/, checkpoints/, probe-CORPUS.log    while it is at work
    OUT/runs/KEY/record.json                        when it is finished: never run again

Every training is `python -m megamem.run ... examples/pretrain_gpt.py FLAGS` with --save and --load
on one folder, so whatever ended it, the same command goes on from its last checkpoint.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from threading import Event
from typing import Any

import psutil
from rich.console import Console
from rich.progress import Progress, TextColumn

from experiment.plan import Run, words
from experiment.records import Events, make_record, probed_corpora

ROOT = Path(__file__).parents[3]
TRAIN, PROBE = ROOT / "examples" / "pretrain_gpt.py", ROOT / "examples" / "facts" / "probe.py"
POLL_SECONDS = 0.25
# a run that is asked to stop saves a checkpoint first
SECONDS_TO_STOP = 180.0
TAIL_LINES = 25


class RunFailed(Exception):
    """A training or a probe ended with an error; the message shows the end of its log."""


class Stopped(Exception):
    """A run was asked to stop before it was finished."""


@dataclass
class Runner:
    """Executes runs.

    Attributes:
        output: folder of the experiment; corpora and runs lie in it.
        device: cpu or gpu.
        jobs: runs at a time.
        deadline: of time.monotonic(); what is at work then saves and stops.
    """

    output: Path
    device: str
    jobs: int
    deadline: float
    console: Console
    stopping: Event = field(default_factory=Event)
    killing: Event = field(default_factory=Event)

    def folder(self, key: str) -> Path:
        return self.output / "runs" / key

    def records(self, runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
        """Key -> record, of those that are finished."""
        paths = {run.key: self.folder(run.key) / "record.json" for run in runs}
        return {key: json.loads(p.read_text()) for key, p in paths.items() if p.is_file()}

    def execute(self, title: str, runs: Sequence[Run]) -> bool:
        """Finish every run, each once; return False where time ran out before.

        Raises:
            RunFailed: one ended with an error; the others were stopped and can go on.
        """
        finished = self.records(runs)
        waiting = [run for run in runs if run.key not in finished]
        if finished:
            self.console.print(f"{title}: {len(finished)} of {len(runs)} runs are finished already")
        self.stopping.clear()
        pool = ThreadPoolExecutor(self.jobs)
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[said]}"))
        with Progress(*columns, console=self.console) as progress:
            bar = progress.add_task(title, total=len(runs), completed=len(finished), said="")
            try:
                # what starts from another run's checkpoint, which comes first, waits for it
                for _, wave in groupby(waiting, key=lambda run: bool(run.start)):
                    for future in as_completed(
                        [pool.submit(self._finish, run, progress) for run in wave]
                    ):
                        future.result()
                        progress.advance(bar)
            except Stopped:
                return False
            finally:
                # what is at work saves and leaves; a second Ctrl-C kills it
                self.stopping.set()
                try:
                    pool.shutdown(cancel_futures=True)
                except KeyboardInterrupt:
                    self.killing.set()
                    raise
        return True

    def command(self, run: Run, asked: str = "") -> list[str]:
        """What trains a run, from its last checkpoint on, or asks it for the facts of a corpus."""
        folder, checkpoints = self.folder(run.key), self.folder(run.key) / "checkpoints"
        files: dict[str, Any] = {
            "train_data_path": self.output / run.corpus / "facts_train",
            "valid_data_path": self.output / run.corpus / "facts_valid",
            "tokenizer_type": "SentencePieceTokenizer",
            "tokenizer_model": self.output / "corpus" / "tokenizer.model",
            # of its own: two runs that write one cache at a time could read half of it
            "data_cache_path": folder / "cache",
            "num_workers": 0,
            "load": checkpoints,
        }
        if asked:
            files |= {
                "facts": self.output / asked / "facts.json",
                "phrasing": "both-at-last",
                "probe_output": folder / f"probe-{asked}.json",
                "probe_iterations": run.points,
            }
        else:
            files |= {"save": checkpoints, "exit_signal_handler": True}
            if run.start:
                files["pretrained_checkpoint"] = self.folder(run.start) / "checkpoints"
            files |= {
                "tensorboard_dir": folder / "tensorboard",
                "tensorboard_log_interval": run.flags["log_interval"],
                "log_timers_to_tensorboard": True,
                "log_memory_to_tensorboard": self.device == "gpu",
                # how memories are used is no part of the record, and takes time
                "memory_metrics": "off",
            }
        launcher = [sys.executable, "-m", "megamem.run"]
        launcher += ["--cpu=force"] if self.device == "cpu" else []
        return [*launcher, str(PROBE if asked else TRAIN), *words(run.flags), *words(files)]

    def _finish(self, run: Run, progress: Progress) -> None:
        """Train and ask one run, as far as it is not done already; write its record."""
        folder = self.folder(run.key)
        events = Events(folder / "tensorboard")
        _end_leftover(folder)
        bar = progress.add_task(f"  {run.name}", total=run.iterations, said="starting")

        def show() -> None:
            if losses := events.read("lm loss"):
                iteration, loss = max(losses.items())
                progress.update(bar, completed=iteration, said=f"loss {loss:.3f}")

        if not self._is_trained(run):
            peak = self._launch(run, "train", self.command(run), show)
            (folder / "peak").write_text(str(peak))
        progress.update(bar, said="asking")
        for corpus in probed_corpora(run):
            if not (folder / f"probe-{corpus}.json").is_file():
                self._launch(run, f"probe-{corpus}", self.command(run, corpus))
        record = make_record(run, folder, self.output, self.device)
        part = folder / "record.json.part"
        part.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(part, folder / "record.json")
        # checkpoints that nothing starts from are large, and asked already
        shutil.rmtree(folder / "cache", ignore_errors=True)
        for checkpoint in (folder / "checkpoints").glob("iter_*"):
            if not (run.keep and checkpoint.name == f"iter_{run.iterations:07d}"):
                shutil.rmtree(checkpoint)
        progress.remove_task(bar)
        if not self.console.is_terminal:
            self.console.print(f"finished {run.name}, last loss {record['loss']:.3f}")

    def _launch(
        self, run: Run, name: str, command: Sequence[str], show: Callable[[], None] = lambda: None
    ) -> int:
        """Carry out a training or a probe; return the most bytes that it was seen to hold.

        Raises:
            RunFailed: it ended with an error, or before its last iteration.
            Stopped: it was asked to stop.
        """
        log = self.folder(run.key) / f"{name}.log"
        threads = {"OMP_NUM_THREADS": "1"} if self.device == "cpu" else {}
        peak, patience = 0, float("inf")
        if self._is_over():
            raise Stopped
        with log.open("ab") as file:
            process = psutil.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **threads},
                # Ctrl-C reaches this process alone, which asks that one to save
                start_new_session=True,
            )
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                peak = max(peak, process.memory_info().rss)
            show()
            if patience == float("inf") and self._is_over():
                self.console.print(f"stopping {run.name}, which saves first")
                process.terminate()
                patience = time.monotonic() + SECONDS_TO_STOP
            elif time.monotonic() > patience or self.killing.is_set():
                process.kill()
            time.sleep(POLL_SECONDS)
        if patience < float("inf"):
            raise Stopped
        code = process.returncode
        if code or (name == "train" and not self._is_trained(run)):
            why = f"ended with {code}" if code else "ended before its last iteration"
            end = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
            raise RunFailed(f"{run.name} {why}; the end of {log}:\n{end}")
        return peak

    def _is_over(self) -> bool:
        return self.stopping.is_set() or time.monotonic() > self.deadline

    def _is_trained(self, run: Run) -> bool:
        saved = self.folder(run.key) / "checkpoints" / "latest_checkpointed_iteration.txt"
        return saved.is_file() and saved.read_text().strip() == str(run.iterations)


def _end_leftover(folder: Path) -> None:
    """End what an experiment that was killed left at work on a run: two would share a folder."""
    for process in psutil.process_iter(["cmdline"]):
        said = process.info["cmdline"] or ()
        if "megamem.run" in said and str(folder / "checkpoints") in said:
            process.kill()
            process.wait(SECONDS_TO_STOP)
