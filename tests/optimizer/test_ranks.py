"""Every optimizer steps a table that is spread over ranks as it steps the table of one process."""

import os
from itertools import product

import pytest
import torch
import torch.distributed as dist

from megamem.layers.memory_pool import MemoryPool
from megamem.ops.forms import ENVIRONMENT
from megamem.optimizer import TableOptimizer
from megamem.parallel.memory_group import MemoryGroup, form, partition
from megamem.spec import Layout
from tests.helpers.distributed import run_distributed
from tests.helpers.pools import pool_of, read
from tests.optimizer.test_table_optimizer import KINDS, NUM_KEYS, WIDTH, _optimizer, _spec

STEPS, TOKENS, LOOKUPS = 3, 2, 4


def _batch(step: int, rank: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return (
        torch.randint(NUM_KEYS**2, (TOKENS, LOOKUPS), generator=generator),
        torch.rand(TOKENS, LOOKUPS, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype),
    )


def _run(
    pool: MemoryPool, optimizer: TableOptimizer, ranks: list[int], counts: list[int]
) -> torch.Tensor:
    """Steps on the tokens of these ranks; returns this rank's share of the last squared norm."""
    norm = torch.zeros(())
    for step in range(STEPS):
        parts = [_batch(step, rank, pool.values.weight.dtype) for rank in ranks]
        pairs, weights, grads = (torch.cat(part) for part in zip(*parts, strict=True))
        read(pool, pairs, weights.requires_grad_(), counts).backward(grads)
        optimizer.reduce()
        norm = optimizer.squared_norm()["t"]
        optimizer.step(0.5)
    return norm


def _matches(kind: str, size: int, columns: int, wire: str, dtype: torch.dtype, **more) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    spec = _spec(kind, memory_wire=wire, **more)
    alone_pool = pool_of(spec, dtype)
    alone_optimizer = _optimizer(alone_pool)
    expected = _run(alone_pool, alone_optimizer, list(range(world)), [world * TOKENS])

    group = form(partition([list(range(world))], Layout("2d", size, columns).grid))
    pool = pool_of(spec, dtype, group)
    optimizer = _optimizer(pool)
    norm = _run(pool, optimizer, [rank], [TOKENS] * size)
    alone, many = alone_pool.values, pool.values
    dist.all_reduce(norm)

    piece = (many.shard.rows.local, many.shard.columns)
    # partial sums of bf16 rows are sent in bf16, so gradients are rounded differently
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(norm, expected, **close)
    torch.testing.assert_close(many.weight, alone.weight[piece], **close)
    theirs = alone_optimizer.state[alone.weight]
    for name, state in optimizer.state[many.weight].items():
        want = theirs[name][piece[: state.dim()]]
        torch.testing.assert_close(state, want, **close)


def _all(shapes: list[tuple[int, int]], forms: str) -> None:
    os.environ[ENVIRONMENT] = forms
    for (size, columns), kind in product(shapes, KINDS):
        for wire in ("alltoall", "allgather"):
            rows = "touched" if wire == "alltoall" else "all"
            _matches(kind, size, columns, wire, torch.float64, memory_reduce_rows=rows)
        _matches(kind, size, columns, "auto", torch.bfloat16)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("world_size", "shapes"),
    [
        (2, [(1, 1), (2, 1), (2, 2)]),
        (3, [(3, 1), (1, 1)]),
        (4, [(4, 1), (4, 2), (2, 1), (2, 2)]),
    ],
)
def test_ranks_step_as_one_process(
    world_size: int, shapes: list[tuple[int, int]], forms: str
) -> None:
    run_distributed(_all, world_size, shapes, forms)


def test_one_rank_needs_no_group() -> None:
    pool = pool_of(_spec(), torch.float64)
    assert pool.group == MemoryGroup()
    _run(pool, _optimizer(pool), [0], [TOKENS])
