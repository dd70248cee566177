"""Replicas by node: their groups, and the bytes that a sum over them sends."""

import pytest

from megamem.parallel.replica_groups import nodes_of_ranks, reduction_bytes, replicas_by_node


@pytest.mark.parametrize(
    ("sizes", "nodes"),
    [
        ([2, 2, 2, 2], [0, 0, 1, 1]),
        ([3, 3, 3, 1, 2, 2], [0, 0, 0, 1, 2, 2]),
        ([1, 1, 1], [0, 1, 2]),
        # ranks of one node that were started with other sizes, and a node whose last ranks are gone
        ([2, 3, 3, 3], [0, 1, 1, 1]),
        ([4, 4, 2, 2], [0, 0, 1, 1]),
        ([8, 8, 8], [0, 0, 0]),
        ([], []),
    ],
)
def test_ranks_of_a_node_are_consecutive(sizes: list[int], nodes: list[int]) -> None:
    assert nodes_of_ranks(sizes) == nodes


def test_the_groups_of_the_picture() -> None:
    nodes = nodes_of_ranks([4] * 8)
    assert replicas_by_node([0, 2, 4, 6], nodes) == ([[0, 2], [4, 6]], [[0, 4], [2, 6]])
    assert replicas_by_node([1, 3, 5, 7], nodes) == ([[1, 3], [5, 7]], [[1, 5], [3, 7]])


def test_every_replica_is_in_one_group_of_each_kind() -> None:
    nodes = nodes_of_ranks([6] * 18)
    for stride in (1, 2, 3):
        for first in range(stride):
            replicas = list(range(first, 18, stride))
            inside, across = replicas_by_node(replicas, nodes)
            for groups in (inside, across):
                assert sorted(rank for ranks in groups for rank in ranks) == replicas
            assert all(len({nodes[rank] for rank in ranks}) == 1 for ranks in inside)
            assert all([nodes[rank] for rank in ranks] == [0, 1, 2] for ranks in across)


@pytest.mark.parametrize(
    ("replicas", "sizes"),
    [
        pytest.param([0, 4], [4] * 8, id="one on a node"),
        pytest.param([0, 1, 2], [4] * 8, id="all on one node"),
        pytest.param([0, 1, 4], [4] * 8, id="two on one node and one on another"),
        pytest.param([0, 1, 2, 3, 4], [3, 3, 3, 2, 2], id="nodes of three and two"),
        pytest.param([3], [4] * 8, id="alone"),
    ],
)
def test_others_are_summed_in_one_step(replicas: list[int], sizes: list[int]) -> None:
    nodes = nodes_of_ranks(sizes)
    assert replicas_by_node(replicas, nodes) == ([], [])
    sent = 2 * 100 * (len(replicas) - 1) / len(replicas)
    inside, across = reduction_bytes(100, replicas, nodes)
    assert (inside, across) == ((sent, 0) if len({nodes[r] for r in replicas}) == 1 else (0, sent))


def test_bytes_between_nodes_are_shared_by_the_replicas_of_a_node() -> None:
    nodes = nodes_of_ranks([8] * 32)
    # eight replicas on each of four nodes
    assert reduction_bytes(800, range(32), nodes) == (2 * 100 * 7, 2 * 100 * 3 / 4)
    assert reduction_bytes(800, range(0, 32, 4), nodes) == (2 * 400 * 1, 2 * 400 * 3 / 4)
    assert reduction_bytes(800, range(0, 32, 8), nodes) == (0, 2 * 800 * 3 / 4)
