"""Trains and probes what a plan asks for, some at a time, and keeps a record of what is finished.

    OUT/runs/KEY/train.log, tensorboard/, checkpoints/, probe-CORPUS.log    while it is at work
    OUT/runs/KEY/record.json                        when it is finished: never run again

Every training saves to and loads from one folder, so whatever ended it, the same command goes on
from its last checkpoint. What it did is read from the events that Megatron writes for TensorBoard.

    facts known = (accuracy on stated facts - accuracy on facts never stated) * facts
    bits known  = sum over relations of the same difference * bits to pick its answers
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain, groupby, pairwise
from pathlib import Path
from statistics import median
from threading import Event, Lock
from typing import Any

from experiment.plan import Rates, Run, words

import megamem

ROOT = Path(__file__).parents[3]
TRAIN, PROBE = ROOT / "examples" / "pretrain_gpt.py", ROOT / "examples" / "facts" / "probe.py"
TRAIN_AND_PROBE = PROBE.with_name("train_and_probe.py")
POLL_SECONDS = 0.25
# a run that is asked to stop saves a checkpoint first
SECONDS_TO_STOP = 180.0
TAIL_LINES = 25
PARAMETERS = re.compile(r"number of parameters on \(.*?\) model parallel rank \(.*?\): (\d+)")


class RunFailed(Exception):
    """A training or a probe ended before it was finished; the message shows the end of its log."""


@dataclass
class Runner:
    """Executes runs.

    Attributes:
        output: folder of the experiment; corpora and runs lie in it.
        device: cpu or gpu.
        jobs: runs at a time.
        deadline: of time.monotonic(); what is at work then saves and stops.
        timed: whether times are kept.
    """

    output: Path
    device: str
    jobs: int
    deadline: float
    console: Any
    timed: bool = True
    stopping: Event = field(default_factory=Event)

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
        done = len(finished)
        self.console.print(f"{title}: {done} of {len(runs)} runs are finished already")
        self.stopping.clear()
        if not waiting or self._is_over():
            return not waiting
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                # what starts from another run's checkpoint, which comes first, waits for it
                for _, wave in groupby(waiting, key=lambda run: bool(run.start)):
                    futures = [pool.submit(self._finish, run) for run in wave]
                    for future in as_completed(futures):
                        if not future.result():
                            return False
                        done += 1
                        self.console.print(f"{title}: {done} of {len(runs)} runs are finished")
            finally:
                # what is at work saves and leaves
                self.stopping.set()
                pool.shutdown(cancel_futures=True)
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
            start = self.folder(run.start) / "checkpoints"
            files |= {
                "save": checkpoints,
                "exit_signal_handler": True,
                "pretrained_checkpoint": bool(run.start) and start,
                "tensorboard_dir": folder / "tensorboard",
                "tensorboard_log_interval": run.flags["log_interval"],
                "log_timers_to_tensorboard": True,
                "log_memory_to_tensorboard": self.device == "gpu",
                # how memories are used is no part of the record, and takes time
                "memory_metrics": "off",
            }
        return self._launcher(PROBE if asked else TRAIN, run.flags, files)

    def _launcher(self, script: Path, *flags: Mapping[str, Any]) -> list[str]:
        launcher = [sys.executable, "-m", "megamem.run"]
        launcher += ["--cpu=force"] if self.device == "cpu" else []
        return [*launcher, str(script), *chain(*map(words, flags))]

    def memory_of(self, process: int) -> int:
        """Bytes that a process holds, where it does not tell itself; 0 once it has ended."""
        import psutil

        with contextlib.suppress(psutil.Error):
            return psutil.Process(process).memory_info().rss
        return 0

    def _finish(self, run: Run) -> bool:
        """Train and ask a run, as far as it is not done, and write its record; False if stopped."""
        folder = self.folder(run.key)
        _end_leftover(folder)
        self.console.print(f"at work on {run.name}")
        for asked in ("", *probed_corpora(run)):
            if not (self._is_done(run, asked) or self._launch(run, asked)):
                return False
        record = self._as_timed(make_record(run, folder, self.output, self.device))
        part = folder / "record.json.part"
        part.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(part, folder / "record.json")
        # checkpoints that nothing starts from are large, and asked already
        shutil.rmtree(folder / "cache", ignore_errors=True)
        for checkpoint in (folder / "checkpoints").glob("iter_*"):
            if not (run.keep and checkpoint.name == f"iter_{run.iterations:07d}"):
                shutil.rmtree(checkpoint)
        self.console.print(f"finished {run.name}, last loss {record['loss']:.3f}")
        return True

    def _as_timed(self, record: dict[str, Any]) -> dict[str, Any]:
        return record if self.timed else {**record, "tokens_per_second": None, "seconds": None}

    def _launch(self, run: Run, asked: str) -> bool:
        """Train a run, or ask it for the facts of a corpus; return False if it was stopped.

        Raises:
            RunFailed: it ended by itself before it was finished.
        """
        folder, peak = self.folder(run.key), 0
        if self._is_over():
            return False
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / (f"probe-{asked}.log" if asked else "train.log")
        threads = {"OMP_NUM_THREADS": "1"} if self.device == "cpu" else {}
        with log.open("ab") as file:
            process = subprocess.Popen(
                self.command(run, asked),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **threads},
                # Ctrl-C reaches this process alone, which asks that one to save
                start_new_session=True,
            )
        while process.poll() is None and not self._is_over():
            peak = max(peak, self.memory_of(process.pid))
            time.sleep(POLL_SECONDS)
        if process.poll() is None:
            self.console.print(f"stopping {run.name}, which saves first")
            process.terminate()
            try:
                process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return False
        if process.returncode or not self._is_done(run, asked):
            end = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
            why = f"ended with {process.returncode} before it was finished"
            raise RunFailed(f"{run.name} {why}; the end of {log}:\n{end}")
        if not asked:
            (folder / "peak").write_text(str(peak))
        return True

    def _is_over(self) -> bool:
        return self.stopping.is_set() or time.monotonic() > self.deadline

    def _is_done(self, run: Run, asked: str) -> bool:
        if asked:
            return (self.folder(run.key) / f"probe-{asked}.json").is_file()
        saved = self.folder(run.key) / "checkpoints" / "latest_checkpointed_iteration.txt"
        return saved.is_file() and saved.read_text().strip() == str(run.iterations)


class OneProcessRunner(Runner):
    """Executes runs that one process trains and asks, and keeps all of their records in one file.

    That file is all that has to be kept: a fresh machine that is given it, and the corpus, goes on.
    A run that was cut off is in it with what it told so far, and is begun again.
    """

    writing = Lock()

    def kept(self) -> dict[str, dict[str, Any]]:
        """Key -> record, of everything that was ever started with this folder."""
        path = self.output / "records.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def records(self, runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
        """Key -> record, of those that are finished."""
        kept, keys = self.kept(), {run.key for run in runs}
        return {key: r for key, r in kept.items() if key in keys and r["complete"]}

    def command(self, run: Run, asked: str = "") -> list[str]:
        """What trains a run and asks it."""
        folder, corpus = self.folder(run.key), self.output / run.corpus
        facts = json.loads((corpus / "facts.json").read_text())
        files = {
            "train_data_path": corpus / "facts_train",
            "valid_data_path": corpus / "facts_valid",
            # the corpus is in tokens already
            "tokenizer_type": "NullTokenizer",
            "vocab_size": facts["report"]["vocab_size"],
            "null_tokenizer_eod_id": facts["end_token"],
            "data_cache_path": folder / "cache",
            "num_workers": 0,
            "memory_metrics": "off",
        }
        own = {"facts": corpus / "facts.json", "told": folder / "told.json", "points": run.points}
        # of a checkpoint, as there is none
        flags = {name: value for name, value in run.flags.items() if name != "save_interval"}
        return self._launcher(TRAIN_AND_PROBE, flags, files, own)

    def memory_of(self, process: int) -> int:
        """None of them is measured here: a run tells its own peak."""
        return 0

    def _finish(self, run: Run) -> bool:
        folder, started = self.folder(run.key), time.monotonic()
        # those of a run that was cut off
        for name in ("told.json", "train.log"):
            (folder / name).unlink(missing_ok=True)
        self.console.print(f"at work on {run.name}")
        try:
            return self._launch(run, "")
        finally:
            if (folder / "told.json").is_file():
                self._keep(run, time.monotonic() - started)
            shutil.rmtree(folder / "cache", ignore_errors=True)

    def _is_done(self, run: Run, asked: str) -> bool:
        path = self.folder(run.key) / "told.json"
        return path.is_file() and json.loads(path.read_text())["complete"]

    def _keep(self, run: Run, wall_seconds: float) -> None:
        """Add what a run told to the file of all records."""
        folder = self.folder(run.key)
        told = json.loads((folder / "told.json").read_text())
        known = _known(self.output / run.corpus, told.pop("probes"))
        seconds, device = told["seconds"], told.pop("device") or f"CPU, {platform.machine()}"
        tokens = run.flags["global_batch_size"] * run.flags["seq_length"]
        record = {
            **described(run, folder, device),
            **told,
            "points": run.points[: len(seconds)],
            # the first steps compile kernels
            "tokens_per_second": round(tokens * _speed([0, *run.points], [0, *seconds]), 2),
            "wall_seconds": round(wall_seconds, 1),
            "command": shlex.join(self.command(run)),
            "corpus": known,
        }
        if not record["complete"]:
            steps = f"{run.points[len(seconds) - 1]:,} of {run.iterations:,} steps"
            facts = f"{known['facts'][-1]:,.0f} facts known"
            self.console.print(f"{run.name} was cut off; kept is what it told at {steps}: {facts}")
        with self.writing:
            part = self.output / "records.json.part"
            kept = {**self.kept(), run.key: self._as_timed(record)}
            part.write_text(json.dumps(kept) + "\n")
            os.replace(part, self.output / "records.json")


def _end_leftover(folder: Path) -> None:
    """End what an experiment that was killed left at work on a run: two would share a folder."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        said = process.info["cmdline"] or ()
        if "megamem.run" in said and str(folder / "checkpoints") in said:
            process.kill()
            process.wait(SECONDS_TO_STOP)


