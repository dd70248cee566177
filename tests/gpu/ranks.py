"""Part: compares two NCCL ranks on one GPU with one process in Megatron's own loop, per layout.

A model of 4 layers of width 256 in fp32, with two memory layers of 65,536 rows, makes six steps. In
a dry run the ranks use gloo.

Tensor-parallel ranks have exactly the losses of one process. Data-parallel ranks sum gradients in
another order, which may decide a lookup with nearly equal scores differently. Losses may then
differ by 1e-5 at the fourth step and 7e-4 at the sixth, as they do between a CPU and a GPU.
Pipeline stages draw other initial weights than one process, so they start from a checkpoint.
Runs that round the weights of lookups to bf16 are compared with one process that rounds them, too.
"""

import math
import os
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from megamem.ops.forms import ENVIRONMENT
from tests.gpu import report
from tests.gpu.training_runs import UNTRIED, Log, Run, launch

STEPS, SAVED_AT = 6, 3
TIMEOUT = 80.0
# an H100 machine has 16 cores, and a rank keeps about one of them busy
CORES_PER_RUN = 2
# allowed difference of losses up to the third step, and after it
CLOSE = (2e-5, 2e-3)
# larger, as bf16 has eight bits of precision, and nearly equal scores may change places
CLOSE_IN_BF16 = (5e-2, 1e-1)
# allowed time from the error line about a lost rank to the end of the process: exit handlers may
# take ten seconds, and NCCL's destructors, which took a minute, must not run
SECONDS_TO_LEAVE = 12.0

TP2 = ("--tensor-model-parallel-size", 2)
PP2 = ("--pipeline-model-parallel-size", 2)
WIDE = ("--memory-group-size", 2)
COLUMN = ("--memory-mode", "column")
ALLTOALL = ("--memory-wire", "alltoall")
ROUNDED = ("--memory-lookup-weights", "bf16")
DISTRIBUTED = ("--use-distributed-optimizer", "--overlap-grad-reduce")


@dataclass(frozen=True)
class Check:
    """A run that must have the losses of another run."""

    name: str
    ranks: int
    flags: tuple[object, ...]
    close: tuple[float, float] = CLOSE
    cpu: bool = False
    forms: str = ""
    """Selects forms of ops, as MEGAMEM_FORMS does."""

    like: str = "one process"
    """Name of the run with the same losses."""


ALONE = Check("one process", 1, ())
ALONE_ROUNDED = Check("one process, lookup weights in bf16", 1, ROUNDED)
LAYOUTS = (
    Check("TP2, allgather", 2, TP2),
    Check("TP2, alltoall", 2, (*TP2, *ALLTOALL)),
    Check("TP2, columns", 2, (*TP2, *COLUMN)),
    Check("DP2, rows over both, distributed optimizer", 2, (*WIDE, *DISTRIBUTED)),
    Check("DP2, rows over both, alltoall", 2, (*WIDE, *ALLTOALL)),
    Check("DP2, columns over both", 2, (*WIDE, *COLUMN)),
    # each rank is a node of its own
    Check(
        "DP2, rows over both nodes, alltoall in 4 pieces",
        2,
        ("--memory-grid", "2x1x1x1", *ALLTOALL, "--memory-pieces", 4),
    ),
    Check(
        "DP2, columns over both nodes, 2 pieces, lookup weights in bf16",
        2,
        ("--memory-grid", "1x2x1x1", "--memory-pieces", 2, *ROUNDED),
        like=ALONE_ROUNDED.name,
    ),
    Check("DP2, replicas", 2, ("--memory-group-size", 1)),
    Check(
        "DP2, replicas of touched rows, untried forms",
        2,
        ("--memory-group-size", 1, "--memory-reduce-rows", "touched"),
        forms=UNTRIED,
    ),
    Check("one process, bf16", 1, ("--bf16",), CLOSE_IN_BF16),
    Check("one process, bf16, untried forms", 1, ("--bf16",), CLOSE_IN_BF16, forms=UNTRIED),
)
ON_THE_CPU = Check("one process on the CPU", 1, (), cpu=True)
RESUMED = (
    Check("saved by TP2, resumed by TP2", 2, TP2),
    Check("saved by TP2, resumed by one process", 1, ()),
    Check("saved by TP2, resumed by PP2", 2, PP2),
    Check("saved by TP2, resumed by DP2, rows over both", 2, WIDE),
)


