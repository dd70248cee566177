"""Bags of virtual blocks, and a weight per core, over every grid, wire and pieces."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamem.parallel.memory_group import MemoryGroup, form, partition
from megamem.parallel.routing import plan_routing, send_lookups
from megamem.parallel.row_shard import RowShard, id_dtype
from megamem.spec import Grid
from tests.helpers.distributed import run_distributed
from tests.parallel.bags import BlockReads, by_block
from tests.parallel.test_routing import _run

NUM_ROWS, WIDTH, LOOKUPS, TOKEN_WIDTH = 37, 64, 9, 3
WIRES = ("alltoall", "allgather")
# Y and O; None stands for weights [T, L]
SHAPES = ((4, None), (1, 2), (4, 2), (4, 1))


def _batch(count: int, blocks: int, cores: int | None, seed: int) -> list[Tensor]:
    """Ids, weights, tokens and gradients of one rank."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    ids = torch.randint(blocks * NUM_ROWS, (count, LOOKUPS), generator=generator)
    if count:
        # a token may read nothing in some blocks
        ids[0] %= NUM_ROWS
    weights = rand(count, LOOKUPS, *([cores] if cores else [])).bfloat16().double()
    return [
        by_block(ids.int(), NUM_ROWS),
        weights,
        rand(count, TOKEN_WIDTH),
        rand(count, blocks, WIDTH),
    ]


def _as_one_process(
    reads: BlockReads, cores: int | None, group: MemoryGroup, counts: list[int]
) -> None:
    """Outputs, and the gradients of table, weights and tokens, are those of the formula."""
    batches = [_batch(count, reads.blocks, cores, seed) for seed, count in enumerate(counts)]
    generator = torch.Generator().manual_seed(99)
    table = torch.rand(NUM_ROWS, WIDTH, generator=generator, dtype=torch.float64)
    shard, member = reads.shard_of(group), group.member

    ids, weights, x, grad = batches[member]
    values = table[shard.rows.local, shard.columns].clone().requires_grad_()
    inputs = [values, weights.clone().requires_grad_(), x.clone().requires_grad_()]
    out, _ = reads.over_ranks(inputs[0], ids, inputs[1], inputs[2], group, counts)
    found = [out, *torch.autograd.grad(out, inputs, grad)]

    ids, weights, x, grad = (torch.cat(parts) for parts in zip(*batches, strict=True))
    whole = [table.requires_grad_(), weights.requires_grad_(), x.requires_grad_()]
    out = reads.by_formula(whole[0], ids, whole[1], whole[2])
    wanted = [out, *torch.autograd.grad(out, whole, grad)]
    own = slice(sum(counts[:member]), sum(counts[: member + 1]))
    places = (own, (shard.rows.local, shard.columns), own, own)
    for ours, theirs, place in zip(found, wanted, places, strict=True):
        torch.testing.assert_close(ours, theirs[place])


@pytest.mark.parametrize("wire", WIRES)
def test_one_rank_reads_by_block(wire: str) -> None:
    for blocks, cores in SHAPES:
        for pieces in (1, 3):
            reads = BlockReads(NUM_ROWS, WIDTH, blocks, wire, pieces)
            _as_one_process(reads, cores, MemoryGroup(), [5])


def _all_grids(size: int) -> None:
    sides = [side for side in range(1, size + 1) if size % side == 0]
    grids = [Grid(*sizes) for sizes in itertools.product(sides, repeat=4)]
    for grid in (grid for grid in grids if grid.size == size):
        group = form(partition([[*range(size)]], grid))
        uneven = [5 * rank % 7 for rank in range(size)]
        cases = itertools.product(
            WIRES, ((1, [3] * size, None), (3, uneven, torch.bfloat16)), SHAPES
        )
        for wire, (pieces, counts, weight_wire), (blocks, cores) in cases:
            reads = BlockReads(NUM_ROWS, WIDTH, blocks, wire, pieces, weight_wire)
            try:
                _as_one_process(reads, cores, group, counts)
            except AssertionError as error:
                raise AssertionError(f"{grid}, {reads}, {cores}, {counts}") from error


@pytest.mark.gloo
@pytest.mark.parametrize("size", [2, 4])
def test_every_grid_reads_blocks_as_one_process(size: int) -> None:
    run_distributed(_all_grids, size, size)


@pytest.mark.gloo
@pytest.mark.slow
def test_every_grid_of_eight_ranks_reads_blocks() -> None:
    """`pytest -m slow tests/parallel/test_blocks.py`"""
    run_distributed(_all_grids, 8, 8)


def _wide_ids() -> None:
    """Ids of all blocks may be wider than 3 and than 4 bytes, though rows are not."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = form(partition([[*range(size)]], Grid(node_rows=size)))
    for num_rows, blocks in ((2**22, 4), (2**24 - 3, 4), (2**30, 4)):
        generator = torch.Generator().manual_seed(rank)
        ids = torch.randint(blocks * num_rows, (3, LOOKUPS), generator=generator)
        ids = by_block(ids, num_rows).to(id_dtype(blocks * num_rows))
        everybody = [torch.empty_like(ids) for _ in range(size)]
        dist.all_gather(everybody, ids)
        rows = torch.cat(everybody).flatten().long() % num_rows
        shard = RowShard(num_rows, rank, size)
        rows = rows[shard.owner(rows) == rank] - shard.start
        for wire in WIRES:
            routing = plan_routing(ids, shard, group, [3] * size, wire, blocks=blocks)
            (plan,) = routing.plans
            rows_M, _ = _run(send_lookups(plan, *routing.cut(torch.rand(3, LOOKUPS))))
            assert torch.equal(rows_M[rows_M >= 0].long(), rows), (num_rows, wire)


@pytest.mark.gloo
def test_ids_of_all_blocks_arrive_whole() -> None:
    run_distributed(_wide_ids, 2)
