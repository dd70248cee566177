"""Part: compiles the kernels that later parts launch, in several processes at a time.

The key of a kernel in Triton's cache depends on widths, dtypes and whether sizes are multiples of
16, but not on the number of tokens or rows. So every op is launched once on small inputs. Results
are not checked here.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from megamem.tools import known_answers
from tests.gpu import report
from tests.gpu.layer import Sizes, build
from tests.gpu.stages import op_stages

TOKENS, ROWS = 64, 2**12
# sizes of known answers are divided by this, and remain multiples of 16
FEW = 64
STAGES, LAYER = "the ops of the stages", "the layer of the ranks"


def jobs() -> list[str]:
    """The names of jobs for one process each, longest first."""
    return [STAGES, LAYER, *(answer.name for answer in known_answers.ANSWERS)]


def do(job: str, device: torch.device, width: int) -> float:
    """Launch the kernels of one job; return the seconds that it took."""
    started = time.monotonic()
    if job == STAGES:
        sizes = Sizes(tokens=TOKENS, hidden=width, num_keys=1024, heads=4, topk=32)
        for _, stage in op_stages(sizes, device, torch.bfloat16, rows=ROWS):
            stage()
    elif job == LAYER:
        sizes = Sizes(tokens=TOKENS, hidden=min(256, width), num_keys=256, heads=4, topk=16)
        trained = build(sizes, device, torch.float32)
        trained.forward_backward()
        trained.optimizer.squared_norm()
        trained.optimizer.step()
    else:
        (answer,) = (a for a in known_answers.ANSWERS if a.name == job)
        answer.check(device, FEW)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started


def run(found: report.Report) -> None:
    """Compile kernels into Triton's cache."""
    todo, failed = jobs(), 0
    width = found.divided(2048, least=64)
    workers = max(1, min(len(todo), len(os.sched_getaffinity(0))))
    context = get_context("spawn")
    started = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(do, job, found.device, width): job for job in todo}
        for future in as_completed(futures):
            error = future.exception()
            failed += error is not None
            first = (str(error).strip().splitlines() or [""])[0]
            found.add(
                job=futures[future],
                seconds=None if error else round(future.result(), 2),
                error=f"{type(error).__name__}: {first}"[:300] if error else None,
            )
    seconds = time.monotonic() - started
    summary = f"{len(todo) - failed} of {len(todo)} jobs in {seconds:.0f} s, {workers} at a time"
    if failed:
        summary += "; " + next(row["error"] for row in found.rows if row["error"])
    found.finish(not failed, summary)


if __name__ == "__main__":
    sys.exit(report.main("warm", run))
