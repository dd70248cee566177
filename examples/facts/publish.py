"""Puts the results of a finished experiment where readers look for them.

    python examples/facts/publish.py runs/compare-cpu

copies results.json and the plots into examples/facts/results/SCALE and makes of them the tables in
examples/facts/README.md and on the first screen of README.md. Nothing in these is written by hand.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

# the modules beside this file, wherever it is run from
sys.path.insert(0, str(Path(__file__).parent))

from experiment import report  # noqa: E402
from experiment.records import final  # noqa: E402

from megamem.tools.markers import rewrite  # noqa: E402

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# the file that has it -> the name between its markers
PAGES = {HERE / "README.md": "results", HERE.parents[1] / "README.md": "facts"}


def headline(results: Mapping[str, Any]) -> report.Sheet:
    """What each model knows at the cost of a token, and nothing else; means over the seeds."""
    groups = report.of_group(results, "main")
    facts, dense = results["corpus"]["facts"], groups["dense"]
    yardstick = report.mean_of(dense, "facts")
    rows = []
    for name, runs in groups.items():
        known = [final(run, "question")["facts"] for run in runs]
        rows.append(
            (
                name,
                f"{runs[0]['flops_per_token'] / dense[0]['flops_per_token']:.2f}",
                f"{runs[0]['parameters'] / 1e6:,.1f} M",
                report.spread(known),
                f"**{mean(known) / yardstick:.1f}**",
            )
        )
    known_of = f"facts known, of {facts:,}"
    columns = ("model", "FLOPs per token, dense = 1", "parameters", known_of, "dense = 1")
    return report.Sheet("Facts known at equal tokens", columns, tuple(rows))


def first_screen(results: Mapping[str, Any]) -> str:
    """The table of README.md, and what was measured how."""
    scale, corpus = results["scale"], results["corpus"]
    tokens = scale["iterations"] * scale["batch"] * scale["seq"]
    measured = (
        f"{len(scale['seeds'])} seeds, {tokens / 1e6:.1f} M tokens each, of which every model of a "
        f"seed reads the same in the same order; {corpus['bits']:,.0f} bits of facts; "
        f"{_of(results, 'device')}; commit {_of(results, 'commit')}; "
        f"`{command(results)}`."
    )
    return "\n".join([*report.markdown_table(headline(results)), "", measured])


def command(results: Mapping[str, Any]) -> str:
    """What makes these results, but for the folder."""
    scale = results["scale"]
    seeds = f" --ablation-seeds {n}" if (n := scale["ablation_seeds"]) > 1 else ""
    return f"python examples/facts/compare.py --scale {scale['name']}{seeds}"


def all_tables(results: Mapping[str, Any]) -> str:
    """Everything that results.md has, one level of headings below its title."""
    lines = report.markdown(results).splitlines()[2:]
    return "\n".join(f"#{line}" if line.startswith("## ") else line for line in lines)


def pages(results: Mapping[str, Any]) -> dict[Path, str]:
    """Both pages as they should be."""
    texts = {"results": all_tables(results), "facts": first_screen(results)}
    return {path: rewrite(path.read_text(), name, texts[name]) for path, name in PAGES.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Copy and rewrite; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="what compare.py was given as --output")
    source: Path = parser.parse_args(argv).output
    if not (source / "results.json").is_file():
        print(f"{source}: no results.json; run compare.py --output {source} first", file=sys.stderr)
        return 2
    results = json.loads((source / "results.json").read_text())
    name = results["scale"]["name"]
    if results["waiting"]:
        again = f"{command(results)} --output {source}"
        print(f"{source}: {results['waiting']} runs are not finished; {again}", file=sys.stderr)
        return 2
    target = RESULTS / name
    target.mkdir(parents=True, exist_ok=True)
    for path in (source / "results.json", *sorted(source.glob("*.png"))):
        shutil.copyfile(path, target / path.name)
    for path, text in pages(results).items():
        path.write_text(text)
    return 0


def _of(results: Mapping[str, Any], key: str) -> str:
    """All that the runs of the main table have there."""
    return ", ".join(sorted({run[key] for run in results["runs"] if run["group"] == "main"}))


if __name__ == "__main__":
    sys.exit(main())
