"""The replicas of a shard by node, so that their sums cross the network once for each node.

The ranks that hold the same shard sum its gradients (megamem.parallel.row_reduction). Where every
node has I of them, I > 1, and there are n nodes, each rank is in two groups more. With replicas on
ranks 0, 2, 4 and 6, and nodes of 4 ranks:

    node 0: ranks 0 2              inside   0 2 and 4 6    the replicas of one node
    node 1: ranks 4 6              across   0 4 and 2 6    one replica of each node

The replicas of a node sum first, each a part of the numbers. Then each sums its part with those
that have the same part on other nodes, and last the replicas of a node give each other the sums. To
sum B bytes a rank sends

    inside a node    2 B (I - 1) / I
    between nodes    2 B (n - 1) / n / I

One all-reduce over all replicas has no such bound: each replica may send nearly 2 B between nodes.
A ring that visits node after node sends no more in all than the above, but from one rank of a node,
if the backend does not make a ring for each network adapter.

In all other cases the sum is one all-reduce: if there is one replica on each node, if all are on
one, or if nodes have different numbers of them, which then cannot share the numbers evenly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class NodeGroups:
    """The two groups of one rank over which the replicas of a shard are summed."""

    inside: ProcessGroup
    """The replicas on the node of this rank."""

    across: ProcessGroup
    """One replica on each node."""


def nodes_of_ranks(sizes: Sequence[int]) -> list[int]:
    """Return the number of each rank's node, from 0.

    Args:
        sizes: for each rank of the world, the ranks on its node, which are consecutive. Ranks that
            disagree on the size of their node count as being on different ones.
    """
    nodes: list[int] = []
    node, first = -1, 0
    for rank, size in enumerate(sizes):
        if rank == 0 or rank - first >= sizes[first] or size != sizes[first]:
            node, first = node + 1, rank
        nodes.append(node)
    return nodes


def replicas_by_node(
    replicas: Sequence[int], nodes: Sequence[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the groups inside and across nodes of the replicas of one shard, as ranks.

    Args:
        replicas: the ranks that hold the shard.
        nodes: the node of each rank of the world.

    Returns:
        The groups inside nodes and those across; none of either if one all-reduce is used.
    """
    on_node: dict[int, list[int]] = {}
    for rank in replicas:
        on_node.setdefault(nodes[rank], []).append(rank)
    inside = list(on_node.values())
    counts = {len(ranks) for ranks in inside}
    if len(inside) == 1 or len(counts) > 1 or counts == {1}:
        return [], []
    return inside, [list(ranks) for ranks in zip(*inside, strict=True)]


def all_by_node(
    shards: Sequence[Sequence[int]], nodes: Sequence[int] | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the groups of replicas_by_node() of all shards; none if the nodes are not known."""
    inside: list[list[int]] = []
    across: list[list[int]] = []
    if nodes is None:
        return inside, across
    for replicas in shards:
        near, far = replicas_by_node(replicas, nodes)
        inside += near
        across += far
    return inside, across


def all_reduce_bytes(bytes_held: float, ranks: int) -> float:
    """Return the bytes that each rank sends in an all-reduce: reduce-scatter, then all-gather."""
    return 2 * bytes_held * (ranks - 1) / ranks


def reduction_bytes(
    bytes_held: float, replicas: Sequence[int], nodes: Sequence[int]
) -> tuple[float, float]:
    """Return the bytes that a rank sends inside a node and between nodes to sum over replicas.

    Where one all-reduce is used over several nodes, all bytes of the rank count as sent between
    nodes, as they are for a rank whose neighbour in the ring is on another node.

    Args:
        bytes_held: bytes of the numbers that are summed.
        replicas: the ranks that hold them.
        nodes: the node of each rank of the world.
    """
    inside, across = replicas_by_node(replicas, nodes)
    if not inside:
        sent = all_reduce_bytes(bytes_held, len(replicas))
        one_node = len({nodes[rank] for rank in replicas}) <= 1
        return (sent, 0.0) if one_node else (0.0, sent)
    near, far = len(inside[0]), len(inside)
    # reduce-scatter and all-gather inside, around an all-reduce of the parts
    return all_reduce_bytes(bytes_held, near), all_reduce_bytes(bytes_held / near, far)
