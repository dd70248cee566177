"""Routing plans on one rank and on several. tests/layers checks the sums."""

from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamem.parallel import collectives
from megamem.parallel.routing import (
    all_gather_tokens,
    choose_wire,
    combine,
    dispatch,
    plan_routing,
    receive,
    tokens_of_bags,
)
from megamem.parallel.row_shard import RowShard
from tests.helpers.distributed import run_distributed

WIRES = ("alltoall", "allgather")
NUM_ROWS, LOOKUPS = 37, 6


def test_choice_of_wire() -> None:
    assert [choose_wire("auto", size) for size in (1, 8, 9)] == ["allgather"] * 2 + ["alltoall"]
    assert choose_wire("alltoall", 2) == "alltoall"
    assert choose_wire("allgather", 64) == "allgather"


@pytest.mark.parametrize("wire", WIRES)
def test_alone_every_lookup_stays_in_its_bag(wire) -> None:
    torch.manual_seed(1)
    row_ids_TL = torch.randint(NUM_ROWS, (5, LOOKUPS))
    plan = plan_routing(row_ids_TL, RowShard(NUM_ROWS, 0, 1), None, [5], wire)
    assert plan.offsets.tolist() == list(range(0, 31, LOOKUPS))
    assert torch.equal(receive(plan).view(5, LOOKUPS), row_ids_TL)
    weights_TL = torch.rand(5, LOOKUPS)
    assert torch.equal(dispatch(plan, weights_TL).view(5, LOOKUPS), weights_TL)
    bags_GV = torch.rand(5, 8)
    assert torch.equal(combine(plan, bags_GV), bags_GV)
    assert plan.all_present and plan.equal_bags and plan.expected == 5 * LOOKUPS


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
    with _Computed() as computed:
        plan = plan_routing(row_ids_TL, RowShard(NUM_ROWS, 0, 1), None, [5], wire)
        weights_M, tokens = dispatch(plan, weights_TL), all_gather_tokens(plan, x_TD)
        assert receive(plan).data_ptr() == row_ids_TL.data_ptr()
        results = (weights_M, tokens_of_bags(plan, tokens), combine(plan, bags_GV))
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
    for wire in WIRES:
        plan = plan_routing(row_ids[rank], shard, dist.group.WORLD, counts, wire)
        weights_M = dispatch(plan, weights[rank])
        row_ids_M = receive(plan)
        assert plan.offsets[-1] == len(row_ids_M) == len(weights_M)
        assert len(plan.offsets) == sum(plan.bag_counts) + 1
        # what the ops are told of the lookups
        assert plan.all_present == (wire == "alltoall") and plan.equal_bags == (wire == "allgather")
        assert not plan.all_present or (row_ids_M >= 0).all()
        assert not plan.equal_bags or len(plan.offsets.diff().unique()) == 1
        share = 1 if plan.all_present else shard.num_local / NUM_ROWS
        assert plan.expected == int(len(row_ids_M) * share)
        # -1 alone reads nothing: marks of rows count from the end
        assert (row_ids_M >= -1).all() and (row_ids_M < shard.num_local).all()

        # every token's bag holds its lookups of rows here, in their order, and nothing else
        bag = 0
        for source in range(world):
            for token in range(plan.bag_counts[source]):
                lookups = slice(plan.offsets[bag], plan.offsets[bag + 1])
                present = row_ids_M[lookups] >= 0
                found = row_ids_M[lookups][present] + shard.start
                found_weights = weights_M[lookups][present]
                expected = expected_weights = torch.empty(0)
                if token < counts[source]:
                    here = shard.owner(row_ids[source][token]) == rank
                    expected = row_ids[source][token][here]
                    expected_weights = weights[source][token][here]
                assert found.tolist() == expected.tolist()
                assert found_weights.tolist() == expected_weights.tolist()
                bag += 1

        # partial bags of ones sum to the number of ranks
        out_TV = combine(plan, torch.ones(sum(plan.bag_counts), 8))
        assert torch.equal(out_TV, torch.full((counts[rank], 8), float(world)))


def _checks(counts: list[int]) -> None:
    _lookups_arrive_where_their_rows_are(counts, skewed=False)
    _lookups_arrive_where_their_rows_are(counts, skewed=True)


@pytest.mark.gloo
@pytest.mark.parametrize("counts", [[4, 4], [5, 0, 2]], ids=str)
def test_lookups_arrive_where_their_rows_are(counts: list[int]) -> None:
    run_distributed(_checks, len(counts), counts)


def _alltoall_waits_once() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    weights_TL = torch.rand(5, LOOKUPS, requires_grad=True)
    row_ids_TL = torch.randint(NUM_ROWS, (5, LOOKUPS), dtype=torch.int32)
    waits, numbers = [], collectives.HostCopy.numbers
    counted = mock.patch.object(
        collectives.HostCopy, "numbers", lambda copy: waits.append(copy) or numbers(copy)
    )
    with counted, _Computed() as computed:
        shard = RowShard(NUM_ROWS, rank, world)
        plan = plan_routing(row_ids_TL, shard, dist.group.WORLD, [5] * world, "alltoall")
        weights_M = dispatch(plan, weights_TL)
        assert receive(plan).dtype == torch.int32
    assert len(waits) == 1 and plan.all_present
    # each of these makes the host wait for a number from a GPU
    assert not computed.names.keys() & {"_local_scalar_dense", "bincount", "nonzero"}
    assert sum(plan.send) == 5 * LOOKUPS and sum(plan.recv) == len(weights_M)
    with _Computed() as computed:
        (gradient,) = torch.autograd.grad(weights_M, weights_TL, weights_M.detach())
    # what the exchange fills, and one gather; autograd's own backward would scatter into zeros
    assert computed.names == {"new_empty": 1, "index_select": 1}
    assert torch.equal(gradient, weights_TL)


@pytest.mark.gloo
def test_alltoall_waits_once_and_its_backward_gathers() -> None:
    run_distributed(_alltoall_waits_once, 2)
