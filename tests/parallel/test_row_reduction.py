"""Gradients of rows, summed over replicas on several nodes, are those of one process.

Nodes are emulated: groups of ranks of one machine.
"""

from collections import defaultdict
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamem.parallel import row_reduction
from megamem.parallel.replica_groups import (
    NodeGroups,
    nodes_of_ranks,
    reduction_bytes,
    replicas_by_node,
)
from megamem.parallel.row_reduction import RowReduction
from tests.helpers.distributed import run_distributed


def _node_groups(nodes: list[int]) -> NodeGroups | None:
    rank = dist.get_rank()
    lists = replicas_by_node(range(dist.get_world_size()), nodes)
    mine = []
    for ranks in (ranks for kind in lists for ranks in kind):
        group = dist.new_group(ranks)
        if rank in ranks:
            mine.append(group)
    return NodeGroups(*mine) if mine else None


def _part(rank: int, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradients of a rank, NaN where it has none, and the rows for which it has one."""
    generator = torch.Generator().manual_seed(rank)
    touched_r = torch.rand(rows, generator=generator) < 0.3
    buffer_rV = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    return buffer_rV.masked_fill_(~touched_r.unsqueeze(1), torch.nan), touched_r


def _counted(sent: dict[Any, int]) -> Any:
    """Patches that count the bytes that this rank sends to each group."""

    def count(name: str, share: Any) -> Any:
        real = getattr(dist, name)

        def counted(*tensors: Tensor, group: Any, **options: Any) -> Any:
            sent[group] += share(tensors[-1].nbytes, dist.get_world_size(group))
            return real(*tensors, group=group, **options)

        return mock.patch.object(dist, name, counted)

    return (
        count("reduce_scatter_tensor", lambda held, size: held * (size - 1) / size),
        count("all_reduce", lambda held, size: 2 * held * (size - 1) / size),
        count("all_gather_into_tensor", lambda held, size: held * (size - 1)),
    )


def _as_one_process(sizes: list[int], rows: int, width: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    nodes = nodes_of_ranks(sizes)
    groups = _node_groups(nodes)
    assert groups is not None
    for dtype, only_touched in product(
        (torch.float64, torch.float32, torch.bfloat16), (False, True)
    ):
        parts = [_part(other, rows, width, dtype) for other in range(world)]
        expected_rV = sum(part.double().nan_to_num() for part, _ in parts)
        any_r = torch.stack([touched for _, touched in parts]).any(0)
        buffer_rV, touched_r = _part(rank, rows, width, dtype)
        sent: dict[Any, int] = defaultdict(int)
        one, two, three = _counted(sent)
        with one, two, three:
            reduction = RowReduction(
                buffer_rV,
                touched_r,
                dist.group.WORLD,
                groups,
                only_touched=only_touched,
                defined=False,
            )
            blocks = list(reduction)
        what = f"{dtype}, only touched: {only_touched}"
        assert torch.equal(touched_r, any_r), what
        assert len(blocks) > row_reduction.IN_FLIGHT, what
        # what is given out is what the buffer holds, and all of it
        given = torch.cat([torch.arange(rows)[block.rows] for block in blocks])
        assert torch.equal(given, any_r.nonzero()[:, 0] if only_touched else torch.arange(rows))
        for block in blocks:
            assert torch.equal(buffer_rV[block.rows], block.sums_EV), what
        tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(
            buffer_rV[any_r],
            expected_rV[any_r].to(dtype),
            msg=what,
            **tolerance,
        )
        # the same bits on every replica
        found = [torch.empty_like(buffer_rV[any_r]) for _ in range(world)]
        dist.all_gather(found, buffer_rV[any_r].contiguous())
        assert all(torch.equal(found[0], other) for other in found), what
        _as_planned(sent, groups, len(given) * width * dtype.itemsize + rows, nodes)


def _as_planned(sent: dict[Any, int], groups: NodeGroups, held: int, nodes: list[int]) -> None:
    """The flags, and the last block, are padded to a multiple of the replicas of a node."""
    inside, across = reduction_bytes(held, range(dist.get_world_size()), nodes)
    assert set(sent) == {groups.inside, groups.across}
    padding = 2 * 8 * dist.get_world_size(groups.inside)
    assert inside <= sent[groups.inside] <= inside + padding
    assert across <= sent[groups.across] <= across + padding


def _all(sizes: list[int], rows: int, width: int) -> None:
    # five rows of float64, some of which are not divided evenly by the replicas of a node
    with mock.patch.object(row_reduction, "BLOCK_BYTES", 5 * 8 * width):
        _as_one_process(sizes, rows, width)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("sizes", "rows", "width"),
    [
        pytest.param([2] * 4, 101, 7, id="2 nodes of 2"),
        pytest.param([3] * 6, 211, 8, id="2 nodes of 3"),
        pytest.param([2] * 6, 150, 16, id="3 nodes of 2"),
    ],
)
def test_sums_by_node_are_those_of_one_process(sizes: list[int], rows: int, width: int) -> None:
    run_distributed(_all, len(sizes), sizes, rows, width)


def _a_block_crosses_while_others_are_inside() -> None:
    """The steps of the first block start before the second's, which start before the third's."""
    groups = _node_groups([0, 0, 1, 1])
    assert groups is not None
    started: list[str] = []
    names = {
        "reduce_scatter_tensor": "scatter",
        "all_reduce": "across",
        "all_gather_into_tensor": "gather",
    }
    patches = []
    for name, short in names.items():
        real = getattr(dist, name)

        def noted(*args: Any, real: Any = real, short: str = short, **options: Any) -> Any:
            started.append(short)
            return real(*args, **options)

        patches.append(mock.patch.object(dist, name, noted))
    buffer_rV, touched_r = torch.ones(8, 4), torch.ones(8, dtype=torch.bool)
    with patches[0], patches[1], patches[2], mock.patch.object(row_reduction, "BLOCK_BYTES", 32):
        reduction = RowReduction(
            buffer_rV, touched_r, dist.group.WORLD, groups, only_touched=False, defined=True
        )
        assert started == [
            *("scatter", "across", "gather"),  # whether rows were touched
            "scatter",
            *("across", "scatter"),
            *("gather", "across", "scatter"),
        ]
        del started[:]
        blocks = iter(reduction)
        next(blocks)
        # nothing but the first block has been waited for to its end
        assert started == ["gather", "across", "scatter"]
        assert len(list(blocks)) == 3
    assert started == ["gather", "across", "scatter", "gather", "across", "gather"]
    assert torch.equal(buffer_rV, torch.full_like(buffer_rV, 4))


@pytest.mark.gloo
def test_a_block_crosses_the_network_while_others_are_inside_nodes() -> None:
    run_distributed(_a_block_crosses_while_others_are_inside, 4)
