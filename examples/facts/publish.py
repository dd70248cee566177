"""Puts the results of a finished experiment where readers look for them.

    python examples/facts/publish.py runs/compare-cpu

copies results.json and the plots into examples/facts/results/SCALE and makes, of all that is there,
the tables in examples/facts/README.md. Nothing in them is written by hand.

    python examples/facts/publish.py runs/compare-cpu --restore cpu

does the reverse: the published runs of a scale that its plan still has are in the folder as
finished ones, so that compare.py trains only what is new in the plan. Checkpoints are not restored.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from compare import PARTS
from experiment.plan import SCALES, Plan, unique
from experiment.report import MADE_WITH, Results, known, markdown, runs_of, spread, tokens_at
from experiment.runs import best_rates
from tables import Sheet

from megamem.tools.markers import rewrite

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE / "README.md"
# of scales, as readers should meet them
ORDER = ("cpu", "long", "gpu", "h100")


def headline(told: Sequence[Results]) -> Sheet:
    """What each model knows, mean of the seeds, with two columns for each of the results."""
    columns = ["model", "FLOPs per token, dense = 1", "parameters"]
    # models of one name may differ in size between scales
    rows: dict[tuple[str, str, str], list[str]] = {}
    for place, results in enumerate(told):
        trained = tokens_at(results, results["scale"]["flags"]["train_iters"]) / 1e6
        of = f"of {results['corpus']['facts']:,}, after {trained:.1f} M tokens"
        columns += [f"facts known, {of}", "dense = 1"]
        groups = runs_of(results, "main")
        dense = groups["dense"]
        for name, runs in groups.items():
            cost = f"{runs[0]['flops_per_token'] / dense[0]['flops_per_token']:.2f}"
            model = (name, cost, f"{runs[0]['parameters'] / 1e6:,.1f} M")
            ratio = f"**{mean(known(runs)) / mean(known(dense)):.1f}**"
            cells = rows.setdefault(model, [""] * 2 * len(told))
            cells[2 * place : 2 * place + 2] = spread(known(runs)), ratio
    lines = [[*model, *cells] for model, cells in rows.items()]
    return Sheet("Facts known at equal tokens", columns, lines)


def first_screen(told: Sequence[Results]) -> str:
    """The first table of the page, and what was measured how: seeds, device, commit, command."""
    lines = [headline(told).markdown()]
    for results in told:
        seeds, groups = len(results["scale"]["seeds"]), runs_of(results, "main")
        main = (run for runs in groups.values() for run in runs)
        fewer = [f"{len(runs)} of {name}" for name, runs in groups.items() if len(runs) < seeds]
        named = f"{seeds} {'seeds' if seeds > 1 else 'seed'}"
        named += f" ({', '.join(fewer)})" if fewer else ""
        told_of = (
            f"\n{results['corpus']['facts']:,} facts: {named}, "
            "of which every model reads the same tokens in the same order",
            f"{results['corpus']['bits']:,.0f} bits of facts",
            ", ".join(results["made_with"]["device"]),
            f"commit {', '.join(sorted({run['commit'] for run in main}))}",
            f"`{command(results)}`.",
        )
        lines.append("; ".join(told_of))
    return "\n".join(lines)


def command(results: Results) -> str:
    """What makes these results, but for the folder."""
    scale = results["scale"]
    seeds = f" --ablation-seeds {n}" if (n := scale["ablation_seeds"]) > 1 else ""
    return f"python examples/facts/compare.py --scale {scale['name']}{seeds}"


def published() -> dict[str, Results]:
    """Scale -> its results, of all that are in the folder beside this file."""
    paths = {name: RESULTS / name / "results.json" for name in ORDER}
    return {name: json.loads(p.read_text()) for name, p in paths.items() if p.is_file()}


def page(told: Mapping[str, Results]) -> str:
    """The page as it should be."""
    text = PAGE.read_text()
    for name, results in told.items():
        # without the title, below a heading of the third level
        _, _, tables = markdown(results).rstrip().partition("\n\n")
        text = rewrite(text, f"results of {name}", tables.replace("\n## ", "\n#### "))
    return rewrite(text, "facts", first_screen(list(told.values())))


def restore(results: Results, output: Path) -> list[str]:
    """Write the record of every run that the plan of the scale still has; return their keys.

    What results.json leaves out is in the plan, or the same for all of its runs. A record that is
    there stays as it is.

    Raises:
        ValueError: the runs were made with several releases or devices, and which was whose is not
            in the results.
    """
    made_with = {name: results["made_with"][name] for name in MADE_WITH if name != "commit"}
    if several := [name for name, found in made_with.items() if len(found) > 1]:
        raise ValueError(f"the runs of {results['scale']['name']} differ in {', '.join(several)}")
    scale = SCALES[results["scale"]["name"]]
    scale = replace(scale, ablation_seeds=results["scale"]["ablation_seeds"])
    plan = Plan(scale, results["corpus"]["vocab_size"])
    told = results["runs"]
    # families that are new have nothing in the results, so any of their rates will do
    sweep = plan.sweep(PARTS)
    tried = [run for run in sweep if run.key in told]
    best = {family: grid[0] for family, grid in scale.sweep.items()} | best_rates(tried, told)
    every = unique([*sweep, *(run for part in PARTS for run in plan.part(part, best))])
    found = [run for run in every if run.key in told]
    for run in found:
        record = {**told[run.key], "flags": run.flags, "start": run.start, "loss": None}
        record |= {name: value for name, (value,) in made_with.items()}
        path = output / "runs" / run.key / "record.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            path.write_text(json.dumps(record, indent=1) + "\n")
    return [run.key for run in found]


def main(argv: Sequence[str] | None = None) -> int:
    """Copy and rewrite, or restore; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="what compare.py was given as --output")
    restored = "scale whose published runs are put into that folder, as finished ones"
    parser.add_argument("--restore", choices=published(), help=restored)
    options = parser.parse_args(argv)
    source: Path = options.output
    if options.restore:
        results = published()[options.restore]
        print(f"{source}: {len(restore(results, source))} of {len(results['runs'])} runs restored")
        return 0
    if not (source / "results.json").is_file():
        print(f"{source}: no results.json; run compare.py --output {source} first", file=sys.stderr)
        return 2
    results = json.loads((source / "results.json").read_text())
    if results["waiting"]:
        again = f"{command(results)} --output {source}"
        print(f"{source}: {results['waiting']} runs are not finished; {again}", file=sys.stderr)
        return 2
    target = RESULTS / results["scale"]["name"]
    target.mkdir(parents=True, exist_ok=True)
    for path in (source / "results.json", *sorted(source.glob("*.png"))):
        shutil.copyfile(path, target / path.name)
    PAGE.write_text(page(published()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