def read_events(folder: Path) -> dict[str, dict[int, float]]:
    """What a training wrote for TensorBoard: tag -> iteration -> the value written last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}


def make_record(run: Run, folder: Path, output: Path, device: str) -> dict[str, Any]:
    """All that is reported of a finished run, as plain numbers; None what was not measured."""
    events, flags = read_events(folder / "tensorboard"), run.flags
    times, losses = events["iteration-time"], events["lm loss"]
    tokens = flags["global_batch_size"] * flags["seq_length"]
    (parameters,) = set(PARAMETERS.findall((folder / "train.log").read_text(errors="replace")))
    # not there where this process was killed just after the training had ended
    measured, peak, device_name = folder / "peak", 0, f"CPU, {platform.machine()}"
    if device == "gpu":
        import torch

        device_name = torch.cuda.get_device_name()
        peak = int(max(events["mem-max-allocated-bytes"].values()))
    elif measured.is_file():
        peak = int(measured.read_text())
    return {
        **described(run, folder, device_name),
        "parameters": int(parameters),
        "tokens_per_second": round(tokens / median(times.values()), 2),
        "peak_bytes": peak,
        "loss": losses[max(losses)],
        "validation_loss": round(events["lm loss validation"][run.iterations], 7),
        "points": run.points,
        "seconds": [seconds_at(point, times) for point in run.points],
        **{corpus: _asked(output / corpus, folder) for corpus in probed_corpora(run)},
    }


def described(run: Run, folder: Path, device: str) -> dict[str, Any]:
    """What a record says of the run beside its measurements: its settings, and what made it."""
    flags = run.flags
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
        "table_parameters": run.table,
        "flops_per_token": run.flops,
        "data_order": data_order(folder / "cache"),
        "commit": commit(),
        "device": device,
        "python": platform.python_version(),
        "megamem": megamem.__version__,
        **{name: version(name) for name in ("torch", "megatron-core")},
    }


def commit() -> str:
    """The checkout's, with a plus where it was changed; MEGAMEM_COMMIT is for want of git."""
    if named := os.environ.get("MEGAMEM_COMMIT"):
        return named
    describe = ("git", "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+")
    try:
        found = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        found = ""
    return found or "unknown"


