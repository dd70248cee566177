"""A picture of benchmark records under the roof that the memory sets."""

from pathlib import Path

from megamem.tools.bench_table import Record


def plot(records: list[Record], path: Path) -> None:
    """GB/s of every case over the bytes it moves, one colour per op, the copy as the roof."""
    # matplotlib is for who asks for a picture
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for n, op in enumerate(sorted({r.op for r in records})):
        for distribution, marker in (("zipf 1.0", "^"), ("", "o")):
            points = [
                r
                for r in records
                if r.op == op and (r.distribution == "zipf 1.0") == (distribution == "zipf 1.0")
            ]
            axes.scatter(
                [r.bytes / 1e6 for r in points],
                [r.gbps for r in points],
                marker=marker,
                color=f"C{n}",
                label=f"{op} {distribution}".strip() if points else None,
            )
    if records:
        axes.axhline(records[0].ceiling_gbps, color="black", linewidth=1, label="copy")
        axes.set_title(records[0].device)
    axes.set(xscale="log", yscale="log", xlabel="MB that must be moved", ylabel="GB/s")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)
