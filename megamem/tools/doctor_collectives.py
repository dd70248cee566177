"""Tests of the collectives that send lookups to other ranks: their results and their rates."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megamem.tools.doctor_finding import Finding

MIB = 2**20
COLLECTIVES = ("all-to-all", "all-gather", "reduce-scatter")
WARM_UPS, TIMINGS = 2, 5
CALLS_ON_GPU = 10
"""Calls of one timing, so that the start of a call counts for little; on CPUs one."""
WRONG = "the result is wrong; run NVIDIA's nccl-tests"


def _prepare(
    name: str, device: torch.device, size: int, group: ProcessGroup | None
) -> tuple[Callable[[], Any], Tensor, Tensor]:
    """A call that runs a collective, the tensor for its result, and the expected result."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    count = size // torch.float32.itemsize // world
    ranks = torch.arange(world, dtype=torch.float32, device=device)
    # filled with NaN, as freed memory may already contain the expected result
    full = torch.full((count * world,), math.nan, device=device)
    part = full[:count].clone()
    if name == "all-to-all":
        sent = (rank * world + ranks).repeat_interleave(count)
        expected = (ranks * world + rank).repeat_interleave(count)
        return lambda: dist.all_to_all_single(full, sent, group=group), full, expected
    if name == "all-gather":
        sent = torch.full_like(part, rank)
        expected = ranks.repeat_interleave(count)
        return lambda: dist.all_gather_into_tensor(full, sent, group=group), full, expected
    sent = (rank + ranks).repeat_interleave(count)
    expected = torch.full_like(part, world * (world - 1) / 2 + world * rank)
    return lambda: dist.reduce_scatter_tensor(part, sent, group=group), part, expected


def measured_rate(
    name: str, device: torch.device, size: int, group: ProcessGroup | None = None
) -> float | None:
    """Run one collective in all groups at the same time; all ranks of the world must call this.

    Of the W ranks of a group each sends (W - 1) / W of `size` bytes, whatever the collective.

    Args:
        name: one of COLLECTIVES.
        device: this rank's.
        size: bytes per rank.
        group: the group of this rank; groups have equally many ranks. None is the world.

    Returns:
        The bytes per second that the slowest rank sends, as the median of several timings; None
        if the result is wrong on any rank.
    """
    run, out, expected = _prepare(name, device, size, group)
    run()
    right = torch.tensor(float(torch.equal(out, expected)), device=device)
    dist.all_reduce(right, op=dist.ReduceOp.MIN)
    if not right:
        return None
    calls = CALLS_ON_GPU if device.type == "cuda" else 1
    times = []
    for _ in range(WARM_UPS + TIMINGS):
        dist.barrier()
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            run()
        _synchronize(device)
        times.append((time.perf_counter() - started) / calls)
    slowest = torch.tensor(sorted(times[WARM_UPS:])[TIMINGS // 2], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    ranks = dist.get_world_size(group)
    return size * (ranks - 1) / ranks / float(slowest)


def collective_check(name: str, device: torch.device, size: int) -> Finding:
    """Test one collective among all ranks: its result, and the rate at which a rank sends."""
    rate = measured_rate(name, device, size)
    if rate is None:
        return Finding(name, WRONG, "problem")
    return Finding(name, f"each rank sends {rate / 1e9:.3g} GB/s; {size / MIB:.0f} MiB per rank")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
