"""The record of a finished run, and what its answers are worth.

    facts known = (accuracy on stated facts - accuracy on facts never stated) * facts
    bits known  = sum over relations of the same difference * bits to pick its answers

The second accuracy is what guessing yields, measured on the control. An answer counts when greedy
decoding would write exactly it and stop; feeding the answer in and looking whether every next token
is the likeliest decides the same in one forward.
"""

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiment import logs
from experiment.plan import Run

PHRASINGS = ("question", "unseen")


@dataclass(frozen=True)
class Known:
    """What one checkpoint knows, asked in one phrasing.

    Attributes:
        accuracy: on facts that training stated, of those asked.
        guessing: on facts that it did not.
        facts: known, of all facts of the corpus.
        bits: known, of all bits of the corpus; None where the corpus does not say how many it has.
    """

    accuracy: float
    guessing: float
    facts: float
    bits: float | None


def known(
    probe: Mapping[str, Any], facts: int, bits_by_relation: Mapping[str, float] | None
) -> Known:
    """Evaluate one entry of the `probes` that probe.py writes.

    Args:
        facts: of the whole corpus, of which the probe may have asked some.
        bits_by_relation: bits to pick the answers of all facts of each relation.
    """
    accuracy, guessing = _share(probe["scores"]), _share(probe["control"])
    bits = None
    if bits_by_relation is not None:
        control = {score["relation"]: score["accuracy"] for score in probe["control"]}
        bits = sum(
            (score["accuracy"] - control.get(score["relation"], guessing))
            * bits_by_relation[score["relation"]]
            for score in probe["scores"]
        )
    return Known(accuracy, guessing, (accuracy - guessing) * facts, bits)


def make_record(run: Run, folder: Path, output: Path, device: str) -> dict[str, Any]:
    """All that is reported of a finished run, as plain numbers."""
    log = logs.read((folder / "train.log").read_text(errors="replace"))
    measured = folder / "peak.json"
    # not there where this process was killed just after the training had ended
    peak = json.loads(measured.read_text())["rss"] if measured.is_file() else None
    batch, sequence = run.flags["global_batch_size"], run.flags["seq_length"]
    assert isinstance(batch, int) and isinstance(sequence, int)
    tokens = batch * sequence
    record: dict[str, Any] = {
        "key": run.key,
        "model": run.model.name,
        "family": run.model.family,
        "seed": run.seed,
        "rates": list(run.rates),
        "flags": run.flags,
        "corpus": run.stamp,
        "start": run.start,
        "device": _device_name(device),
        **software(),
        "rows": run.model.rows,
        "parameters": log.parameters,
        "parameters_of_tables": run.table,
        "flops_per_token": run.flops,
        "tokens_per_iteration": tokens,
        "tokens_per_second": tokens * 1000 / log.ms_per_iteration if log.ms_per_iteration else None,
        "peak_bytes": log.allocated if device == "gpu" else peak,
        "loss": log.points[-1].loss if log.points else None,
        "validation_loss": log.validation_loss,
        "data_order": data_order(folder / "cache"),
        "probes": {},
    }
    for path in sorted(folder.glob("probe-*.json")):
        name = path.stem.removeprefix("probe-")
        facts, bits = corpus_counts(output / name)
        entries = []
        for probe in json.loads(path.read_text())["probes"]:
            found = known(probe, facts, bits)
            entries.append(
                {
                    "iteration": probe["iteration"],
                    "tokens": probe["iteration"] * tokens,
                    "seconds": log.seconds_at(probe["iteration"]),
                    "phrasing": probe["phrasing"],
                    **vars(found),
                }
            )
        record["probes"][name] = entries
    return record


def data_order(cache: Path) -> str:
    """A hash of the order in which Megatron gave the run its sequences; empty where it is gone.

    Megatron writes it down before it trains: which documents, cut where, in which order.
    """
    contents = sorted(hashlib.sha256(p.read_bytes()).hexdigest() for p in cache.glob("**/*.npy"))
    return hashlib.sha256("".join(contents).encode()).hexdigest()[:16] if contents else ""


def corpus_counts(folder: Path) -> tuple[int, dict[str, float] | None]:
    """Facts that a corpus states, and their bits by relation where its report has them."""
    told = json.loads((folder / "facts.json").read_text())
    if "report" not in told:
        return sum(fact["held_in"] for fact in told["facts"]), None
    relations = told["report"]["relations"]
    return told["settings"]["facts"], {r["relation"]: r["bits"] for r in relations}


def final(record: Mapping[str, Any], phrasing: str, corpus: str = "corpus") -> dict[str, Any]:
    """The last probe of a record in a phrasing."""
    return curve(record, phrasing, corpus)[-1]


def curve(record: Mapping[str, Any], phrasing: str, corpus: str = "corpus") -> list[dict[str, Any]]:
    """All probes of a record in a phrasing, in order of training."""
    entries = [e for e in record["probes"][corpus] if e["phrasing"] == phrasing]
    return sorted(entries, key=lambda entry: entry["iteration"])


def best_rates(
    sweep: Sequence[Run], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[float, float]]:
    """Family -> the pair of factors whose run knows most facts, asked their questions."""
    best: dict[str, tuple[float, tuple[float, float]]] = {}
    for run in sweep:
        facts = final(records[run.key], "question")["facts"]
        if run.model.family not in best or facts > best[run.model.family][0]:
            best[run.model.family] = (facts, run.rates)
    return {family: rates for family, (_, rates) in best.items()}


def software() -> dict[str, str]:
    """Commit and releases that a number belongs to."""
    versions = {name: version(name) for name in ("megamem", "torch", "megatron-core")}
    return {"commit": _commit(), "python": platform.python_version(), **versions}


def _commit() -> str:
    """Of the checkout, with a plus where it was changed; empty where there is none."""

    def git(*words: str) -> str:
        folder = Path(__file__).parent
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/megamem", ":/examples")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def _device_name(device: str) -> str:
    if device == "cpu":
        return f"CPU, {platform.machine()}"
    import torch

    return torch.cuda.get_device_name()


def _share(scores: Sequence[Mapping[str, Any]]) -> float:
    asked = sum(score["asked"] for score in scores)
    return sum(score["right"] for score in scores) / asked if asked else 0.0
