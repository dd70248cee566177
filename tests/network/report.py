"""The table and the plot of what was measured, beside what was predicted."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.network.cases import HOSTS, RANKS_PER_HOST, Case, Sizes
from tests.network.prediction import Rates, seconds, way
from tests.network.training import Training

WAYS = ("forward", "backward")
BYTES_WITHIN, RATIO_WITHIN = 0.10, 0.25


@dataclass(frozen=True)
class Row:
    """One case: forward and backward, measured and predicted."""

    case: Case
    across: dict[str, tuple[float, float]]
    """Way -> bytes that a host has sent to others."""
    inside: dict[str, tuple[float, float]]
    """Way -> bytes that stayed inside a host."""
    seconds: dict[str, tuple[float, float]]
    """Way -> seconds of the exchange: those of the pass, without those in which rows are read."""

    @property
    def exchange(self) -> tuple[float, float]:
        """Seconds of forward and backward."""
        return _sum(self.seconds)


def _sum(of_ways: dict[str, tuple[float, float]]) -> tuple[float, float]:
    measured, predicted = zip(*of_ways.values(), strict=True)
    return sum(measured), sum(predicted)


def rows_of(content: dict[str, Any]) -> list[Row]:
    """Return the rows of measured.json, with the prediction for the rates that it holds."""
    sizes, rates = Sizes(**content["sizes"]), Rates(**content["rates"])
    rows = []
    for found in content["rows"]:
        case = Case(**found["case"] | {"grid": tuple(found["case"]["grid"])})
        hops, predicted = (
            way(case, sizes),
            dict(zip(WAYS, seconds(case, sizes, rates), strict=True)),
        )
        rows.append(
            Row(
                case,
                {to: (found[to]["across"], hops.host_bytes("across", to)) for to in WAYS},
                {to: (found[to]["inside"], hops.host_bytes("inside", to)) for to in WAYS},
                {
                    to: (
                        found[to]["seconds"] - sizes.bag_seconds,
                        predicted[to] - sizes.bag_seconds,
                    )
                    for to in WAYS
                },
            )
        )
    return rows


def problems(rows: list[Row], trainings: list[Training]) -> Iterator[str]:
    """Yield what is not as predicted, and which training differs from one process."""
    for row in rows:
        name = f"{row.case.name} {row.case.grid_text}, pieces {row.case.pieces}, {row.case.wire}"
        for link, of_ways in (("to other hosts", row.across), ("inside a host", row.inside)):
            for to, (measured, formula) in of_ways.items():
                if abs(measured / formula - 1) > BYTES_WITHIN:
                    yield f"{name}: {measured:.0f} bytes {link} {to}, by the formula {formula:.0f}"
        measured, predicted = ratios(row, rows[0])
        if abs(measured / predicted - 1) > RATIO_WITHIN:
            yield f"{name}: takes {measured:.2f} of the first row's time, predicted {predicted:.2f}"
    for training in trainings:
        if training.problem:
            yield f"training, {training.name}: {training.problem}"


def ratios(row: Row, first: Row) -> tuple[float, float]:
    """Return the time of a row over that of the first, measured and predicted."""
    return row.exchange[0] / first.exchange[0], row.exchange[1] / first.exchange[1]


def table(content: dict[str, Any], rows: list[Row], trainings: list[Training], mbit: int) -> str:
    """Return all results as text."""
    sizes, rates = Sizes(**content["sizes"]), content["rates"]["bytes_per_second"]
    lines = [
        f"{HOSTS} hosts x {RANKS_PER_HOST} ranks (gloo), {mbit} Mbit/s between hosts; "
        f"{sizes.tokens} tokens a rank, {sizes.lookups} lookups, V {sizes.width}, "
        f"{ {2: 'bf16', 4: 'fp32'}[sizes.element] } rows, fp32 weights",
        "MB that a host sends in a forward and a backward: by the counters of its devices / by the "
        "formula",
        f"seconds of both without the {2 * sizes.bag_seconds:g} that reading rows takes: measured "
        "/ predicted from these MB/s of a host:",
        "; ".join(f"{key} {rate / 1e6:.1f}" for key, rate in rates.items()),
        "",
        f"{'layout':<8}{'grid':<10}{'pieces':>6}  {'lookups':<10}{'MB to other hosts':^22}"
        f"{'MB inside a host':^22}{'seconds':^20}{'of the first row':^22}",
    ]
    for row in rows:
        case = row.case
        cells = [_pair(_sum(row.across), 1e6, 2), _pair(_sum(row.inside), 1e6, 2)]
        cells.append(_pair(row.exchange, 1, 2).rjust(20))
        cells.append(_pair(ratios(row, rows[0]), 1, 2))
        lines.append(
            f"{case.name:<8}{case.grid_text:<10}{case.pieces:>6}  {case.wire:<10}"
            f"{cells[0]:>22}{cells[1]:>22}{cells[2]}{cells[3]:>22}"
        )
    if trainings:
        lines += ["", f"{'training':<36}{'seconds':>8}   losses"]
    for training in trainings:
        losses = " ".join(f"{loss:.7g}" for loss, _ in training.steps)
        lines.append(f"{training.name:<36}{training.seconds:>8.0f}   {losses}")
    return "\n".join(lines)


def _pair(both: tuple[float, float], unit: float, digits: int) -> str:
    measured, predicted = both
    percent = 100 * (measured / predicted - 1)
    return f"{measured / unit:.{digits}f} / {predicted / unit:.{digits}f} {percent:+.0f}%"


def plot(rows: list[Row], mbit: int, path: Path) -> None:
    """Write a PNG: seconds and bytes of every case, measured and predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, sent) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    names = [
        f"{row.case.name}\n{row.case.pieces} piece{'s' * (row.case.pieces > 1)}"
        + "\nall-gather" * (row.case.wire == "allgather")
        for row in rows
    ]
    at, width = range(len(rows)), 0.4
    for side, label in ((0, "measured"), (1, "predicted")):
        places = [place + (side - 0.5) * width for place in at]
        ways = [[row.seconds[to][side] for row in rows] for to in WAYS]
        bottom = [0.0] * len(rows)
        for to, heights in zip(WAYS, ways, strict=True):
            shade = {"forward": 1.0, "backward": 0.6}[to]
            color = f"C{side}"
            times.bar(
                places, heights, width, bottom, color=color, alpha=shade, label=f"{label}, {to}"
            )
            bottom = [one + other for one, other in zip(bottom, heights, strict=True)]
        heights = [_sum(row.across)[side] / 1e6 for row in rows]
        named = {0: "counted", 1: "formula"}[side]
        sent.bar(places, heights, width, color=f"C{side}", label=named)
    times.set(ylabel="seconds of exchange that reading rows does not hide")
    sent.set(ylabel="MB that a host sends to others, forward and backward")
    for axes in (times, sent):
        axes.set_xticks(at, names, fontsize="small")
        axes.legend(fontsize="small")
    figure.suptitle(f"{HOSTS} hosts of {RANKS_PER_HOST} ranks, {mbit} Mbit/s between them")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
