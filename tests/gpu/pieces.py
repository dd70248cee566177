"""Part: compares passes in pieces with passes in one piece, on two NCCL ranks on one GPU.

Tables of 4,096 rows of 256 bf16 numbers, over both ranks by rows (with either wire) and by columns,
take turns in 200 steps on random lookups. There are not 200 steps of each, as ranks that share a
GPU take turns on it: a collective may take milliseconds, and a step of four pieces beside one piece
needs about 25. Four pieces must read the bits that one piece reads, with the same gradients of
weights, and gradients of the table that differ by rounding only. All bits, those of the gradients
of tables included, must be the same with CUDA_LAUNCH_BLOCKING on, where nothing overlaps, and off.
Pieces must not let the host wait for the device more often. In a dry run the ranks use gloo.

Then the cost of pieces: milliseconds of a forward and a backward of 8192 tokens a rank with 128
lookups each, in a table of 1 M rows of width 1024. One rank exchanges nothing, so that pieces can
hide nothing. Two ranks exchange over the loopback interface, which is slower than any real link.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megamem.parallel.memory_group import MemoryGroup
from tests.gpu import report
from tests.gpu.layer import Sizes
from tests.gpu.pieces_ranks import ONE_RANK, PIECES, RANKS, Task, as_words, cost
from tests.gpu.training_runs import Run, launch

STEPS, REPEATS = 200, 5
TIMEOUT = 55.0
# of the largest number of a table's gradient: a row sums about 16 products in fp32
ALLOWED = 1e-5
BLOCKING, FREE = "CUDA_LAUNCH_BLOCKING=1", "CUDA_LAUNCH_BLOCKING=0"
ENVIRONMENTS = {
    BLOCKING: {"CUDA_LAUNCH_BLOCKING": "1"},
    # with one hardware queue, as Megatron wants it for tensor parallelism, less would overlap
    FREE: {"CUDA_LAUNCH_BLOCKING": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "8"},
}


def run(found: report.Report) -> None:
    """Compare passes in pieces with passes in one piece."""
    folder = found.out / "pieces"
    folder.mkdir(parents=True, exist_ok=True)
    problems, summary = _bits(found, folder)
    costs = cost(cost_sizes(found), ONE_RANK, MemoryGroup(), 0, _repeats(found), found.device)
    if not found.dry_run:
        # for the tables of the two ranks
        torch.cuda.empty_cache()
    rows, failure = _launched(found, folder, "cost", {})
    for row in (*costs, *rows):
        found.add(**{name: _rounded(value) for name, value in row.items()})
    problems += [failure] if failure else []
    if not found.dry_run:
        summary += f"; {cost_summary([*costs, *rows])}"
    found.finish(not problems, "; ".join([summary, *problems]))


def bits_sizes(found: report.Report) -> Sizes:
    """The sizes of the steps."""
    return Sizes(
        tokens=found.divided(256, least=12),
        hidden=found.divided(256, least=32),
        num_keys=found.divided(64, least=8),
        heads=4,
        topk=found.divided(32, least=2),
    )


def cost_sizes(found: report.Report) -> Sizes:
    """The sizes at which times are measured."""
    return Sizes(
        tokens=found.divided(8192, least=16),
        hidden=found.divided(1024, least=64),
        num_keys=found.divided(1024, least=16),
        heads=4,
        topk=found.divided(32, least=4),
    )


def _repeats(found: report.Report) -> int:
    return 1 if found.dry_run else REPEATS


def _launched(
    found: report.Report, folder: Path, job: str, environment: dict[str, str]
) -> tuple[list[dict[str, Any]], str]:
    """Run a job on two ranks; return the rows of both, and why it failed."""
    name = " ".join((job, *(f"{key}={value}" for key, value in environment.items())))
    sizes = bits_sizes(found) if job == "bits" else cost_sizes(found)
    repeats = found.divided(STEPS, least=6) if job == "bits" else _repeats(found)
    out = folder / "".join(c if c.isalnum() else "_" for c in name)
    paths = [Path(f"{out}-{rank}.json") for rank in range(RANKS)]
    for path in paths:
        path.unlink(missing_ok=True)
    task = Task(job, vars(sizes), repeats, str(out), found.dry_run)
    module = "tests.gpu.pieces_ranks"
    wanted = Run(name, RANKS, as_words(task), module, environment, script=None)
    log = launch(wanted, folder, TIMEOUT * (8 if found.dry_run else 1))
    if log.failure:
        return [], log.failure
    return [row for path in paths for row in json.loads(path.read_text())], ""


def _bits(found: report.Report, folder: Path) -> tuple[list[str], str]:
    """Add the rows of all steps; return problems and a summary."""
    # ranks that share the GPU with those of the other run are late in another way in each step
    with ThreadPoolExecutor(1 if found.dry_run else len(ENVIRONMENTS)) as pool:
        begun = {
            name: pool.submit(_launched, found, folder, "bits", environment)
            for name, environment in ENVIRONMENTS.items()
        }
    done = {name: future.result() for name, future in begun.items()}
    problems = [failure for _, failure in done.values() if failure]
    rows = {name: rows for name, (rows, _) in done.items()}
    for name, those in rows.items():
        for row in those:
            failure = failure_of(row, waits_count=not found.dry_run)
            problems += [f"{failure}, {name}"] if failure else []
            found.add(run=name, **row, ok=not failure, failure=failure)
    if any(failure for _, failure in done.values()):
        return problems, f"{PIECES} pieces were not compared with 1 in every run"
    problems += changed(rows[BLOCKING], rows[FREE])
    every = [row for those in rows.values() for row in those]
    apart = max(row["table_gradient_apart"] for row in every)
    steps = sum(row["steps"] for row in rows[FREE]) // RANKS
    summary = (
        f"{PIECES} pieces against 1 in {steps} steps, with CUDA_LAUNCH_BLOCKING on and off: "
        f"gradients of tables differ by at most {apart:.1e}"
    )
    return problems, summary if problems else f"{summary}, nothing else by a bit"


def failure_of(row: dict[str, Any], waits_count: bool) -> str:
    """Why the steps of a rank are wrong, in one line; empty if they are right.

    Args:
        row: of tests.gpu.pieces_ranks.bits().
        waits_count: whether host synchronisations count; in a dry run plain torch's ops make some.
    """
    where = f"{row['case']}, rank {row['rank']}"
    for what, steps in row["unequal_steps"].items():
        first = f"first in step {steps[0] + 1}"
        return f"{where}: {PIECES} pieces give other {what} in {len(steps)} steps, {first}"
    # not the other way round, as NaN is wrong
    if not row["table_gradient_apart"] <= ALLOWED:
        return f"{where}: gradients of tables differ by {row['table_gradient_apart']:.1e}"
    if not row["finite"] or row["moved"] < 0.5:
        return f"{where}: the table is not trained, {row['moved']:.0%} of its numbers changed"
    one, several = (row[f"waits_in_{pieces}"] for pieces in (1, PIECES))
    copies = [waits["copies"] for waits in (one, several)]
    if copies != [int(row["routed"])] * 2:
        return f"{where}: the host waits for {copies} copies with 1 and {PIECES} pieces"
    if waits_count and several["syncs"] > one["syncs"]:
        return f"{where}: {PIECES} pieces synchronise {several['syncs']} times, 1 {one['syncs']}"
    return ""


def changed(blocking: list[dict[str, Any]], free: list[dict[str, Any]]) -> list[str]:
    """The cases and ranks whose bits depend on CUDA_LAUNCH_BLOCKING."""
    return [
        f"{one['case']}, rank {one['rank']}: bits depend on CUDA_LAUNCH_BLOCKING"
        for one, other in zip(blocking, free, strict=True)
        if one["bits"] != other["bits"]
    ]


def cost_summary(rows: list[dict[str, Any]]) -> str:
    """The times of one piece, and the ratios of others, of rank 0."""
    parts: dict[str, str] = {}
    for row in rows:
        if row["rank"]:
            continue
        said = f"{row['pieces']} pieces {row['ratio']:.2f}x"
        if row["pieces"] == 1:
            said = f"{row['case']} {row['ms']:.3g} ms"
        parts[row["case"]] = ", ".join(filter(None, (parts.get(row["case"]), said)))
    return "; ".join(parts.values())


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(report.main("pieces", run))
