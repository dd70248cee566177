"""Do memory layers learn more facts than dense ones for the same FLOPs? Trains, asks, compares.

    python examples/facts/compare.py --scale cpu --output runs/compare-cpu --minutes 10

builds a corpus, sweeps learning rates, trains every model through Megatron's own loop at equal
FLOPs, tokens and data order, asks each of them at several points of training, and leaves
results.json, results.md and plots in the output folder. The same command goes on where it stopped.
"""

import argparse
import fcntl
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from corpus import built
from experiment import report
from experiment.plan import SCALES, Plan, Run, Scale, divided, unique, words
from experiment.runs import OneProcessRunner, RunFailed, Runner, best_rates
from tables import make_console

PARTS = ("main", "ablations", "continual")
# what --only has beside them: before them, and behind
STAGES = ("corpus", "sweep", "report")
OUT_OF_TIME = 3


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="durations: " + "; ".join(f"{s.name} {s.duration}" for s in SCALES.values()),
    )
    parser.add_argument("--scale", choices=SCALES, required=True, help="how large it all is")
    parser.add_argument("--output", type=Path, help="folder (default: runs/compare-SCALE)")
    only = "one part and what it needs; or build the corpus, sweep or report, and no more"
    parser.add_argument("--only", choices=(*PARTS, *STAGES), help=only)
    parser.add_argument("--model", help="of the main part, this model alone")
    tried = "divide the sizes of the scale by this, and try it on the CPU"
    parser.add_argument("--divide", type=int, help=tried)
    parser.add_argument("--minutes", type=float, help="then save and stop")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: 2 on CPU, 1 on GPU)")
    parser.add_argument("--ablation-seeds", type=int, help="seeds of each ablation (default: 1)")
    untimed = "keep no times, as the machine is busy with other work"
    parser.add_argument("--untimed", action="store_true", help=untimed)
    parser.add_argument("--list", action="store_true", help="print the plan and run nothing")
    options = parser.parse_args(argv)
    for name in ("minutes", "jobs", "divide"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} {value:g}: choose more than 0")
    scale, few = SCALES[options.scale], options.ablation_seeds
    if options.divide:
        scale = divided(options.scale, options.divide)
    options.output = options.output or Path("runs") / f"compare-{scale.name.replace(' ', '-')}"
    idle = options.list or options.only in ("corpus", "report")
    if scale.device == "gpu" and not idle and not _has_gpu():
        parser.error(
            f"--scale {scale.name}: there is no GPU here; --divide 64 tries it on the CPU, with "
            "sizes divided"
        )
    names = [model.name for model in scale.models]
    if options.model not in (None, *names):
        parser.error(f"--model {options.model}: scale {scale.name} has {', '.join(names)}")
    if options.only in scale.left_out:
        rest = " or ".join(part for part in PARTS if part not in scale.left_out)
        parser.error(f"--only {options.only}: scale {scale.name} has nothing for it; choose {rest}")
    seeds = len(scale.seeds)
    if few is not None and not 0 < few <= seeds:
        parser.error(f"--ablation-seeds {few}: scale {scale.name} has {seeds}; choose 1 to {seeds}")
    options.scale = replace(scale, ablation_seeds=few or scale.ablation_seeds)
    return options


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def list_plan(scale: Scale, parts: Sequence[str], console: Any) -> None:
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


def carry_out(
    plan: Plan, runner: Runner, parts: Sequence[str], planned: list[Run], model: str | None = None
) -> bool:
    """Train and ask everything, adding it to `planned` first; return False where time ran out.

    Args:
        parts: those to carry out; with none of them, only what is swept for them all.
        model: of the main part, the only one.
    """
    scale, sweep = plan.scale, plan.sweep(parts or PARTS)
    planned += sweep
    if not runner.execute("sweep of learning rates", sweep):
        return False
    best = best_rates(sweep, runner.records(sweep), by_loss=bool(scale.short))
    for part in (part for part in parts if part not in scale.left_out):
        if part == "continual":
            from build_corpus import build_new_facts

            build_new_facts(runner.output, scale.corpus, scale.new["facts"], runner.console)
        runs = plan.part(part, best)
        planned += runs
        wanted = [run for run in unique(runs) if model in (None, run.model.name)]
        if not runner.execute(part, wanted):
            return False
    return True


def get_corpus(folder: Path, scale: Scale, console: Any) -> dict[str, Any]:
    """What is counted of the corpus in a folder, which is built where it is not there.

    Raises:
        ModuleNotFoundError: a package that only the building needs is not installed.
    """
    # where nothing can be built it was carried there, made by other releases of the packages
    if scale.in_one_process and (found := built(folder, scale.corpus)):
        return found
    from build_corpus import build

    return build(folder, scale.corpus, console)[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Go through the parts, then report whatever is finished; return the exit status."""
    options = parse_args(argv)
    started, console = time.monotonic(), make_console()
    scale, output = options.scale, options.output.absolute()
    parts = list(PARTS)
    if options.only in (*PARTS, "sweep"):
        parts = [part for part in PARTS if part == options.only]
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
    try:
        corpus = get_corpus(output / "corpus", scale, console)
    except ModuleNotFoundError as error:
        words = shlex.join([*(sys.argv[1:] if argv is None else argv), "--only", "corpus"])
        console.print(
            f"{error.name} is not installed, with which the corpus is built; carry {output}/corpus "
            f"here from a machine that has it: compare.py {words}"
        )
        return 2
    if options.only == "corpus":
        return 0
    minutes = 0.0 if options.only == "report" else options.minutes or float("inf")
    jobs = options.jobs or (1 if scale.device == "gpu" else min(2, os.cpu_count() or 1))
    kind = OneProcessRunner if scale.in_one_process else Runner
    deadline = started + 60 * minutes
    runner = kind(output, scale.device, jobs, deadline, console, timed=not options.untimed)
    status, planned = 0, list[Run]()
    try:
        plan = Plan(scale, corpus["vocab_size"])
        if not carry_out(plan, runner, parts, planned, options.model) and minutes:
            status = OUT_OF_TIME
            console.print(f"{minutes:g} minutes are over; the same command goes on")
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        console.print("stopped; the same command goes on", style="yellow")
    except RunFailed as error:
        status = 1
        console.print(str(error), style="red", markup=False, soft_wrap=True)
    results = report.collect(scale, corpus, planned, runner.records(planned))
    report.write(results, output)
    written = ["results.json", "results.md"]
    if find_spec("matplotlib"):
        from experiment import plots

        written += plots.draw(results, output)
    console.print(*(sheet.table() for sheet in report.sheets(results)))
    console.print(f"written to {output}: {', '.join(written)}", soft_wrap=True, highlight=False)
    return status


if __name__ == "__main__":
    sys.exit(main())
