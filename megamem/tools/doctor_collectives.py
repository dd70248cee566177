"""Tests of the collectives that send lookups to other ranks: their results and their rates."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megamem.tools.doctor_finding import Finding

MIB = 2**20
COLLECTIVES = ("all-to-all", "all-gather", "reduce-scatter")


def _prepare(
    name: str, device: torch.device, size: int
) -> tuple[Callable[[], Any], Tensor, Tensor]:
    """A call that runs a collective, the tensor for its result, and the expected result."""
    rank, world = dist.get_rank(), dist.get_world_size()
    count = size // torch.float32.itemsize // world
    ranks = torch.arange(world, dtype=torch.float32, device=device)
    # filled with NaN, as freed memory may already contain the expected result
    full = torch.full((count * world,), math.nan, device=device)
    part = full[:count].clone()
    if name == "all-to-all":
        sent = (rank * world + ranks).repeat_interleave(count)
        expected = (ranks * world + rank).repeat_interleave(count)
        return lambda: dist.all_to_all_single(full, sent), full, expected
    if name == "all-gather":
        sent = torch.full_like(part, rank)
        expected = ranks.repeat_interleave(count)
        return lambda: dist.all_gather_into_tensor(full, sent), full, expected
    sent = (rank + ranks).repeat_interleave(count)
    expected = torch.full_like(part, world * (world - 1) / 2 + world * rank)
    return lambda: dist.reduce_scatter_tensor(part, sent), part, expected


def collective_check(name: str, device: torch.device, size: int) -> Finding:
    """Test one collective among all ranks: its result, and the rate at which a rank sends.

    Of W ranks each sends (W - 1) / W of `size` bytes, whatever the collective.
    """
    run, out, expected = _prepare(name, device, size)
    run()
    right = torch.tensor(float(torch.equal(out, expected)), device=device)
    dist.all_reduce(right, op=dist.ReduceOp.MIN)
    if not right:
        return Finding(name, "the result is wrong; run NVIDIA's nccl-tests", "problem")
    times = []
    for _ in range(5):
        dist.barrier()
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    slowest = torch.tensor(sorted(times)[len(times) // 2], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    world = dist.get_world_size()
    rate = size * (world - 1) / world / float(slowest) / 1e9
    return Finding(name, f"each rank sends {rate:.3g} GB/s; {size / MIB:.0f} MiB per rank")
