"""Pictures of results.json: facts known against rows, tokens and training time; bits."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from experiment.report import Results, Runs, bits_per_parameter, known, runs_of, tokens_at

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import EngFormatter, StrMethodFormatter  # noqa: E402

Groups = Mapping[str, Runs]

# of each family, so that a model looks the same in every picture
COLORS = {
    "dense": "#444444",
    "dense 2x": "#999999",
    "moe": "#d95f02",
    "peer": "#7570b3",
    "memory": "#1b9e77",
    "memory+": "#1f6fb4",
    "ultramem": "#e7298a",
    "ultramem-v2": "#a6761d",
}
LINES = {"dense": "-", "dense 2x": "--", "moe": "-."}
MARKERS = "osD^vP"


def draw(results: Results, output: Path) -> list[str]:
    """Write what can be drawn of the finished runs; return the names of the files."""
    groups = runs_of(results, "main")
    if not groups:
        return []
    written = ["facts_by_tokens.png", "bits_per_parameter.png"]
    with _picture(output / written[0], "tokens trained on", "facts known") as axes:
        axes.xaxis.set_major_formatter(EngFormatter())
        for name, runs in groups.items():
            _line(axes, groups, name, [tokens_at(results, point) for point in runs[0]["points"]])
    with _picture(output / written[1], "", "bits known per parameter") as axes:
        heights = [bits_per_parameter(runs) for runs in groups.values()]
        bars = axes.bar(list(groups), heights, color=[_shade(groups, name) for name in groups])
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axes.tick_params(axis="x", rotation=30)
    # a single size of table makes no curve
    if len({runs[0]["rows"] for runs in groups.values()} - {0}) > 1:
        written.append("facts_by_rows.png")
        with _picture(output / written[-1], "rows of the value table", "facts known") as axes:
            _by_rows(axes, groups)
    if all("losses" in run for runs in groups.values() for run in runs):
        written.append("loss_by_tokens.png")
        with _picture(output / written[-1], "tokens trained on", "training loss") as axes:
            axes.xaxis.set_major_formatter(EngFormatter())
            for name, (run, *_) in groups.items():
                losses, last = run["losses"], tokens_at(results, run["iterations"])
                places = [last * (place + 1) / len(losses) for place in range(len(losses))]
                axes.plot(places, losses, label=name, color=_shade(groups, name))
    groups = {name: runs for name, runs in groups.items() if all(run["seconds"] for run in runs)}
    on_gpu, dense = results["scale"]["device"] == "gpu", groups.get("dense", [])
    if (on_gpu and groups) or dense:
        # on a CPU in units of what dense took for all of it
        unit = 1.0 if on_gpu else mean(run["seconds"][-1] for run in dense)
        label = "training time, dense = 1 (CPU, a ratio within this experiment)"
        label = "seconds of training" if on_gpu else label
        written.append("facts_by_time.png")
        with _picture(output / written[-1], label, "facts known") as axes:
            for name, runs in groups.items():
                seconds = zip(*(run["seconds"] for run in runs), strict=True)
                _line(axes, groups, name, [mean(at) / unit for at in seconds])
    return written


@contextmanager
def _picture(path: Path, x: str, y: str) -> Iterator[Axes]:
    figure, axes = plt.subplots(figsize=(7.5, 4.8), dpi=150, layout="constrained")
    yield axes
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)
    plt.close(figure)


def _by_rows(axes: Axes, groups: Groups) -> None:
    """Memories at their rows; models without a table as lines across."""
    grown = [runs for runs in groups.values() if runs[0]["family"] == "memory+"]
    grown.sort(key=lambda runs: runs[0]["rows"])
    rows = [runs[0]["rows"] for runs in grown]
    style: dict[str, Any] = {"color": COLORS["memory+"], "marker": "o"}
    if grown:
        _points(axes, rows, map(known, grown), label="memory+", **style)
        unseen = [[run["corpus"]["unseen"] for run in runs] for runs in grown]
        style |= {"linestyle": "--", "alpha": 0.6, "label": "memory+, asked in unseen words"}
        _points(axes, rows, unseen, **style)
    for name, runs in groups.items():
        family, size = runs[0]["family"], runs[0]["rows"]
        style = {"color": COLORS[family], "label": name}
        if size and family != "memory+":
            _points(axes, [size], [known(runs)], linestyle="none", marker="D", **style)
        elif not size:
            axes.axhline(mean(known(runs)), linestyle=LINES[family], **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows or sorted({runs[0]["rows"] for runs in groups.values()} - {0}))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.minorticks_off()


def _shade(groups: Groups, name: str) -> Any:
    """The color of a model's family; of Memory+, the more rows, the darker."""
    first = groups[name][0]
    if first["family"] != "memory+":
        return COLORS[first["family"]]
    sizes = sorted(runs[0]["rows"] for runs in groups.values() if runs[0]["family"] == "memory+")
    return plt.get_cmap("Blues")(0.35 + 0.65 * (sizes.index(first["rows"]) + 1) / len(sizes))


def _line(axes: Axes, groups: Groups, name: str, places: Sequence[float]) -> None:
    """Facts known from the start on, at these places of the probed points."""
    runs, size = groups[name], groups[name][0]["rows"]
    facts = zip(*([0.0, *run["corpus"]["facts"]] for run in runs), strict=True)
    style = {
        "color": _shade(groups, name),
        "marker": MARKERS[size.bit_length() // 2 % len(MARKERS)] if size else "x",
        "linestyle": "-" if size else LINES[runs[0]["family"]],
    }
    _points(axes, [0, *places], facts, label=name, capsize=2, **style)


def _points(
    axes: Axes, places: Any, values: Iterable[Sequence[float]], capsize: int = 3, **style: Any
) -> None:
    """The mean over the seeds at every place, and its deviation."""
    found = [*map(list, values)]
    errors = [stdev(at) if len(at) > 1 else 0.0 for at in found]
    axes.errorbar(places, [mean(at) for at in found], errors, capsize=capsize, **style)
