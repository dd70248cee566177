"""The memory group: the ranks over which one table is sharded, and its process groups.

The ranks of a pipeline stage, with the tensor-parallel rank varying fastest, are divided into
memory groups of W consecutive ranks. Each group holds one complete table, as a grid of shards
(megamem.spec.Grid). With a stage of 16 ranks, W = 8 and the grid 2x1x2x2, two nodes of four ranks:

    memory groups                        groups of rank 13
    0: ranks 0 1 | 2 3   4 5 | 6 7       columns        12 13         the same rows, other columns
    1: ranks 8 9 | 10 11 12 13 | 14 15   rows           9 11 13 15    the same columns, other rows
                                         local rows     13 15         those of its node
                                         node rows      9 13          those at its place of a node
                                         local columns  12 13
                                         inside         12 13 14 15   all ranks of its node
                                         across         9 13          one rank of every node
                                         replicas       5 13          the same shard, in another
                                                                      memory group

Where layers of several stages share a table, each of these stages holds it, and the memory groups
of all of them are replicas of one table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megamem.parallel.collectives import group_rank, group_size
from megamem.parallel.replica_groups import NodeGroups, all_by_node
from megamem.spec import Grid


@dataclass(frozen=True)
class MemoryGroup:
    """The process groups of one rank. None stands for a group of this rank alone."""

    members: ProcessGroup | None = None
    """The W = row_ranks * column_ranks ranks that share the table; the column rank varies fastest.
    """

    rows: ProcessGroup | None = None
    """The ranks that hold the same columns of other rows."""

    columns: ProcessGroup | None = None
    """The ranks that hold other columns of the same rows."""

    replicas: ProcessGroup | None = None
    """The ranks that hold the same shard in other memory groups."""

    replica_nodes: NodeGroups | None = None
    """The replicas by node, where they are summed inside nodes first."""

    local_rows: ProcessGroup | None = None
    """The ranks of this node that hold the same columns of other rows."""

    node_rows: ProcessGroup | None = None
    """The ranks at this place of the nodes that hold the same columns of other rows."""

    node_columns: ProcessGroup | None = None
    """The ranks at this place of the nodes that hold other columns of the same rows."""

    local_columns: ProcessGroup | None = None
    """The ranks of this node that hold other columns of the same rows."""

    inside: ProcessGroup | None = None
    """The ranks of this node."""

    across: ProcessGroup | None = None
    """The ranks at this place of all nodes."""

    grid: Grid = Grid()
    """How the members are laid out."""

    token_ranks: tuple[int, ...] | None = None
    """Each member's rank in the group over which replicated tokens are split; by default its rank
    among the members."""

    @classmethod
    def of_rows(cls, group: ProcessGroup | None) -> "MemoryGroup":
        """Return a memory group that shards a table by rows over `group`, without replicas."""
        grid = Grid(local_rows=group_size(group))
        return cls(members=group, rows=group, local_rows=group, inside=group, grid=grid)

    @property
    def world_size(self) -> int:
        """W, the ranks that share the table."""
        return self.grid.size

    @property
    def row_ranks(self) -> int:
        """Ranks over which the rows are sharded."""
        return self.grid.row_ranks

    @property
    def column_ranks(self) -> int:
        """Ranks over which the columns of a row are sharded."""
        return self.grid.column_ranks

    @property
    def coordinates(self) -> tuple[int, int, int, int]:
        """Node row, node column, local row and local column of this rank."""
        return self.grid.coordinates(self.member)

    @property
    def member(self) -> int:
        """This rank's number among the members."""
        return group_rank(self.members)

    @property
    def replica(self) -> int:
        """Number of this rank among those that hold the same shard; 0 on exactly one of them."""
        return group_rank(self.replicas)

    def split_counts(self, counts: list[int]) -> list[int]:
        """Return the number of tokens of each member.

        Args:
            counts: number of tokens of each rank of the group that splits replicated tokens.
        """
        return [counts[rank] for rank in self.token_ranks or range(self.world_size)]


