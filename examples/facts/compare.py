"""Do memory layers learn more facts than dense ones for the same FLOPs? Trains, asks, compares.

    python examples/facts/compare.py --scale cpu --output runs/compare-cpu --minutes 10

builds a corpus, sweeps learning rates, trains every model through Megatron's own loop at equal
FLOPs, tokens and data order, asks each of them at several points of training, and leaves
results.json, results.md and plots in the output folder. The same command goes on where it stopped.
"""

import argparse
import fcntl
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from build_corpus import build, build_new_facts
from experiment import plots, report
from experiment.plan import SCALES, Plan, Run, Scale, unique, words
from experiment.runs import RunFailed, Runner, best_rates
from rich.console import Console

PARTS = ("main", "ablations", "continual")
OUT_OF_TIME = 3


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="durations: " + "; ".join(f"{s.name} {s.duration}" for s in SCALES.values()),
    )
    parser.add_argument("--scale", choices=SCALES, required=True, help="how large it all is")
    parser.add_argument("--output", type=Path, help="folder (default: runs/compare-SCALE)")
    parser.add_argument("--only", choices=PARTS, help="one part, and what it needs")
    parser.add_argument("--minutes", type=float, help="then save and stop")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: 2 on CPU, 1 on GPU)")
    parser.add_argument("--ablation-seeds", type=int, help="seeds of each ablation (default: 1)")
    parser.add_argument("--list", action="store_true", help="print the plan and run nothing")
    options = parser.parse_args(argv)
    options.output = options.output or Path("runs") / f"compare-{options.scale}"
    for name, value in (("--minutes", options.minutes), ("--jobs", options.jobs)):
        if value is not None and value <= 0:
            parser.error(f"{name} {value:g}: choose more than 0")
    scale, few = SCALES[options.scale], options.ablation_seeds
    if options.only in scale.left_out:
        rest = " or ".join(part for part in PARTS if part not in scale.left_out)
        parser.error(f"--only {options.only}: scale {scale.name} has nothing for it; choose {rest}")
    seeds = len(scale.seeds)
    if few is not None and not 0 < few <= seeds:
        parser.error(f"--ablation-seeds {few}: scale {scale.name} has {seeds}; choose 1 to {seeds}")
    options.scale = replace(scale, ablation_seeds=few or scale.ablation_seeds)
    return options


def list_plan(scale: Scale, parts: Sequence[str], console: Console) -> None:
    """Every run with its flags, expected FLOPs and parameters, as before the sweep is done."""
    plan = Plan(scale, scale.corpus.vocab_size)
    best = {family: grid[0] for family, grid in scale.sweep.items()}
    after = (run for part in parts for run in plan.part(part, best))
    runs = unique([*plan.sweep(parts), *after])
    for run in runs:
        tokens = run.iterations * run.flags["global_batch_size"] * run.flags["seq_length"]
        counts = f"{run.parameters:,} parameters, {run.table:,} of them in tables"
        counts += f"; {run.flops:,} FLOPs a token, {tokens:,} tokens"
        lines = f"{run.part}: {run.name}; {counts}\n  {run.key}: {' '.join(words(run.flags))}"
        console.print(lines, soft_wrap=True, markup=False, highlight=False)
    note = "What follows the sweep is shown at its first rates and will take the best ones."
    console.print(f"{len(runs)} runs, {scale.duration}. {note}", soft_wrap=True)


def carry_out(plan: Plan, runner: Runner, parts: Sequence[str], planned: list[Run]) -> bool:
    """Train and ask everything, adding it to `planned` first; return False where time ran out."""
    scale, sweep = plan.scale, plan.sweep(parts)
    planned += sweep
    if not runner.execute("sweep of learning rates", sweep):
        return False
    best = best_rates(sweep, runner.records(sweep))
    for part in (part for part in parts if part not in scale.left_out):
        if part == "continual":
            build_new_facts(runner.output, scale.corpus, scale.new["facts"], runner.console)
        runs = plan.part(part, best)
        planned += runs
        if not runner.execute(part, unique(runs)):
            return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Go through the parts, then report whatever is finished; return the exit status."""
    options = parse_args(argv)
    started, console = time.monotonic(), Console()
    scale, output = options.scale, options.output.absolute()
    parts = [options.only] if options.only else list(PARTS)
    if options.list:
        list_plan(scale, parts, console)
        return 0
    output.mkdir(parents=True, exist_ok=True)
    # held until this process ends, however it does
    lock = (output / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        console.print(f"--output {output}: another compare.py is at work there", style="red")
        return 2
    # stops as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    corpus, _ = build(output / "corpus", scale.corpus, console)
    deadline = started + 60 * options.minutes if options.minutes else float("inf")
    jobs = options.jobs or (1 if scale.device == "gpu" else min(2, os.cpu_count() or 1))
    runner = Runner(output, scale.device, jobs, deadline, console)
    status, planned = 0, list[Run]()
    try:
        if not carry_out(Plan(scale, corpus["vocab_size"]), runner, parts, planned):
            status = OUT_OF_TIME
            console.print(f"{options.minutes:g} minutes are over; the same command goes on")
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        console.print("stopped; the same command goes on", style="yellow")
    except RunFailed as error:
        status = 1
        console.print(str(error), style="red", markup=False, soft_wrap=True)
    results = report.collect(scale, corpus, planned, runner.records(planned))
    report.write(results, output)
    written = ["results.json", "results.md", *plots.draw(results, output)]
    console.print(*(sheet.table() for sheet in report.sheets(results)))
    console.print(f"written to {output}: {', '.join(written)}", soft_wrap=True, highlight=False)
    return status


if __name__ == "__main__":
    sys.exit(main())
