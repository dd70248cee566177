"""Puts the results of a finished experiment where readers look for them.

    python examples/facts/publish.py runs/compare-cpu

copies results.json and the plots into examples/facts/results/SCALE and makes, of all that is there,
the tables in examples/facts/README.md and the one on the first screen of README.md. Nothing in them
is written by hand.
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
TABLES, FIRST_SCREEN = HERE / "README.md", HERE.parents[1] / "README.md"
# of scales, as readers should meet them
ORDER = ("cpu", "long", "gpu")

Results = Mapping[str, Any]


def headline(told: Sequence[Results]) -> report.Sheet:
    """What each model knows at the cost of a token, and nothing else; means over the seeds.

    Two columns for each of the results; a model that one of them does not have is blank there.
    """
    by_scale = [report.of_group(results, "main") for results in told]
    # models of one name may differ in size between scales
    rows: dict[tuple[str, str, str], list[str]] = {}
    for place, groups in enumerate(by_scale):
        dense = groups["dense"]
        yardstick = report.mean_of(dense, "facts")
        for name, runs in groups.items():
            cost = f"{runs[0]['flops_per_token'] / dense[0]['flops_per_token']:.2f}"
            size = f"{runs[0]['parameters'] / 1e6:,.1f} M"
            row = rows.setdefault((name, cost, size), [name, cost, size, *[""] * 2 * len(told)])
            known = [final(run, "question")["facts"] for run in runs]
            at = 3 + 2 * place
            row[at : at + 2] = report.spread(known), f"**{mean(known) / yardstick:.1f}**"
    columns = ["model", "FLOPs per token, dense = 1", "parameters"]
    for results in told:
        known_of = f"facts known, of {results['corpus']['facts']:,}, after {tokens(results)} tokens"
        columns += [known_of, "dense = 1"]
    title = "Facts known at equal tokens"
    return report.Sheet(title, tuple(columns), tuple(map(tuple, rows.values())))


def first_screen(told: Sequence[Results]) -> str:
    """The table of README.md, and what was measured how."""
    return "\n".join([*report.markdown_table(headline(told)), *map(_measured, told)])


def tokens(results: Results) -> str:
    """That every model was trained on."""
    scale = results["scale"]
    return f"{scale['iterations'] * scale['batch'] * scale['seq'] / 1e6:.1f} M"


def command(results: Results) -> str:
    """What makes these results, but for the folder."""
    scale = results["scale"]
    seeds = f" --ablation-seeds {n}" if (n := scale["ablation_seeds"]) > 1 else ""
    return f"python examples/facts/compare.py --scale {scale['name']}{seeds}"


def all_tables(results: Results) -> str:
    """Everything that results.md has, below a heading of the third level."""
    lines = report.markdown(results).splitlines()[2:]
    return "\n".join(f"##{line}" if line.startswith("## ") else line for line in lines)


def published() -> dict[str, Results]:
    """Scale -> its results, of all that are in the folder beside this file."""
    paths = {name: RESULTS / name / "results.json" for name in ORDER}
    return {name: json.loads(p.read_text()) for name, p in paths.items() if p.is_file()}


def pages(told: Mapping[str, Results]) -> dict[Path, str]:
    """Both pages as they should be."""
    tables = TABLES.read_text()
    for name, results in told.items():
        tables = rewrite(tables, f"results of {name}", all_tables(results))
    first = rewrite(FIRST_SCREEN.read_text(), "facts", first_screen(list(told.values())))
    return {TABLES: tables, FIRST_SCREEN: first}


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
    for path, text in pages(published()).items():
        path.write_text(text)
    return 0


def _measured(results: Results) -> str:
    """One paragraph: seeds, tokens, device, commit, command."""
    seeds = len(results["scale"]["seeds"])
    return (
        f"\n{results['corpus']['facts']:,} facts: {seeds} {'seeds' if seeds > 1 else 'seed'}, of "
        "which every model reads the same tokens in the same order; "
        f"{results['corpus']['bits']:,.0f} bits of facts; {_of(results, 'device')}; "
        f"commit {_of(results, 'commit')}; `{command(results)}`."
    )


def _of(results: Results, key: str) -> str:
    """All that the runs of the main table have there."""
    return ", ".join(sorted({run[key] for run in results["runs"] if run["group"] == "main"}))


if __name__ == "__main__":
    sys.exit(main())