# for each kind of group within a memory group, the coordinates in which its members differ
NODE_ROW, NODE_COLUMN, LOCAL_ROW, LOCAL_COLUMN = range(4)
KINDS = {
    "rows": (NODE_ROW, LOCAL_ROW),
    "columns": (NODE_COLUMN, LOCAL_COLUMN),
    "local_rows": (LOCAL_ROW,),
    "node_rows": (NODE_ROW,),
    "node_columns": (NODE_COLUMN,),
    "local_columns": (LOCAL_COLUMN,),
    "inside": (LOCAL_ROW, LOCAL_COLUMN),
    "across": (NODE_ROW, NODE_COLUMN),
}


@dataclass(frozen=True)
class Partition:
    """All process groups of a world, as ranks; each rank is in one group of each kind."""

    grid: Grid
    groups: dict[str, list[list[int]]]
    """Kind of group, as MemoryGroup names it -> the ranks of each group."""


def partition(stages: list[list[int]], grid: Grid, joined: Sequence[int] = ()) -> Partition:
    """Divide the ranks of each pipeline stage into memory groups.

    Args:
        stages: the ranks of each pipeline stage; ranks with the fastest links are consecutive.
        grid: the layout of a memory group; its size divides the number of ranks of a stage.
        joined: the stages whose memory groups hold one and the same table.
    """
    found: dict[str, list[list[int]]] = {"members": []}
    holders: dict[int, list[list[int]]] = {}
    for stage, ranks in enumerate(stages):
        assert len(ranks) % grid.size == 0, (len(ranks), grid)
        groups = [ranks[at : at + grid.size] for at in range(0, len(ranks), grid.size)]
        found["members"].extend(groups)
        holders.setdefault(min(joined) if stage in joined else stage, []).extend(groups)
    for kind, differing in KINDS.items():
        found[kind] = [cut for group in found["members"] for cut in _cut(group, grid, differing)]
    found["replicas"] = [
        list(same) for held in holders.values() for same in zip(*held, strict=True)
    ]
    return Partition(grid, found)


def _cut(group: list[int], grid: Grid, differing: tuple[int, ...]) -> list[list[int]]:
    """Return the members that differ in no other coordinates, in the order of members."""
    parts: dict[tuple[int, ...], list[int]] = {}
    for member, rank in enumerate(group):
        place = grid.coordinates(member)
        same = tuple(at for axis, at in enumerate(place) if axis not in differing)
        parts.setdefault(same, []).append(rank)
    return list(parts.values())


def form(
    groups: Partition,
    token_ranks: list[int] | None = None,
    timeout: timedelta | None = None,
    nodes: Sequence[int] | None = None,
) -> MemoryGroup:
    """Create the process groups of a partition. Every rank of the world must call this.

    Kinds of groups that consist of the same ranks share their communicators.

    Args:
        groups: the groups of the world.
        token_ranks: for every rank of the world, its rank in the group that splits its tokens.
        timeout: time-out of every collective; None is the default of the backend.
        nodes: the node of every rank of the world; None sums over replicas in one step.

    Returns:
        The groups of which this rank is a member.
    """
    rank = dist.get_rank()
    formed: dict[tuple[tuple[int, ...], ...], ProcessGroup | None] = {}

    def own(lists: list[list[int]]) -> ProcessGroup | None:
        key = tuple(map(tuple, lists))
        if key not in formed:
            formed[key] = None
            for ranks in lists:
                # a group of one rank sends nothing, so it needs no communicator
                group: Any = dist.new_group(ranks, timeout) if len(ranks) > 1 else None
                formed[key] = group if rank in ranks else formed[key]
        return formed[key]

    near, far = (own(lists) for lists in all_by_node(groups.groups["replicas"], nodes))
    own_members = next(ranks for ranks in groups.groups["members"] if rank in ranks)
    return MemoryGroup(
        **{kind: own(lists) for kind, lists in groups.groups.items()},
        replica_nodes=NodeGroups(near, far) if near and far else None,
        token_ranks=tuple(token_ranks[member] for member in own_members) if token_ranks else None,
        grid=groups.grid,
    )
