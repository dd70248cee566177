"""Pictures of results.json: facts known against rows, tokens and training time; bits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

from experiment.records import curve, final
from experiment.report import bits_per_parameter, of_group

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

Runs = Sequence[Mapping[str, Any]]

SIZE, DPI = (7.5, 4.8), 150
# of each family, so that a model looks the same in every picture
COLORS = {
    "dense": "#444444",
    "dense 2x": "#999999",
    "moe": "#d95f02",
    "peer": "#7570b3",
    "memory": "#1b9e77",
    "memory+": "#1f6fb4",
}
MARKERS = "osD^vP"


def draw(results: Mapping[str, Any], output: Path) -> list[str]:
    """Write what can be drawn of the finished runs; return the names of the files."""
    groups = of_group(results, "main")
    if not groups:
        return []
    on_gpu = results["scale"]["device"] == "gpu"
    pictures = {"facts_by_tokens.png": by_tokens, "bits_per_parameter.png": by_bits}
    # a single size of table makes no curve
    if len({runs[0]["rows"] for runs in groups.values()} - {0}) > 1:
        pictures["facts_by_rows.png"] = by_rows
    written = []
    for name, picture in pictures.items():
        figure, axes = plt.subplots(figsize=SIZE, dpi=DPI, layout="constrained")
        picture(axes, groups)
        _save(figure, output / name)
        written.append(name)
    dense = _seconds(groups.get("dense", []))
    if on_gpu or dense:
        figure, axes = plt.subplots(figsize=SIZE, dpi=DPI, layout="constrained")
        by_time(axes, groups, None if on_gpu else dense)
        _save(figure, output / "facts_by_time.png")
        written.append("facts_by_time.png")
    return written


def by_rows(axes: Axes, groups: Mapping[str, Runs]) -> None:
    """Memories at their rows; models without a table as lines across."""
    grown = [runs for runs in groups.values() if runs[0]["family"] == "memory+"]
    grown.sort(key=lambda runs: runs[0]["rows"])
    for phrasing, style in (("question", "-"), ("unseen", "--")):
        if grown:
            label = "memory+" if phrasing == "question" else "memory+, asked in unseen words"
            axes.errorbar(
                [runs[0]["rows"] for runs in grown],
                [mean(_facts(runs, phrasing)) for runs in grown],
                [_deviation(_facts(runs, phrasing)) for runs in grown],
                linestyle=style,
                marker="o",
                capsize=3,
                color=COLORS["memory+"],
                alpha=1.0 if phrasing == "question" else 0.6,
                label=label,
            )
    for name, runs in groups.items():
        family, facts = runs[0]["family"], _facts(runs)
        if family in ("memory", "peer"):
            color = COLORS[family]
            axes.errorbar(
                [runs[0]["rows"]],
                [mean(facts)],
                [_deviation(facts)],
                marker="D",
                capsize=3,
                linestyle="none",
                color=color,
                label=name,
            )
        elif not runs[0]["rows"]:
            axes.axhline(mean(facts), color=COLORS[family], linestyle=_across(family), label=name)
    rows = sorted({runs[0]["rows"] for runs in groups.values() if runs[0]["rows"]})
    if rows:
        axes.set_xscale("log", base=2)
        axes.set_xticks([runs[0]["rows"] for runs in grown] or rows)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
        axes.minorticks_off()
    _finish(axes, "rows of the value table", "facts known")


def by_tokens(axes: Axes, groups: Mapping[str, Runs]) -> None:
    """Facts known at every probed point of training."""
    shades = _shades(groups)
    for name, runs in groups.items():
        tokens = [probe["tokens"] for probe in curve(runs[0], "question")]
        _line(axes, name, runs, [0, *tokens], shades[name])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _short(n)))
    _finish(axes, "tokens trained on", "facts known")


def by_time(axes: Axes, groups: Mapping[str, Runs], dense: float | None) -> None:
    """The same against seconds of training; on a CPU in units of what dense took for all of it."""
    unit, shades = dense or 1.0, _shades(groups)
    for name, runs in groups.items():
        seconds = [mean(at) for at in _columns(runs, "seconds") if all(s is not None for s in at)]
        if len(seconds) == len(curve(runs[0], "question")):
            _line(axes, name, runs, [0, *(s / unit for s in seconds)], shades[name])
    label = "training time, dense = 1 (CPU, a ratio within this experiment)"
    _finish(axes, label if dense else "seconds of training", "facts known")


def by_bits(axes: Axes, groups: Mapping[str, Runs]) -> None:
    """Bits known for each parameter, tables included."""
    names = list(groups)
    heights = [bits_per_parameter(runs) for runs in groups.values()]
    shades = _shades(groups)
    bars = axes.bar(names, heights, color=[shades[name] for name in names])
    axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
    axes.tick_params(axis="x", rotation=30)
    _finish(axes, "", "bits known per parameter", legend=False)


def _shades(groups: Mapping[str, Runs]) -> dict[str, Any]:
    """A color for every model: its family's; of Memory+, the more rows, the darker."""
    shades: dict[str, Any] = {name: COLORS[runs[0]["family"]] for name, runs in groups.items()}
    grown = [name for name, runs in groups.items() if runs[0]["family"] == "memory+"]
    for place, name in enumerate(sorted(grown, key=lambda name: groups[name][0]["rows"]), 1):
        shades[name] = plt.get_cmap("Blues")(0.35 + 0.65 * place / len(grown))
    return shades


def _line(axes: Axes, name: str, runs: Runs, places: Sequence[float], color: Any) -> None:
    family, size = runs[0]["family"], runs[0]["rows"]
    points = [[0.0], *_columns(runs, "facts")]
    axes.errorbar(
        places,
        [mean(column) for column in points],
        [_deviation(column) for column in points],
        label=name,
        color=color,
        marker=MARKERS[size.bit_length() // 2 % len(MARKERS)] if size else "x",
        linestyle="-" if size else _across(family),
        capsize=2,
    )


def _columns(runs: Runs, number: str) -> list[list[Any]]:
    """For each probed point of training, one value of every seed."""
    curves = [[probe[number] for probe in curve(run, "question")] for run in runs]
    return [list(column) for column in zip(*curves, strict=True)]


def _facts(runs: Runs, phrasing: str = "question") -> list[float]:
    return [final(run, phrasing)["facts"] for run in runs]


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _seconds(runs: Runs) -> float:
    """Mean training time of all of it; 0 where it was not measured."""
    seconds = [final(run, "question")["seconds"] for run in runs]
    return mean(seconds) if seconds and all(seconds) else 0.0


def _across(family: str) -> str:
    return {"dense": "-", "dense 2x": "--"}.get(family, "-.")


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g} {unit}"
    return f"{number:g}"


def _finish(axes: Axes, x: str, y: str, legend: bool = True) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
