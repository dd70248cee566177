"""The planner's bytes sent, compared with those that ranks pass to torch.distributed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megamem.config import MemoryConfig
from megamem.layers.memory_pool import MemoryPool
from megamem.optimizer import StepOptions, TableOptimizer
from megamem.parallel.memory_group import form, partition
from megamem.parallel.traffic import Mode, Wire, all_reduce_bytes, traffic
from megamem.resolution import resolve
from megamem.spec import Layout
from tests.helpers.distributed import run_distributed

NUM_KEYS, TOKENS, LOOKUPS, WIDTH = 32, 64, 16, 64


@contextmanager
def _sent() -> Iterator[list[float]]:
    """Count the bytes that this rank sends to others, as the only element of a list."""
    total = [0.0]

    def count(name: str, share: Any) -> Any:
        real = getattr(dist, name)

        def counted(*args: Any, group: Any, **options: Any) -> Any:
            total[0] += share(dist.get_rank(group), dist.get_world_size(group), *args)
            return real(*args, group=group, **options)

        return mock.patch.object(dist, name, counted)

    def all_to_all(rank: int, size: int, out: Any, x: Any, recv: list, send: list) -> float:
        return x.nbytes * (1 - send[rank] / sum(send))

    with (
        count("all_to_all_single", all_to_all),
        count("all_gather_into_tensor", lambda rank, size, out, x: x.nbytes * (size - 1)),
        count("reduce_scatter_tensor", lambda rank, size, out, x: x.nbytes * (size - 1) / size),
        count("all_reduce", lambda rank, size, x: all_reduce_bytes(x.nbytes, size)),
    ):
        yield total


def _pool(layout: Layout, wire: str, dtype: torch.dtype) -> MemoryPool:
    config = MemoryConfig(
        memory_layers=[0],
        memory_num_keys=NUM_KEYS,
        memory_value_dim=WIDTH,
        memory_key_dim=16,
        memory_wire=wire,
        memory_topk=LOOKUPS,
        memory_heads=1,
    )
    spec = replace(resolve(config, WIDTH), layout=layout)
    world = [list(range(dist.get_world_size()))]
    group = form(partition(world, layout.group_size, layout.column_ranks))
    return MemoryPool(spec, "t", group, dtype=dtype)


def _as_planned(mode: Mode, columns: int, wire: Wire, dtype: torch.dtype) -> None:
    size = dist.get_world_size()
    pool = _pool(Layout(mode, size, columns), wire, dtype)
    # every row is read once, so that each rank owns the same share of lookups as of rows
    generator = torch.Generator().manual_seed(dist.get_rank())
    pairs = torch.randperm(NUM_KEYS**2, generator=generator).view(TOKENS, LOOKUPS)
    weights = torch.rand(TOKENS, LOOKUPS, requires_grad=True)
    planned = traffic(
        mode,
        WIDTH,
        LOOKUPS,
        size,
        column_ranks=columns,
        wire=wire,
        e=dtype.itemsize,
    )
    with _sent() as sent:
        out = pool.read(pairs, weights, [TOKENS] * size, torch.empty(TOKENS, WIDTH))
    assert sent[0] / TOKENS == pytest.approx(planned.forward), (mode, columns, wire, "forward")
    with _sent() as sent:
        out.sum().backward()
    assert sent[0] / TOKENS == pytest.approx(planned.backward), (mode, columns, wire, "backward")


def _all_as_planned() -> None:
    size = dist.get_world_size()
    for dtype in (torch.bfloat16, torch.float32):
        for wire in ("alltoall", "allgather"):
            _as_planned("row", 1, wire, dtype)
            if size == 4:
                _as_planned("2d", 2, wire, dtype)
        _as_planned("column", size, "allgather", dtype)


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [2, 4])
def test_lookups_send_what_is_planned(world_size: int) -> None:
    run_distributed(_all_as_planned, world_size)


def _replicas_as_planned() -> None:
    pool = _pool(Layout("row", 2, 1), "auto", torch.bfloat16)
    optimizer = TableOptimizer(pool, pool.spec, StepOptions(), lr=0.1, weight_decay=0.0)
    rows, width = pool.values.weight.shape
    with _sent() as sent:
        optimizer.reduce()
    planned = all_reduce_bytes(rows * width * 4 + rows, dist.get_world_size() // 2)
    # the flags of the rows are padded by one
    assert sent[0] == pytest.approx(planned, abs=2)


@pytest.mark.gloo
def test_replicas_send_what_is_planned() -> None:
    run_distributed(_replicas_as_planned, 4)
