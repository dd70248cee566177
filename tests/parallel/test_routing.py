"""Routing plans on one rank and on several. tests/layers checks the sums."""

from collections import Counter
from collections.abc import Generator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamem.parallel import collectives
from megamem.parallel.homeward import send_home
from megamem.parallel.memory_group import MemoryGroup, form, partition
from megamem.parallel.routing import SentBytes, plan_routing, send_lookups, send_tokens
from megamem.parallel.row_shard import RowShard
from megamem.spec import Grid, Wire
from tests.helpers.distributed import run_distributed

WIRES = ("alltoall", "allgather")
NUM_ROWS, LOOKUPS = 37, 6


def _run[T](generator: Generator[None, None, T]) -> T:
    """The result of a generator whose sends are waited for at once."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def _plan(row_ids_TL: Tensor, shard: RowShard, group: MemoryGroup, counts: list[int], wire: Wire):
    routing = plan_routing(row_ids_TL, shard, group, counts, wire)
    (plan,) = routing.plans
    return routing, plan


@pytest.mark.parametrize("wire", WIRES)
def test_alone_every_lookup_stays_in_its_bag(wire) -> None:
    torch.manual_seed(1)
    row_ids_TL, weights_TL = torch.randint(NUM_ROWS, (5, LOOKUPS)), torch.rand(5, LOOKUPS)
    routing, plan = _plan(row_ids_TL, RowShard(NUM_ROWS, 0, 1), MemoryGroup(), [5], wire)
    assert plan.offsets().tolist() == list(range(0, 31, LOOKUPS))
    rows_M, weights_M = _run(send_lookups(plan, *routing.cut(weights_TL)))
    assert torch.equal(rows_M.view(5, LOOKUPS), row_ids_TL)
    assert torch.equal(weights_M.view(5, LOOKUPS), weights_TL)
    bags_GV = torch.rand(5, 8)
    assert _run(send_home(plan, bags_GV, MemoryGroup(), [8])) is bags_GV
    assert plan.all_present and plan.equal_bags and plan.expected(30) == 5 * LOOKUPS


class _Computed(TorchDispatchMode):
    """Counts the operations that write memory; views write none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = (
            {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, Tensor)}
            for tree in ((args, kwargs), out)
        )
        if func._schema.is_mutable or made - given:
            self.names[func.overloadpacket.__name__] += 1
        return out


@pytest.mark.parametrize("wire", WIRES)
def test_alone_only_offsets_are_computed(wire) -> None:
    """One rank copies nothing, sums nothing and compares no id, forward and backward."""
    row_ids_TL = torch.randint(NUM_ROWS, (5, LOOKUPS), dtype=torch.int32)
    weights_TL, x_TD, bags_GV = (torch.rand(5, n, requires_grad=True) for n in (LOOKUPS, 16, 8))
    group = MemoryGroup()
    with _Computed() as computed:
        routing, plan = _plan(row_ids_TL, RowShard(NUM_ROWS, 0, 1), group, [5], wire)
        plan.offsets()
        rows_M, weights_M = _run(send_lookups(plan, *routing.cut(weights_TL)))
        assert rows_M.data_ptr() == row_ids_TL.data_ptr()
        results = (
            weights_M,
            _run(send_tokens(plan, group, x_TD, SentBytes())),
            _run(send_home(plan, bags_GV, group, [8])),
        )
    assert computed.names == {"arange": 1}
    gradients = [torch.ones_like(x) for x in results]
    with _Computed() as computed:
        torch.autograd.grad(results, (weights_TL, x_TD, bags_GV), gradients)
    assert not computed.names