def probed_corpora(run: Run) -> list[str]:
    """What a run is asked: its own facts, and those that it knew before it learnt them."""
    return list(dict.fromkeys((run.corpus, "corpus")))


def seconds_at(iteration: int, times: Mapping[int, float]) -> float:
    """Training time up to a logged iteration, of the seconds of an iteration in each interval."""
    logged = sorted(step for step in times if step <= iteration)
    intervals = zip([0, *logged], logged, strict=False)
    return round(sum(times[step] * (step - before) for before, step in intervals), 4)


def _speed(points: Sequence[int], seconds: Sequence[float]) -> float:
    """Median iterations a second, of the intervals between points; there may be more points."""
    intervals = pairwise(zip(points, seconds, strict=False))
    return median((point - p) / (second - s) for (p, s), (point, second) in intervals)


def _asked(corpus: Path, folder: Path) -> dict[str, Any]:
    """What probe.py found that a run knows of a corpus."""
    told = json.loads((folder / f"probe-{corpus.name}.json").read_text())
    return _known(corpus, told["probes"])


def _known(corpus: Path, probes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run knows of a corpus at every point, and more of the last."""
    told = json.loads((corpus / "facts.json").read_text())
    number, bits = sum(fact["held_in"] for fact in told["facts"]), None
    # of which the probe may have asked some; facts taught later have no report
    if report := told.get("report"):
        number = told["settings"]["facts"]
        bits = {row["relation"]: row["bits"] for row in report["relations"]}
    found: dict[str, list[dict[str, Any]]] = {"question": [], "unseen": []}
    for probe in probes:
        found[probe["phrasing"]].append(known(probe, number, bits))
    facts = [point["facts"] for point in found["question"]]
    # asked at the end alone
    unseen = found["unseen"][-1]["facts"] if found["unseen"] else None
    return {**found["question"][-1], "facts": facts, "unseen": unseen}


def known(
    probe: Mapping[str, Any], facts: int, bits_by_relation: Mapping[str, float] | None
) -> dict[str, float | None]:
    """What one checkpoint knows, asked in one phrasing: an entry of the `probes` of probe.py.

    Returns:
        `accuracy` on facts that training stated, `guessing` on facts that it did not, and what is
        known of all `facts` of the corpus and of the `bits` to pick their answers, if counted
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
    """A hash of Megatron's index of the sequences that a run reads; empty where it is gone."""
    contents = sorted(hashlib.sha256(p.read_bytes()).hexdigest() for p in cache.glob("**/*.npy"))
    return hashlib.sha256("".join(contents).encode()).hexdigest()[:16] if contents else ""


def merit(record: Mapping[str, Any], by_loss: bool) -> float:
    """By what rates are chosen: facts known in the end, asked their questions, or less loss."""
    return -record["validation_loss"] if by_loss else record["corpus"]["facts"][-1]


def best_rates(
    sweep: Sequence[Run], records: Mapping[str, Mapping[str, Any]], by_loss: bool = False
) -> dict[str, Rates]:
    """Family -> the best pair of factors, by the facts that its run knows, or by loss."""
    best = sorted(sweep, key=lambda run: merit(records[run.key], by_loss), reverse=True)
    # the last of a family to be put in stays: the best one, of equals the first
    return {run.model.family: run.rates for run in reversed(best)}
