"""A roofline plot of benchmark records."""

from pathlib import Path

from megamem.tools.bench_table import Record


def plot(records: list[Record], path: Path) -> None:
    """Write a PNG: GB/s of every case over the bytes it moves, with the large copy as the roof."""
    # imported here, as only --plot needs matplotlib
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
        axes.axhline(records[0].ceiling_gbps, color="black", linewidth=1, label="large copy")
        axes.set_title(records[0].device)
    axes.set(xscale="log", yscale="log", xlabel="MB read and written", ylabel="GB/s")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)
