"""Trains and probes what a plan asks for, some at a time, and keeps a record of what is finished.

    OUT/runs/KEY/train.log, tensorboard/, checkpoints/, probe-CORPUS.log    while it is at work
    OUT/runs/KEY/record.json                        when it is finished: never run again

Every training is `python -m megamem.run ... examples/pretrain_gpt.py FLAGS` with --save and --load
on one folder, so whatever ended it, the same command goes on from its last checkpoint. What it did
is read from the events that Megatron writes for TensorBoard. What its answers are worth:

    facts known = (accuracy on stated facts - accuracy on facts never stated) * facts
    bits known  = sum over relations of the same difference * bits to pick its answers

The second accuracy is what guessing yields, measured on the control.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from statistics import median
from threading import Event
from typing import Any

import psutil
from experiment.plan import Rates, Run, words
from rich.console import Console
from rich.progress import Progress, TextColumn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[3]
TRAIN, PROBE = ROOT / "examples" / "pretrain_gpt.py", ROOT / "examples" / "facts" / "probe.py"
POLL_SECONDS = 0.25
# a run that is asked to stop saves a checkpoint first
SECONDS_TO_STOP = 180.0
TAIL_LINES = 25
PARAMETERS = re.compile(r"number of parameters on \(.*?\) model parallel rank \(.*?\): (\d+)")


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
                    futures = [pool.submit(self._finish, run, progress) for run in wave]
                    for future in as_completed(futures):
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


class Events:
    """The numbers that a training has written for TensorBoard so far."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})

    def read(self, tag: str) -> dict[int, float]:
        """Iteration -> value; what was trained twice counts as it was trained last."""
        self.reader.Reload()
        known = tag in self.reader.Tags()["scalars"]
        return {e.step: e.value for e in self.reader.Scalars(tag)} if known else {}


def make_record(run: Run, folder: Path, output: Path, device: str) -> dict[str, Any]:
    """All that is reported of a finished run, as plain numbers; None what was not measured."""
    events, flags = Events(folder / "tensorboard"), run.flags
    times, losses = events.read("iteration-time"), events.read("lm loss")
    validation = events.read("lm loss validation")
    tokens = flags["global_batch_size"] * flags["seq_length"]
    (parameters,) = set(PARAMETERS.findall((folder / "train.log").read_text(errors="replace")))
    if device == "gpu":
        peak = int(max(events.read("mem-max-allocated-bytes").values()))
    else:
        # not there where this process was killed just after the training had ended
        measured = folder / "peak"
        peak = int(measured.read_text()) if measured.is_file() else 0
    probed = {corpus: _asked(output / corpus, folder) for corpus in probed_corpora(run)}
    return {
        "family": run.model.family,
        "seed": run.seed,
        "start": run.start,
        "flags": flags,
        "lr": flags["lr"],
        "memory_lr": flags.get("memory_lr"),
        "layers": flags["num_layers"],
        "iterations": run.iterations,
        "rows": run.model.rows,
        "parameters": int(parameters),
        "table_parameters": run.table,
        "flops_per_token": run.flops,
        "tokens_per_second": round(tokens / median(times.values()), 2),
        "peak_bytes": peak,
        "loss": losses[max(losses)],
        "validation_loss": round(validation[run.iterations], 7),
        "data_order": data_order(folder / "cache"),
        **software(device),
        "points": run.points,
        "seconds": [seconds_at(point, times) for point in run.points],
        **probed,
    }


def probed_corpora(run: Run) -> list[str]:
    """What a run is asked: its own facts, and those that it knew before it learnt them."""
    return list(dict.fromkeys((run.corpus, "corpus")))


def seconds_at(iteration: int, times: Mapping[int, float]) -> float:
    """Training time up to a logged iteration, of the seconds of an iteration in each interval."""
    logged = sorted(step for step in times if step <= iteration)
    intervals = zip([0, *logged], logged, strict=False)
    return round(sum(times[step] * (step - before) for before, step in intervals), 4)


def _asked(corpus: Path, folder: Path) -> dict[str, Any]:
    """What a run knows of a corpus at every point, and more of the last."""
    told = json.loads((corpus / "facts.json").read_text())
    number, bits = sum(fact["held_in"] for fact in told["facts"]), None
    # of which the probe may have asked some; facts taught later have no report
    if report := told.get("report"):
        number = told["settings"]["facts"]
        bits = {row["relation"]: row["bits"] for row in report["relations"]}
    probes = json.loads((folder / f"probe-{corpus.name}.json").read_text())["probes"]
    found: dict[str, list[dict[str, Any]]] = {"question": [], "unseen": []}
    for probe in probes:
        found[probe["phrasing"]].append(known(probe, number, bits))
    facts = [point["facts"] for point in found["question"]]
    return {**found["question"][-1], "facts": facts, "unseen": found["unseen"][-1]["facts"]}


def known(
    probe: Mapping[str, Any], facts: int, bits_by_relation: Mapping[str, float] | None
) -> dict[str, float | None]:
    """What one checkpoint knows, asked in one phrasing: an entry of the `probes` of probe.py.

    Args:
        facts: of the whole corpus, of which the probe may have asked some.
        bits_by_relation: bits to pick the answers of all facts of each relation.

    Returns:
        `accuracy` on facts that training stated, `guessing` on facts that it did not, `facts` and
        `bits` known of the whole corpus; no bits where nobody counted them
    """
    # without a control, nothing is taken off
    accuracy, guessing = [*(total["accuracy"] for total in probe["totals"]), 0.0][:2]
    bits = None
    if bits_by_relation is not None:
        control = {score["relation"]: score["accuracy"] for score in probe["control"]}
        gains = {
            score["relation"]: score["accuracy"] - control.get(score["relation"], guessing)
            for score in probe["scores"]
        }
        bits = round(sum(gain * bits_by_relation[name] for name, gain in gains.items()), 3)
    # digits beyond these are those of a division
    found = {"accuracy": accuracy, "guessing": guessing, "facts": (accuracy - guessing) * facts}
    return {**{name: round(value, 6) for name, value in found.items()}, "bits": bits}


def data_order(cache: Path) -> str:
    """A hash of the order in which Megatron gave the run its sequences; empty where it is gone.

    Megatron writes it down before it trains: which documents, cut where, in which order.
    """
    contents = sorted(hashlib.sha256(p.read_bytes()).hexdigest() for p in cache.glob("**/*.npy"))
    return hashlib.sha256("".join(contents).encode()).hexdigest()[:16] if contents else ""


def best_rates(sweep: Sequence[Run], records: Mapping[str, Mapping[str, Any]]) -> dict[str, Rates]:
    """Family -> the pair of factors whose run knows most facts, asked their questions."""
    best: dict[str, Run] = {}
    for run in sweep:
        rival = best.setdefault(run.model.family, run)
        if records[run.key]["corpus"]["facts"][-1] > records[rival.key]["corpus"]["facts"][-1]:
            best[run.model.family] = run
    return {family: run.rates for family, run in best.items()}


def software(device: str) -> dict[str, str]:
    """Device, commit (with a plus where the checkout was changed) and releases of a number."""
    name = f"CPU, {platform.machine()}"
    if device == "gpu":
        import torch

        name = torch.cuda.get_device_name()
    describe = ("git", "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+")
    here = Path(__file__).parent
    commit = subprocess.run(describe, cwd=here, capture_output=True, text=True).stdout.strip()
    versions = {name: version(name) for name in ("megamem", "torch", "megatron-core")}
    return {"commit": commit, "device": name, "python": platform.python_version(), **versions}