def run(found: report.Report) -> None:
    """Compare two ranks with one process."""
    words = _words(found)
    at_once = 1 if found.dry_run else max(1, len(os.sched_getaffinity(0)) // CORES_PER_RUN)
    folder, saved = found.out / "ranks", found.out / "ranks" / "checkpoint"
    # files of an earlier run
    shutil.rmtree(folder, ignore_errors=True)

    def go(check: Check, *flags: object, **more: Any) -> Log:
        wanted = Run(
            check.name,
            check.ranks,
            (*words, *check.flags, *flags),
            cpu=check.cpu or found.dry_run,
            # for six steps compiling small functions takes longer than it saves
            environment={"TORCHDYNAMO_DISABLE": "1", ENVIRONMENT: check.forms},
        )
        more["environment"] = wanted.environment | more.get("environment", {})
        return launch(replace(wanted, **more), folder, TIMEOUT * (4 if found.dry_run else 1))

    checks = [*LAYOUTS, *([] if found.dry_run else [ON_THE_CPU])]
    saving = ("--save", saved, "--save-interval", SAVED_AT, "--exit-interval", SAVED_AT)
    with ThreadPoolExecutor(at_once) as pool:
        # these are first, as others need their results
        save = pool.submit(go, Check("TP2, saved", 2, TP2), *saving)
        bases = {check.name: pool.submit(go, check) for check in (ALONE, ALONE_ROUNDED)}
        logs = {check.name: pool.submit(go, check) for check in checks}
        killed = pool.submit(
            go,
            Check("a rank is killed in its third step", 2, WIDE),
            module="tests.helpers.faulty",
            environment={"FAULT": "kill 1 3"},
            may_fail=True,
        )
        problems = [
            problem
            for base in (*bases.values(), save)
            for problem in _add_base(found, base.result())
        ]
        truth = {name: base.result().losses for name, base in bases.items()}
        resumed = {}
        if not save.result().failure:
            resumed = {c.name: pool.submit(go, c, "--load", saved) for c in RESUMED}
        for check in checks:
            problems += _add(found, check, logs[check.name].result(), truth[check.like], first=1)
        for check in RESUMED if resumed else ():
            log = resumed[check.name].result()
            problems += _add(found, check, log, truth[check.like], first=SAVED_AT + 1)
        problems += _add_killed(found, killed.result())
    shutil.rmtree(saved, ignore_errors=True)
    done = len(found.rows)
    summary = f"{done - len(problems)} of {done} runs correct"
    # without bf16, which has its own bounds
    fp32 = [row["difference"] or 0.0 for row in found.rows if row.get("allowed") == CLOSE]
    summary += f", losses in fp32 differ by at most {max(fp32, default=0.0):.1e}"
    summary += (
        f"; a rank ended {found.rows[-1]['seconds_to_leave']} s after it reported a lost rank"
    )
    found.finish(not problems, "; ".join([summary, *problems]))


def _words(found: report.Report) -> tuple[object, ...]:
    """The flags of all runs."""
    hidden = found.divided(256, least=64)
    sequence = found.divided(256, least=32)
    return (
        *("--num-layers", 4, "--hidden-size", hidden, "--ffn-hidden-size", 4 * hidden),
        *("--num-attention-heads", 4, "--vocab-size", found.divided(1023, least=127)),
        # Megatron pads the vocabulary to 128 x TP, so that its size would depend on the layout
        *("--make-vocab-size-divisible-by", 32),
        *("--seq-length", sequence, "--max-position-embeddings", sequence),
        *("--micro-batch-size", 2, "--global-batch-size", 8),
        *("--train-iters", STEPS, "--lr-decay-iters", STEPS, "--lr", 1e-3, "--min-lr", 1e-4),
        # weights are drawn unsharded, so that they do not depend on the layout
        "--use-cpu-initialization",
        *("--memory-layers", 0, 1, "--memory-heads", 4, "--memory-lr", 3e-3),
        *("--memory-num-keys", found.divided(256, least=16)),
        *("--memory-topk", found.divided(16, least=4)),
    )


def largest_difference(
    losses: dict[int, float], truth: dict[int, float], first: int, close: tuple[float, float]
) -> tuple[float | None, bool]:
    """The largest difference of losses, and whether it is allowed at every step.

    Args:
        losses: by iteration.
        truth: the losses of one process that ran all steps.
        first: first iteration of the run.
        close: the allowed difference up to iteration 3, and after it.
    """
    # the second loss that Megatron logs is the mean of the first two of that run
    steps = [n for n in range(first, STEPS + 1) if first == 1 or n != first + 1]
    if any(step not in losses or step not in truth for step in steps):
        return None, False
    differences = {step: abs(losses[step] - truth[step]) for step in steps}
    right = all(d <= close[0 if step <= 3 else 1] for step, d in differences.items())
    # NaN counts as the largest
    return max(differences.values(), key=lambda d: (math.isnan(d), d)), right


def _row(log: Log, **more: Any) -> dict[str, Any]:
    return {"run": log.run.name, "ranks": log.run.ranks, "seconds": round(log.seconds, 1), **more}


def _add_base(found: report.Report, log: Log) -> Iterable[str]:
    """Add the row of a run whose loss must fall; return its problems."""
    losses = list(log.losses.values())
    falls = len(losses) >= SAVED_AT and losses[-1] < losses[0] - 0.01
    failure = log.failure or ("" if falls else f"{log.run.name}: the loss does not fall: {losses}")
    found.add(**_row(log, losses=losses, ok=not failure, failure=failure))
    return [failure] if failure else []


def _add(
    found: report.Report, check: Check, log: Log, truth: dict[int, float], first: int
) -> Iterable[str]:
    difference, right = largest_difference(log.losses, truth, first, check.close)
    failure = log.failure
    if not failure and not right:
        ours = list(log.losses.values())
        failure = f"{check.name}: losses are {ours}, but those of {check.like} are {truth}"
    found.add(
        **_row(
            log,
            losses=list(log.losses.values()),
            difference=difference,
            allowed=check.close,
            ok=not failure,
            failure=failure,
        )
    )
    return [failure] if failure else []


def _add_killed(found: report.Report, log: Log) -> Iterable[str]:
    """Add the row of the run with a killed rank: the other rank must report it and end at once."""
    lines = [line for line in log.stdout.splitlines() if "a collective failed" in line]
    # measured from its error line, as NCCL's destructors would wait for the killed rank
    to_leave = None if log.error_at is None else log.ended_at[0] - log.error_at
    failure = ""
    if log.statuses[1] is None or not lines or to_leave is None:
        failure = f"{log.run.name}: the other rank did not report that a rank was lost"
    elif log.statuses[0] is None or to_leave > SECONDS_TO_LEAVE:
        failure = f"{log.run.name}: the other rank ran for {to_leave:.0f} s after its error line"
    elif log.statuses[0] == 0:
        failure = f"{log.run.name}: the other rank ended with status 0"
    found.add(
        **_row(
            log,
            line=lines[0] if lines else None,
            statuses=log.statuses,
            seconds_to_notice=None
            if log.error_at is None
            else round(log.error_at - log.ended_at[1], 1),
            seconds_to_leave=None if to_leave is None else round(to_leave, 1),
            ok=not failure,
            failure=failure,
        )
    )
    return [failure] if failure else []


if __name__ == "__main__":
    sys.exit(report.main("ranks", run))
