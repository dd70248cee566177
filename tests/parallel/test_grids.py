"""Every grid reads, and learns, what one process does, with any wire, pieces and token counts."""

import itertools
import random
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamem.config import MemoryConfig
from megamem.layers.memory_pool import MemoryPool
from megamem.parallel import hops
from megamem.parallel.memory_group import MemoryGroup, form, partition
from megamem.resolution import resolve
from megamem.spec import Grid, Layout, MemorySpec
from tests.helpers.distributed import run_distributed

NUM_KEYS, WIDTH, LOOKUPS = 8, 64, 8
# eight ranks: columns over nodes, both axes over nodes, and all axes but one
OF_EIGHT = [Grid(1, 4, 2, 1), Grid(2, 2, 2, 1), Grid(1, 2, 2, 2)]


def _spec(variant: str, weights: str = "fp32") -> MemorySpec:
    config = MemoryConfig(
        memory_layers=[0],
        memory_num_keys=NUM_KEYS,
        memory_value_dim=WIDTH,
        memory_key_dim=8,
        memory_topk=4,
        memory_heads=2,
        memory_variant=variant,
        memory_lookup_weights=weights,
    )
    return resolve(config, WIDTH)


def _batch(counts: list[int], dtype: torch.dtype) -> list[list[Tensor]]:
    """Pairs, weights, tokens and gradients, for each rank."""
    generator = torch.Generator().manual_seed(3)

    def rand(count: int, width: int) -> Tensor:
        return torch.rand(count, width, generator=generator, dtype=dtype)

    def pairs(count: int) -> Tensor:
        return torch.randint(NUM_KEYS**2, (count, LOOKUPS), generator=generator)

    return [
        [pairs(count), rand(count, LOOKUPS), rand(count, WIDTH), rand(count, WIDTH)]
        for count in counts
    ]


def _pass(pool: MemoryPool, batch: list[Tensor], counts: list[int]) -> list[Tensor]:
    """The read-outs, and the gradients of weights, tokens and tables."""
    pairs, weights, x, grad = batch
    weights, x = weights.clone().requires_grad_(), x.clone().requires_grad_()
    out = pool.read(pairs, weights, counts, x)
    tables = [table.weight for table in pool]
    inputs = [weights, *([x] if pool.variant.reads_tokens else []), *tables]
    return [out, *torch.autograd.grad(out, inputs, grad)]


def _as_one_process(spec: MemorySpec, group: MemoryGroup, counts: list[int]) -> None:
    rank = dist.get_rank()
    batch = _batch(counts, torch.float64)
    alone = MemoryPool(replace(spec, layout=Layout(), pieces=1), "t", dtype=torch.float64)
    ours = _pass(MemoryPool(spec, "t", group, dtype=torch.float64), batch[rank], counts)
    whole = [torch.cat(parts) for parts in zip(*batch, strict=True)]
    expected = _pass(alone, whole, [sum(counts)])
    own, tables = slice(sum(counts[:rank]), sum(counts[: rank + 1])), len(alone.tables)
    for found, wanted in zip(ours[:-tables], expected[:-tables], strict=True):
        torch.testing.assert_close(found, wanted[own])
    shards = [table.shard for table in MemoryPool(spec, "t", group, device="meta")]
    for found, wanted, shard in zip(ours[-tables:], expected[-tables:], shards, strict=True):
        torch.testing.assert_close(found, wanted[shard.rows.local, shard.columns])


def _grids(grids: list[Grid]) -> None:
    for grid in grids:
        size = grid.size
        group = form(partition([[*range(size)]], grid))
        uneven = [5 * rank % 7 for rank in range(size)]
        cases = itertools.product(
            ("alltoall", "allgather"),
            ((1, [3] * size), (2, [4] * size), (3, uneven)),
            ("memory+", "peer"),
            ("fp32", "bf16"),
        )
        for wire, (pieces, counts), variant, weights in cases:
            if variant == "peer" and grid.column_ranks > 1:
                continue
            spec = _spec(variant, weights)
            spec = replace(spec, layout=Layout.of_grid(grid), wire=wire, pieces=pieces)
            try:
                _as_one_process(spec, group, counts)
            except AssertionError as error:
                raise AssertionError(f"{grid}, {wire}, {pieces}, {variant}, {counts}") from error


def _all_grids(size: int) -> list[Grid]:
    sides = [side for side in range(1, size + 1) if size % side == 0]
    found = [Grid(*sizes) for sizes in itertools.product(sides, repeat=4)]
    return [grid for grid in found if grid.size == size]


@pytest.mark.gloo
@pytest.mark.parametrize("size", [2, 4])
def test_every_grid_reads_and_learns_as_one_process(size: int) -> None:
    run_distributed(_grids, size, _all_grids(size))


@pytest.mark.gloo
def test_all_axes_at_once() -> None:
    run_distributed(_grids, 8, OF_EIGHT)


@pytest.mark.gloo
@pytest.mark.slow
def test_every_grid_of_eight_ranks() -> None:
    run_distributed(_grids, 8, _all_grids(8))


def _bits(grid: Grid, wire: str, seed: int) -> None:
    """Pieces change no bit of what is read, and ranks that are slow now and then no bit at all."""
    rank, size = dist.get_rank(), grid.size
    group, counts = form(partition([[*range(size)]], grid)), [8] * size
    batch = _batch(counts, torch.float32)[rank]
    spec = replace(_spec("memory+"), layout=Layout.of_grid(grid), wire=wire)

    def result(pieces: int) -> list[Tensor]:
        return _pass(MemoryPool(replace(spec, pieces=pieces), "t", group), batch, counts)

    whole, cut = result(1), result(4)
    assert torch.equal(whole[0], cut[0]) and torch.equal(whole[1], cut[1])
    torch.testing.assert_close(whole[2], cut[2])

    late = random.Random(seed + rank)
    arrive = hops.Transfer.take, hops.Transfer.take_back

    def sleepy(take):
        def taken(transfer: hops.Transfer) -> Tensor:
            time.sleep(late.random() * 0.01)
            return take(transfer)

        return taken

    with (
        mock.patch.object(hops.Transfer, "take", sleepy(arrive[0])),
        mock.patch.object(hops.Transfer, "take_back", sleepy(arrive[1])),
    ):
        again = result(4)
    assert all(torch.equal(a, b) for a, b in zip(cut, again, strict=True))


@pytest.mark.gloo
@pytest.mark.parametrize("wire", ["alltoall", "allgather"])
def test_pieces_change_no_bit_however_late_ranks_are(wire: str) -> None:
    run_distributed(_bits, 4, Grid(1, 2, 2, 1), wire, 5)
