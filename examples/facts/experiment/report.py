"""results.json, and the tables that results.md and the console show of it."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiment.plan import Run, Scale
from experiment.runs import merit
from tables import Sheet

Results = Mapping[str, Any]
Runs = Sequence[Mapping[str, Any]]
Cells = Mapping[str, Callable[[Runs], str]]

# what the runs of an experiment have in common, most often
MADE_WITH = ("commit", "device", "torch", "megatron-core", "megamem")
# of a record, what the tables have no need of; the key is a hash of the flags, which the plan makes
HIDDEN = ("flags", "start", "loss", "python", "command", *MADE_WITH[1:])
# below the main table
NOTES = (
    "facts known = (accuracy on stated facts - accuracy on facts never stated) * facts.",
    "An answer is right when greedy decoding would write exactly it and stop (teacher-forced, "
    "which is the same).",
)
SAME_ORDER = "All models of a seed were given the same sequences in the same order."
OTHER_ORDER = "THE ORDER OF THE DATA DIFFERS between models of one seed: compare nothing here."
RATIOS = "Speeds are ratios within this experiment, on a CPU, runs side by side."
UNTIMED = "Models without a speed were trained on a machine that was busy with other work."


def collect(
    scale: Scale, corpus: Mapping[str, Any], planned: Sequence[Run], records: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that is reported of the finished runs, whose records these are, and their corpus.

    Returns:
        plain numbers: how many runs are `waiting`; what they were `made_with`; the `parts`, each
        with the keys of its models' finished runs; and the `runs` by their keys
    """
    parts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in (run for run in planned if run.key in records):
        parts[run.part][run.model.name].append(run.key)
    told = {"bits": "answer_bits", "tokens": "tokens_train", "vocab_size": "vocab_size"}
    return {
        "scale": _without(asdict(scale), "models", "ablations"),
        "corpus": {
            "facts": corpus["facts_real"] + corpus["facts_generated"],
            **{name: corpus[key] for name, key in told.items()},
        },
        "waiting": sum(run.key not in records for run in planned),
        "made_with": {name: sorted({r[name] for r in records.values()}) for name in MADE_WITH},
        "parts": parts,
        "runs": {key: _without(record, *HIDDEN) for key, record in records.items()},
    }


def _without(value: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name not in names}