def _lookups_arrive_where_their_rows_are(counts: list[int], skewed: bool) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(5)
    row_ids = [
        torch.randint(1 if skewed else NUM_ROWS, (count, LOOKUPS), generator=generator)
        for count in counts
    ]
    weights = [torch.rand(count, LOOKUPS, generator=generator) for count in counts]
    shard = RowShard(NUM_ROWS, rank, world)
    group = form(partition([[*range(world)]], Grid(local_rows=world)))
    for wire in WIRES:
        routing, plan = _plan(row_ids[rank], shard, group, counts, wire)
        row_ids_M, weights_M = _run(send_lookups(plan, *routing.cut(weights[rank])))
        offsets = plan.offsets()
        assert offsets[-1] == len(row_ids_M) == len(weights_M)
        assert plan.bags.counts == counts and len(offsets) == sum(counts) + 1
        # what the ops are told of the lookups
        assert plan.all_present == (wire == "alltoall") and plan.equal_bags == (wire == "allgather")
        assert not plan.all_present or (row_ids_M >= 0).all()
        assert not plan.equal_bags or len(offsets.diff().unique()) == 1
        share = 1 if plan.all_present else shard.num_local / NUM_ROWS
        assert plan.expected(len(row_ids_M)) == int(len(row_ids_M) * share)
        # -1 alone reads nothing: marks of rows count from the end
        assert (row_ids_M >= -1).all() and (row_ids_M < shard.num_local).all()

        # every token's bag holds its lookups of rows here, in their order, and nothing else
        bag = 0
        for source in range(world):
            for token in range(counts[source]):
                lookups = slice(offsets[bag], offsets[bag + 1])
                present = row_ids_M[lookups] >= 0
                found = row_ids_M[lookups][present] + shard.start
                found_weights = weights_M[lookups][present]
                here = shard.owner(row_ids[source][token]) == rank
                expected = row_ids[source][token][here]
                expected_weights = weights[source][token][here]
                assert found.tolist() == expected.tolist()
                assert found_weights.tolist() == expected_weights.tolist()
                bag += 1

        # partial bags of ones sum to the number of ranks
        out_TV = _run(send_home(plan, torch.ones(sum(counts), 8), group, [8]))
        assert torch.equal(out_TV, torch.full((counts[rank], 8), float(world)))


def _checks(counts: list[int]) -> None:
    _lookups_arrive_where_their_rows_are(counts, skewed=False)
    _lookups_arrive_where_their_rows_are(counts, skewed=True)


@pytest.mark.gloo
@pytest.mark.parametrize("counts", [[4, 4], [5, 0, 2]], ids=str)
def test_lookups_arrive_where_their_rows_are(counts: list[int]) -> None:
    run_distributed(_checks, len(counts), counts)


def _alltoall_waits_once(pieces: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    weights_TL = torch.rand(5, LOOKUPS, requires_grad=True)
    row_ids_TL = torch.randint(NUM_ROWS, (5, LOOKUPS), dtype=torch.int32)
    waits, numbers = [], collectives.HostCopy.numbers
    counted = mock.patch.object(
        collectives.HostCopy, "numbers", lambda copy: waits.append(copy) or numbers(copy)
    )
    group = form(partition([[*range(world)]], Grid(local_rows=world)))
    with counted, _Computed() as computed:
        shard = RowShard(NUM_ROWS, rank, world)
        routing = plan_routing(row_ids_TL, shard, group, [5] * world, "alltoall", pieces)
        parts = zip(routing.plans, routing.cut(weights_TL), strict=True)
        lookups = [_run(send_lookups(plan, weights)) for plan, weights in parts]
    rows_M, weights_M = (torch.cat(parts) for parts in zip(*lookups, strict=True))
    assert rows_M.dtype == torch.int32 and all(plan.all_present for plan in routing.plans)
    # one for the numbers of all pieces
    assert len(waits) == 1
    # each of these makes the host wait for a number from a GPU
    assert not computed.names.keys() & {"_local_scalar_dense", "bincount", "nonzero"}
    with _Computed() as computed:
        (gradient,) = torch.autograd.grad(weights_M, weights_TL, weights_M.detach())
    # autograd's own backward of a gather would scatter into zeros
    assert computed.names["index_select"] == 1
    assert not computed.names.keys() & {"index_add_", "scatter_add_", "index_put_", "index_add"}
    assert torch.equal(gradient, weights_TL)


@pytest.mark.gloo
@pytest.mark.parametrize("pieces", [1, 3])
def test_alltoall_waits_once_and_its_backward_gathers(pieces: int) -> None:
    run_distributed(_alltoall_waits_once, 2, pieces)
