"""The record of a finished run, and what its answers are worth.

    facts known = (accuracy on stated facts - accuracy on facts never stated) * facts
    bits known  = sum over relations of the same difference * bits to pick its answers

The second accuracy is what guessing yields, measured on the control. What training did is read from
the events that Megatron writes for TensorBoard, and the number of parameters from its log.
"""

import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiment.models import Rates
from experiment.plan import Run

PARAMETERS = re.compile(r"number of parameters on \(.*?\) model parallel rank \(.*?\): (\d+)")


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
    accuracy, guessing = _share(probe["scores"]), _share(probe["control"])
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

    def facts(run: Run) -> float:
        return float(records[run.key]["corpus"]["facts"][-1])

    families = {
        run.model.family: [r for r in sweep if r.model.family == run.model.family] for run in sweep
    }
    return {family: max(runs, key=facts).rates for family, runs in families.items()}


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


def _share(scores: Sequence[Mapping[str, Any]]) -> float:
    asked = sum(score["asked"] for score in scores)
    return sum(score["right"] for score in scores) / asked if asked else 0.0
