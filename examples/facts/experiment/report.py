"""results.json, and the tables that results.md and the console show of it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from build_corpus import Report
from rich.table import Table

from experiment.plan import Run, words
from experiment.records import curve, final
from experiment.scales import Scale

PHRASINGS = ("question", "unseen")
ABLATION_COLUMNS = (
    *("parameters", "MFLOP/token", "facts known", "", "in unseen words", "valid. loss", "seeds"),
)


@dataclass(frozen=True)
class Sheet:
    """A table, for markdown and for the console; notes stand below it.

    Attributes:
        brief: places of the columns that a console has room for; all where empty.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    brief: tuple[int, ...] = ()


def collect(
    scale: Scale, counts: Report, planned: Iterable[Run], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything that is known, as plain numbers; a run stands once for each part that uses it."""
    runs, waiting = [], 0
    for run in planned:
        if run.key in records:
            runs.append({"group": run.group, **records[run.key], "model": run.model.name})
        else:
            waiting += 1
    return {
        "scale": asdict(scale),
        "corpus": {
            "facts": counts.facts_real + counts.facts_generated,
            "bits": counts.answer_bits,
            "tokens": counts.tokens_train,
            "vocab_size": counts.vocab_size,
        },
        "waiting": waiting,
        "runs": runs,
    }


def write(results: Mapping[str, Any], output: Path) -> None:
    """results.json and results.md."""
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "results.md").write_text(markdown(results))


def sheets(results: Mapping[str, Any]) -> list[Sheet]:
    """All tables that have rows."""
    kinds = (main_sheet, curve_sheet, sweep_sheet)
    kinds += (ablation_sheet, longer_sheet, depth_sheet, continual_sheet)
    return [sheet for make in kinds if (sheet := make(results)).rows]


def of_group(results: Mapping[str, Any], group: str) -> dict[str, list[dict[str, Any]]]:
    """Model -> its finished runs of a part, in the order of the plan."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        if run["group"] == group:
            found.setdefault(run["model"], []).append(run)
    return found


def mean_of(runs: Sequence[Mapping[str, Any]], name: str, phrasing: str = "question") -> float:
    """Of a number of the last probe, over the seeds."""
    return mean(final(run, phrasing)[name] for run in runs)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Mean and, over several seeds, standard deviation."""
    text = f"{mean(values):,.{digits}f}"
    return f"{text} +- {stdev(values):,.{digits}f}" if len(values) > 1 else text


def bits_per_parameter(runs: Sequence[Mapping[str, Any]]) -> float:
    """Bits known, asked their questions, for each parameter, tables included; mean of the seeds."""
    return mean(final(run, "question")["bits"] / run["parameters"] for run in runs)


def main_sheet(results: Mapping[str, Any]) -> Sheet:
    """Every model, its cost and what it knows."""
    groups = of_group(results, "main")
    dense = groups.get("dense", [])
    on_gpu = results["scale"]["device"] == "gpu"
    rows = []
    for name, runs in groups.items():
        first = runs[0]
        rows.append(
            (
                name,
                f"{first['rows']:,}" if first["rows"] else "",
                f"{first['parameters']:,}",
                f"{first['parameters_of_tables']:,}" if first["rows"] else "",
                f"{first['flops_per_token'] / 1e6:.3f}",
                _speed(runs, dense, on_gpu),
                f"{first['peak_bytes'] / 2**20:,.0f}" if first["peak_bytes"] else "",
                *(
                    spread([final(run, phrasing)["facts"] for run in runs])
                    for phrasing in PHRASINGS
                ),
                f"{mean_of(runs, 'accuracy'):.1%}",
                f"{mean_of(runs, 'guessing'):.1%}",
                f"{bits_per_parameter(runs):.4f}",
                spread([run["validation_loss"] for run in runs], 3)
                if all(run["validation_loss"] for run in runs)
                else "",
                f"{first['flags']['lr']:g}"
                + (f", {first['flags']['memory_lr']:g}" if first["rows"] else ""),
                str(len(runs)),
            )
        )
    orders: dict[int, set[str]] = {}
    for run in (run for runs in groups.values() for run in runs):
        orders.setdefault(run["seed"], set()).add(run["data_order"])
    same = all(len(order) == 1 for order in orders.values())
    speed = "tokens/s" if on_gpu else "speed, dense = 1"
    memory = "GPU MiB" if on_gpu else "process MiB"
    return Sheet(
        "Facts known at equal FLOPs and tokens",
        (
            *("model", "rows", "parameters", "of tables", "MFLOP/token", speed, memory),
            *("facts known", "in unseen words", "accuracy", "guessing", "bits/parameter"),
            *("valid. loss", "lr, table's", "seeds"),
        ),
        tuple(rows),
        (
            "facts known = (accuracy on stated facts - accuracy on facts never stated) * facts.",
            "An answer is right when greedy decoding would write exactly it and stop "
            "(teacher-forced, which is the same).",
            "All models of a seed were given the same sequences in the same order."
            if same
            else "THE ORDER OF THE DATA DIFFERS between models of one seed: compare nothing here.",
            *(
                ()
                if on_gpu
                else ("Speeds are ratios within this experiment, on a CPU, runs side by side.",)
            ),
        ),
        brief=(0, 1, 4, 7, 8, 10),
    )


def curve_sheet(results: Mapping[str, Any]) -> Sheet:
    """Facts known against tokens."""
    groups = of_group(results, "main")
    tokens = [p["tokens"] for runs in groups.values() for p in curve(runs[0], "question")]
    columns = sorted(set(tokens))
    rows = []
    for name, runs in groups.items():
        by_tokens: dict[int, list[float]] = {}
        for run in runs:
            for probe in curve(run, "question"):
                by_tokens.setdefault(probe["tokens"], []).append(probe["facts"])
        rows.append((name, *(spread(by_tokens[t]) if t in by_tokens else "" for t in columns)))
    return Sheet(
        "Facts known against tokens",
        ("model", *(f"{t:,}" for t in columns)),
        tuple(rows),
        # every second point, back from the last, where there are many
        brief=(0, *range(len(columns), 0, -2)[::-1]) if len(columns) > 5 else (),
    )


def sweep_sheet(results: Mapping[str, Any]) -> Sheet:
    """Every pair of learning rates that was tried."""
    rows = []
    for name, runs in of_group(results, "sweep").items():
        best = max(final(run, "question")["facts"] for run in runs)
        for run in runs:
            facts = final(run, "question")["facts"]
            table = run["flags"].get("memory_lr")
            rows.append(
                (
                    name,
                    f"{run['flags']['lr']:g}",
                    f"{table:g}" if table is not None else "",
                    f"{facts:,.0f}" + (" (best)" if facts == best else ""),
                    f"{final(run, 'unseen')['facts']:,.0f}",
                )
            )
    return Sheet(
        "Sweep of learning rates, one seed",
        ("model", "lr", "table's", "facts known", "in unseen words"),
        tuple(rows),
        ("Every family takes the rates that know most facts, asked their questions.",),
    )


def ablation_sheet(results: Mapping[str, Any]) -> Sheet:
    """What each change does to the reference, which is the first row."""
    rows = _ablation_rows(results, "changed")
    return Sheet(
        "Ablations: the first row with one thing changed, at equal FLOPs and the same seeds",
        ("change", *ABLATION_COLUMNS),
        # the reference alone says nothing
        rows if len(rows) > 1 else (),
    )


def depth_sheet(results: Mapping[str, Any]) -> Sheet:
    """How many layers should be memories, asked of a deeper model."""
    return Sheet(
        "Number of memory layers, in a deeper model, at the FLOPs of a dense one as deep",
        ("model", *ABLATION_COLUMNS),
        _ablation_rows(results, "deeper"),
    )


def longer_sheet(results: Mapping[str, Any]) -> Sheet:
    """What optimizers, and dense, come to when there is time."""
    return Sheet(
        "At twice the steps",
        ("model or its table's optimizer", *ABLATION_COLUMNS),
        _ablation_rows(results, "longer"),
    )


def _kind(run: Mapping[str, Any], scale: Mapping[str, Any]) -> str:
    if run["flags"]["num_layers"] != scale["layers"]:
        return "deeper"
    return "longer" if run["flags"]["train_iters"] != scale["iterations"] else "changed"


def _ablation_rows(results: Mapping[str, Any], kind: str) -> tuple[tuple[str, ...], ...]:
    """Those of one kind, each beside the first, if it is not alone, at the seeds of both."""
    rows = []
    base: dict[int, float] = {}
    groups = of_group(results, "ablations")
    chosen = {name: r for name, r in groups.items() if _kind(r[0], results["scale"]) == kind}
    for name, runs in chosen.items():
        facts = {run["seed"]: final(run, "question")["facts"] for run in runs}
        base = base or facts
        beside = sum(base.get(seed, 0.0) for seed in facts) if len(chosen) > 1 else 0.0
        losses = [run["validation_loss"] for run in runs]
        rows.append(
            (
                name,
                f"{runs[0]['parameters']:,}",
                f"{runs[0]['flops_per_token'] / 1e6:.3f}",
                spread(list(facts.values())),
                f"{sum(facts.values()) / beside - 1:+.1%}" if beside else "",
                spread([final(run, "unseen")["facts"] for run in runs]),
                spread(losses, 3) if all(losses) else "",
                str(len(runs)),
            )
        )
    return tuple(rows)


def continual_sheet(results: Mapping[str, Any]) -> Sheet:
    """New facts learnt, and old ones lost to that."""
    groups = of_group(results, "continual")
    before = next((runs[0] for runs in groups.values() if not runs[0]["start"]), None)
    rows = []
    for name, (run, *_) in groups.items():
        if run["start"] and before is not None:
            old = final(before, "question")["facts"]
            new, kept = (final(run, "question", corpus) for corpus in ("new", "corpus"))
            unseen = final(run, "unseen", "new")["facts"]
            lost = f"{old - kept['facts']:,.0f} ({1 - kept['facts'] / old:.1%})" if old else "0"
            rows.append(
                (name, f"{new['facts']:,.0f}", f"{unseen:,.0f}", f"{kept['facts']:,.0f}", lost)
            )
    facts, name = results["scale"]["new_facts"], before["model"] if before else "Memory+"
    return Sheet(
        f"Continual learning: {facts} new facts taught to a trained {name}",
        ("method (factor of both learning rates)", "new known", "in unseen words")
        + ("old still known", "old lost"),
        tuple(rows),
        ("LoRA is left out: Megatron-LM's GPT training has none.",),
    )


def markdown(results: Mapping[str, Any]) -> str:
    """All tables with what they belong to."""
    corpus, scale = results["corpus"], results["scale"]
    lines = [f"# Facts learnt at equal FLOPs: scale {scale['name']}", ""]
    lines.append(
        f"Corpus: {corpus['facts']:,} facts, {corpus['bits']:,.0f} bits, {corpus['tokens']:,} "
        f"tokens an epoch. Training: {scale['iterations']:,} steps of "
        f"{scale['batch']} x {scale['seq']} tokens."
    )
    if results["waiting"]:
        lines += ["", f"{results['waiting']} runs of the plan are not finished yet."]
    for key in ("commit", "device", "torch", "megatron-core", "megamem"):
        values = sorted({run[key] for run in results["runs"]})
        lines += ["" if key == "commit" else "", f"{key}: {', '.join(values)}"] if values else []
    for sheet in sheets(results):
        lines += ["", f"## {sheet.title}", "", *markdown_table(sheet)]
        for note in sheet.notes:
            lines += ["", note]
    return "\n".join(lines) + "\n"


def markdown_table(sheet: Sheet) -> list[str]:
    """The lines of its rows under its columns."""
    head = ["| " + " | ".join(sheet.columns) + " |", "|---" * len(sheet.columns) + "|"]
    return head + ["| " + " | ".join(row) + " |" for row in sheet.rows]


def console_tables(results: Mapping[str, Any]) -> list[Table]:
    """The same for a terminal."""
    return [_rich(sheet) for sheet in sheets(results)]


def plan_table(runs: Sequence[Run], scale: Scale) -> Table:
    """What will be trained, before anything is."""
    rows = tuple(
        (
            run.group,
            run.name,
            f"{run.parameters:,}",
            f"{run.table:,}" if run.table else "",
            f"{run.flops:,}",
            f"{run.iterations * scale.tokens_per_iteration:,}",
        )
        for run in runs
    )
    columns = ("part", "run", "parameters", "of tables", "FLOPs/token", "tokens")
    return _rich(Sheet(f"Plan of scale {scale.name}", columns, rows))


def flags_line(run: Run) -> str:
    """A run's key and its command line, files left out."""
    return f"{run.key}: {' '.join(words(run.flags))}"


def _speed(
    runs: Sequence[Mapping[str, Any]], dense: Sequence[Mapping[str, Any]], on_gpu: bool
) -> str:
    """Tokens per second; on a CPU as a ratio to dense, where no time is claimed."""
    speeds = [run["tokens_per_second"] for run in runs if run["tokens_per_second"]]
    yardstick = [run["tokens_per_second"] for run in dense if run["tokens_per_second"]]
    if not speeds or not (on_gpu or yardstick):
        return ""
    return f"{mean(speeds):,.0f}" if on_gpu else f"{mean(speeds) / mean(yardstick):.2f}"


def _rich(sheet: Sheet) -> Table:
    table = Table(
        title=sheet.title,
        title_justify="left",
        caption="\n".join(sheet.notes) or None,
        caption_justify="left",
    )
    places = sheet.brief or tuple(range(len(sheet.columns)))
    for place in places:
        table.add_column(sheet.columns[place], justify="right" if place else "left")
    for row in sheet.rows:
        table.add_row(*(row[place] for place in places))
    return table
