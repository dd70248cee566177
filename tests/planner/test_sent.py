"""The planner's bytes sent, compared with those that ranks pass to torch.distributed."""

import itertools
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
from megamem.metrics import TABLE_SUMS, TableMetrics
from megamem.optimizer import StepOptions, TableOptimizer
from megamem.parallel.exchange_cost import Exchange
from megamem.parallel.exchange_cost import sent as sent_of
from megamem.parallel.memory_group import form, partition
from megamem.parallel.replica_groups import all_reduce_bytes
from megamem.parallel.traffic import sent_packing, traffic
from megamem.resolution import resolve
from megamem.spec import Grid, Layout, Wire
from tests.helpers.distributed import run_distributed
from tests.parallel.bags import BlockReads, by_block

NUM_KEYS, TOKENS, LOOKUPS, WIDTH = 32, 64, 16, 64


@contextmanager
def _sent(local: int) -> Iterator[dict[str, float]]:
    """Count the bytes that this rank sends to others, inside nodes of so many ranks and across."""
    total = {"inside": 0.0, "across": 0.0}

    def count(name: str, share: Any) -> Any:
        real = getattr(dist, name)

        def counted(*args: Any, group: Any, **options: Any) -> Any:
            nodes = {rank // local for rank in dist.get_process_group_ranks(group)}
            link = "inside" if len(nodes) == 1 else "across"
            total[link] += share(dist.get_rank(group), dist.get_world_size(group), *args)
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


def _pool(
    layout: Layout, wire: str, dtype: torch.dtype, weights: str = "fp32", pieces: int = 1
) -> MemoryPool:
    config = MemoryConfig(
        memory_layers=[0],
        memory_num_keys=NUM_KEYS,
        memory_value_dim=WIDTH,
        memory_key_dim=16,
        memory_wire=wire,
        memory_topk=LOOKUPS,
        memory_heads=1,
        memory_lookup_weights=weights,
        memory_pieces=pieces,
    )
    spec = replace(resolve(config, WIDTH), layout=layout)
    world = [list(range(dist.get_world_size()))]
    return MemoryPool(spec, "t", form(partition(world, layout.grid)), dtype=dtype)


def _as_planned(grid: Grid, wire: Wire, dtype: torch.dtype, weights: str, pieces: int) -> None:
    size, case = grid.size, (str(grid), wire, dtype, weights, pieces)
    pool = _pool(Layout.of_grid(grid), wire, dtype, weights, pieces)
    pool.values.metrics = TableMetrics(torch.zeros(len(TABLE_SUMS)), torch.zeros(()))
    # every row is read once, so that each rank owns the same share of lookups as of rows
    generator = torch.Generator().manual_seed(dist.get_rank())
    pairs = torch.randperm(NUM_KEYS**2, generator=generator).view(TOKENS, LOOKUPS)
    weights_TL = torch.rand(TOKENS, LOOKUPS, requires_grad=True)
    packing = sent_packing(
        NUM_KEYS**2, LOOKUPS, grid.row_ranks, wire, 2 if weights == "bf16" else 4
    )
    planned = traffic(grid, WIDTH, LOOKUPS, wire=wire, e=dtype.itemsize, packing=packing)
    # the lookups of a piece need not be divided over the ranks as those of all pieces are
    near = 1e-6 if pieces == 1 or wire == "allgather" else 0.02
    with _sent(grid.local) as sent:
        out = pool.read(pairs, weights_TL, [TOKENS] * size, torch.empty(TOKENS, WIDTH))
    assert sent["inside"] / TOKENS == pytest.approx(planned.forward_inside, rel=near), case
    assert sent["across"] / TOKENS == pytest.approx(planned.forward_across, rel=near), case
    total = sum(sent.values())
    with _sent(grid.local) as sent:
        out.sum().backward()
    assert sent["inside"] / TOKENS == pytest.approx(planned.backward_inside, rel=near), case
    assert sent["across"] / TOKENS == pytest.approx(planned.backward_across, rel=near), case
    # what TensorBoard reports is what was sent
    assert float(pool.values.metrics.bytes_sent) == pytest.approx(total + sum(sent.values()))


def _all_as_planned(size: int) -> None:
    sides = [side for side in range(1, size + 1) if size % side == 0]
    grids = [Grid(*sizes) for sizes in itertools.product(sides, repeat=4)]
    for grid in (grid for grid in grids if grid.size == size):
        for wire in ("alltoall", "allgather"):
            _as_planned(grid, wire, torch.float32, "fp32", 1)
            _as_planned(grid, wire, torch.bfloat16, "bf16", 4)


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [2, 4])
def test_lookups_send_what_is_planned(world_size: int) -> None:
    run_distributed(_all_as_planned, world_size, world_size)