def _as_json(value: Any, levels: int = 2) -> str:
    """With a line for each entry of the outer mappings: a line a run."""
    if not levels or not isinstance(value, dict) or not value:
        return json.dumps(value)
    lines = (f"{json.dumps(name)}: {_as_json(item, levels - 1)}" for name, item in value.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def write(results: Results, output: Path) -> None:
    """Write results.json and results.md."""
    (output / "results.json").write_text(_as_json(results) + "\n")
    (output / "results.md").write_text(markdown(results))


def runs_of(results: Results, part: str) -> dict[str, Runs]:
    """Model -> its finished runs of a part, in the order of the plan."""
    models = results["parts"].get(part, {})
    return {name: [results["runs"][key] for key in keys] for name, keys in models.items()}


def known(runs: Runs) -> list[float]:
    """Facts that each knows in the end, asked their questions."""
    return [run["corpus"]["facts"][-1] for run in runs]


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Mean and, over several seeds, standard deviation."""
    text = f"{mean(values):,.{digits}f}"
    return f"{text} +- {stdev(values):,.{digits}f}" if len(values) > 1 else text


def bits_per_parameter(runs: Runs) -> float:
    """Bits known, asked their questions, for each parameter, tables included; mean of the seeds."""
    return mean(run["corpus"]["bits"] / run["parameters"] for run in runs)


def tokens_at(results: Results, iterations: int) -> int:
    """Tokens of so many iterations."""
    flags = results["scale"]["flags"]
    return int(iterations * flags["global_batch_size"] * flags["seq_length"])


def _count(number: float) -> str:
    return f"{number:,.0f}" if number else ""


def _rates(run: Mapping[str, Any]) -> list[str]:
    return ["" if run[name] is None else f"{run[name]:g}" for name in ("lr", "memory_lr")]


def _timed(runs: Runs) -> bool:
    return all(run["tokens_per_second"] for run in runs)


def _speed(runs: Runs) -> float:
    """Tokens a second, mean of the seeds; 0 where no times were kept."""
    return mean(run["tokens_per_second"] for run in runs) if _timed(runs) else 0.0


FEW = 30
"""Facts of which no percentages are shown: one fact would be several percent."""

# column -> what it says of the runs of a model
CELLS: Cells = {
    "rows": lambda runs: _count(runs[0]["rows"]),
    "parameters": lambda runs: _count(runs[0]["parameters"]),
    "of tables": lambda runs: _count(runs[0]["table_parameters"]),
    "MFLOP/token": lambda runs: f"{runs[0]['flops_per_token'] / 1e6:.3f}",
    "tokens/s": lambda runs: _count(_speed(runs)),
    "GPU MiB": lambda runs: _count(runs[0]["peak_bytes"] / 2**20),
    "process MiB": lambda runs: _count(runs[0]["peak_bytes"] / 2**20),
    "facts known": lambda runs: spread(known(runs)),
    "in unseen words": lambda runs: spread([run["corpus"]["unseen"] for run in runs]),
    "accuracy": lambda runs: f"{mean(run['corpus']['accuracy'] for run in runs):.1%}",
    "guessing": lambda runs: f"{mean(run['corpus']['guessing'] for run in runs):.1%}",
    "bits/parameter": lambda runs: f"{bits_per_parameter(runs):.4f}",
    "valid. loss": lambda runs: spread([run["validation_loss"] for run in runs], 3),
    "lr, table's": lambda runs: ", ".join(filter(None, _rates(runs[0]))),
    "seeds": lambda runs: str(len(runs)),
}


def _sheet(
    title: str, columns: Sequence[str], groups: Mapping[str, Runs], own: Cells, **more: Any
) -> Sheet:
    """A row for each model, whose name is the first column."""
    cells = {**CELLS, **own}
    rows = [(name, *(cells[column](r) for column in columns[1:])) for name, r in groups.items()]
    return Sheet(title, columns, rows, **more)


def sheets(results: Results) -> list[Sheet]:
    """All tables that have rows."""
    made = [main_sheet(results), curve_sheet(results), sweep_sheet(results)]
    made += [*ablation_sheets(results), continual_sheet(results)]
    return [sheet for sheet in made if sheet.rows]


def main_sheet(results: Results) -> Sheet:
    """Every model, its cost and what it knows; on a CPU, where no time is claimed, as ratios."""
    groups, on_gpu = runs_of(results, "main"), results["scale"]["device"] == "gpu"
    dense = groups.get("dense")

    def ratio(runs: Runs) -> str:
        return f"{_speed(runs) / _speed(dense):.2f}" if dense and _timed([*runs, *dense]) else ""

    columns = ["model", "rows", "parameters", "of tables", "MFLOP/token"]
    columns += ["tokens/s", "GPU MiB"] if on_gpu else ["speed, dense = 1", "process MiB"]
    columns += ["facts known", "in unseen words", "accuracy", "guessing", "bits/parameter"]
    columns += ["valid. loss", "lr, table's", "seeds"]
    orders = {(run["seed"], run["data_order"]) for runs in groups.values() for run in runs}
    same = len(orders) == len({seed for seed, _ in orders})
    notes = [*NOTES, SAME_ORDER if same else OTHER_ORDER, *([] if on_gpu else [RATIOS])]
    notes += [] if all(map(_timed, groups.values())) else [UNTIMED]
    title, brief = "Facts known at equal FLOPs and tokens", (0, 1, 4, 7, 8, 10)
    return _sheet(title, columns, groups, {"speed, dense = 1": ratio}, notes=notes, brief=brief)


def curve_sheet(results: Results) -> Sheet:
    """Facts known against tokens."""
    groups = runs_of(results, "main")
    points = sorted({point for runs in groups.values() for run in runs for point in run["points"]})
    facts = {name: [run["corpus"]["facts"] for run in runs] for name, runs in groups.items()}
    rows = [(name, *map(spread, zip(*each, strict=True))) for name, each in facts.items()]
    columns = ("model", *(f"{tokens_at(results, point):,}" for point in points))
    # every second point, back from the last, where there are many
    brief = (0, *range(len(points), 0, -2)[::-1]) if len(points) > 5 else ()
    return Sheet("Facts known against tokens", columns, rows, brief=brief)


def sweep_sheet(results: Results) -> Sheet:
    """Every pair of learning rates that was tried."""
    rows = []
    # of results that are older there are none
    short = results["scale"].get("short")
    asked = ("valid. loss",) if short else ("facts known", "in unseen words")
    for name, runs in runs_of(results, "sweep").items():
        best = max(merit(run, bool(short)) for run in runs)
        for run in runs:
            first, *others = (CELLS[column]([run]) for column in asked)
            chosen = " (best)" if merit(run, bool(short)) == best else ""
            rows.append((name, *_rates(run), first + chosen, *others))
    columns = ("model", "lr", "table's", *asked)
    note = "Every family takes the rates that know most facts, asked their questions."
    if short:
        note = f"Every family takes the rates of least loss after {short['train_iters']:,} steps."
    return Sheet("Sweep of learning rates, one seed", columns, rows, [note])


def ablation_sheets(results: Results) -> list[Sheet]:
    """What changes do to the reference, what comes of more steps, how many layers are memories.

    Each is beside the first of its table, if it is not alone, at the seeds of both.
    """
    flags = results["scale"]["flags"]
    changed, longer, deeper = (dict[str, Runs]() for _ in range(3))
    for name, runs in runs_of(results, "ablations").items():
        kind = longer if runs[0]["iterations"] != flags["train_iters"] else changed
        (deeper if runs[0]["layers"] != flags["num_layers"] else kind)[name] = runs
    title = "Ablations: the first row with one thing changed, at equal FLOPs and the same seeds"
    deep_title = "Number of memory layers, in a deeper model, at the FLOPs of a dense one as deep"
    return [
        # the reference alone says nothing
        _ablation_sheet(title, "change", changed if len(changed) > 1 else {}),
        _ablation_sheet("At twice the steps", "model or its table's optimizer", longer),
        _ablation_sheet(deep_title, "model", deeper),
    ]


def _ablation_sheet(title: str, first: str, groups: Mapping[str, Runs]) -> Sheet:
    base = {run["seed"]: known([run])[0] for run in next(iter(groups.values()), [])}

    def beside(runs: Runs) -> str:
        facts = sum(base.get(run["seed"], 0.0) for run in runs)
        if len(groups) == 1:
            return ""
        more = sum(known(runs)) - facts
        return f"{more / facts:+.1%}" if facts >= FEW else f"{more:+,.0f} facts"

    columns = (first, "parameters", "MFLOP/token", "facts known", "", "in unseen words")
    return _sheet(title, (*columns, "valid. loss", "seeds"), groups, {"": beside})


def continual_sheet(results: Results) -> Sheet:
    """New facts learnt, and old ones lost to that; the first run is the one that was taught."""
    (before, trained), *taught = list(runs_of(results, "continual").items()) or [("", [])]
    rows = []
    for name, (run,) in taught:
        (old,), (kept,), new = known(trained), known([run]), run["new"]
        lost = f"{old - kept:,.0f}" + (f" ({1 - kept / old:.1%})" if old >= FEW else "")
        numbers = (new["facts"][-1], new["unseen"], kept)
        rows.append((name, *(f"{number:,.0f}" for number in numbers), lost))
    title = f"{results['scale']['new']['facts']} new facts taught to a trained {before}"
    columns = ("new known", "in unseen words", "old still known", "old lost")
    columns = ("method (factor of both learning rates)", *columns)
    notes = ["LoRA is left out: Megatron-LM's GPT training has none."]
    return Sheet(f"Continual learning: {title}", columns, rows, notes)


def markdown(results: Results) -> str:
    """All tables with what they belong to."""
    corpus, scale = results["corpus"], results["scale"]
    flags = scale["flags"]
    told = [
        f"# Facts learnt at equal FLOPs: scale {scale['name']}",
        f"Corpus: {corpus['facts']:,} facts, {corpus['bits']:,.0f} bits, {corpus['tokens']:,} "
        f"tokens an epoch. Training: {flags['train_iters']:,} steps of "
        f"{flags['global_batch_size']} x {flags['seq_length']} tokens.",
    ]
    if results["waiting"]:
        told.append(f"{results['waiting']} runs of the plan are not finished yet.")
    told += [f"{name}: {', '.join(found)}" for name, found in results["made_with"].items() if found]
    for sheet in sheets(results):
        told += [f"## {sheet.title}", sheet.markdown(), *sheet.notes]
    return "\n\n".join(told) + "\n"
