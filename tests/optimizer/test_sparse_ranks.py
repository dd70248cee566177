"""Ranks that share a table, or copies of it, choose and train the rows that one process does."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamem.layers.memory_pool import MemoryPool
from megamem.optimizer import TableOptimizer
from megamem.parallel.memory_group import MemoryGroup, form, partition
from megamem.spec import Layout, MemorySpec
from tests.helpers.distributed import run_distributed
from tests.helpers.pools import pool_of, read
from tests.optimizer.test_ranks import TOKENS, _batch
from tests.optimizer.test_table_optimizer import NUM_KEYS, _optimizer, _spec

STEPS, ROWS = 3, NUM_KEYS**2
READ_COUNTS = torch.tensor([(0, 8, 3, 3, 0)[row % 5] for row in range(ROWS)], dtype=torch.int32)
BATCHES = 8


def _train(
    pool: MemoryPool, optimizer: TableOptimizer, ranks: list[int], counts: list[int]
) -> list[Tensor]:
    """Steps of two microbatches on the tokens of these ranks; the weights after each."""
    seen = []
    for step in range(STEPS):
        for part in range(2):
            parts = [_batch(2 * step + part, rank, torch.float64) for rank in ranks]
            pairs, weights, grads = (torch.cat(each) for each in zip(*parts, strict=True))
            read(pool, pairs, weights.requires_grad_(), counts).backward(grads)
        optimizer.reduce()
        optimizer.choose()
        optimizer.step(0.5)
        seen.append(pool.values.weight.detach().clone())
    return seen


def _build(spec: MemorySpec, group: MemoryGroup) -> tuple[MemoryPool, TableOptimizer]:
    pool = pool_of(spec, torch.float64, group)
    optimizer = _optimizer(pool)
    if spec.finetune_rows:
        table = pool.values
        table.reads.counts.copy_(READ_COUNTS[table.shard.rows.local])
        table.reads.batches.fill_(BATCHES)
    return pool, optimizer


def _matches(group: MemoryGroup, size: int, wire: str, kind: str, limit: int | None) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    spec = _spec(kind, memory_wire=wire, memory_finetune_rows=limit)
    alone_pool, alone_optimizer = _build(spec, MemoryGroup())
    pool, optimizer = _build(spec, group)
    alone, many = alone_pool.values, pool.values
    piece = (many.shard.rows.local, many.shard.columns)
    start = alone.weight[piece].clone()
    expected = _train(alone_pool, alone_optimizer, list(range(world)), [world * TOKENS])
    got = _train(pool, optimizer, [rank], [TOKENS] * size)
    for here, there in zip(got, expected, strict=True):
        want = there[piece]
        torch.testing.assert_close(here, want)
        # bit for bit: which rows have moved so far
        assert torch.equal((here != start).any(1), (want != start).any(1))
    # replicas and columns agree to the last bit
    for others in (group.replicas, group.columns):
        if others is not None:
            moved = (got[-1] != start).any(1).int()
            least = moved.clone()
            dist.all_reduce(least, dist.ReduceOp.MIN, group=others)
            assert torch.equal(moved, least)
    if group.replicas is not None:
        low, high = many.weight.detach().clone(), many.weight.detach().clone()
        dist.all_reduce(low, dist.ReduceOp.MIN, group=group.replicas)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=group.replicas)
        assert torch.equal(low, high)
    assert torch.equal(many.reads.counts, alone.reads.counts[piece[0]])
    assert torch.equal(many.reads.batches, alone.reads.batches)
    if limit is not None:
        total = optimizer.chosen["t"].clone()
        dist.all_reduce(total)
        assert torch.equal(total, alone_optimizer.chosen["t"])


def _all(shapes: list[tuple[int, int]]) -> None:
    for size, columns in shapes:
        group = form(
            partition([list(range(dist.get_world_size()))], Layout("2d", size, columns).grid)
        )
        # fewer rows than are read, more than one rank holds, more than there are; all of them
        for limit, kind in product((1, 4, 9, 2 * ROWS), ("sgd", "lazy_adamw")):
            _matches(group, size, "allgather", kind, limit)
        _matches(group, size, "alltoall", "sgd", 4)
        _matches(group, size, "alltoall", "sgd", None)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("world_size", "shapes"),
    [
        (1, [(1, 1)]),
        (2, [(1, 1), (2, 1), (2, 2)]),
        (3, [(3, 1), (1, 1)]),
        (4, [(4, 1), (4, 2), (2, 1), (2, 2)]),
    ],
)
def test_ranks_choose_as_one_process(world_size: int, shapes: list[tuple[int, int]]) -> None:
    run_distributed(_all, world_size, shapes)