def _blocks_as_planned(grid: Grid, wire: Wire, cores: int, blocks: int, pieces: int) -> None:
    """Several read-outs of a token, several weights of a lookup, and a narrow token."""
    size, case = grid.size, (str(grid), wire, cores, blocks, pieces)
    num_rows, token_width = TOKENS * LOOKUPS // blocks, 24
    group = form(partition([list(range(size))], grid))
    bf16 = torch.bfloat16 if pieces > 1 else None
    reads = BlockReads(num_rows, WIDTH, blocks, wire, pieces, bf16)
    # every row is read once by each block, so that ranks own the same shares of all bags' lookups
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randperm(blocks * num_rows, generator=generator, dtype=torch.int32)
    ids_TL = by_block(ids.view(TOKENS, LOOKUPS), num_rows)
    weights = torch.rand(TOKENS, LOOKUPS, cores, requires_grad=True)
    x_TD = torch.rand(TOKENS, token_width, requires_grad=True)
    values = torch.rand(reads.shard_of(group).shape)
    of = Exchange(
        width=WIDTH,
        lookups=LOOKUPS,
        number_bytes=4,
        num_rows=num_rows,
        weight_bytes=2 if bf16 else 4,
        sends_tokens=True,
        cores=cores,
        blocks=blocks,
        token_width=token_width,
    )
    planned = sent_of(grid, wire, of)
    near = 1e-6 if pieces == 1 or wire == "allgather" else 0.02
    with _sent(grid.local) as sent:
        out, counted = reads.over_ranks(values, ids_TL, weights, x_TD, group, [TOKENS] * size)
    assert sent["inside"] / TOKENS == pytest.approx(planned.forward_inside, rel=near), case
    assert sent["across"] / TOKENS == pytest.approx(planned.forward_across, rel=near), case
    total = sum(sent.values())
    with _sent(grid.local) as sent:
        out.sum().backward()
    assert sent["inside"] / TOKENS == pytest.approx(planned.backward_inside, rel=near), case
    assert sent["across"] / TOKENS == pytest.approx(planned.backward_across, rel=near), case
    assert counted == pytest.approx(total + sum(sent.values())), case


def _all_blocks_as_planned(size: int) -> None:
    sides = [side for side in range(1, size + 1) if size % side == 0]
    grids = [Grid(*sizes) for sizes in itertools.product(sides, repeat=4)]
    for grid in (grid for grid in grids if grid.size == size):
        for wire in ("alltoall", "allgather"):
            _blocks_as_planned(grid, wire, cores=2, blocks=4, pieces=1)
            _blocks_as_planned(grid, wire, cores=1, blocks=4, pieces=4)


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [2, 4])
def test_blocks_and_cores_send_what_is_planned(world_size: int) -> None:
    run_distributed(_all_blocks_as_planned, world_size, world_size)


def _replicas_as_planned() -> None:
    pool = _pool(Layout("row", 2, 1), "auto", torch.bfloat16)
    optimizer = TableOptimizer(pool, pool.spec, StepOptions(), lr=0.1, weight_decay=0.0)
    rows, width = pool.values.weight.shape
    with _sent(dist.get_world_size()) as sent:
        optimizer.reduce()
    planned = all_reduce_bytes(rows * width * 4 + rows, dist.get_world_size() // 2)
    # the flags of the rows are padded by one
    assert sent["inside"] == pytest.approx(planned, abs=2)


@pytest.mark.gloo
def test_replicas_send_what_is_planned() -> None:
    run_distributed(_replicas_as_planned, 4)
