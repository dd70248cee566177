"""The memory group: the ranks over which one table is sharded, and its process groups.

The ranks of a pipeline stage, with the tensor-parallel rank varying fastest, are divided into
memory groups of W consecutive ranks. Each group holds one complete table, as `row_ranks` x
`column_ranks` shards. With a stage of 8 ranks, W = 4 and 2 column ranks:

    memory groups                  groups of rank 5
    0: ranks 0 1 | 2 3             columns   4 5   the same rows, other columns
    1: ranks 4 5 | 6 7             rows      5 7   the same columns, other rows
                                   replicas  1 5   the same shard, in another memory group

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

    token_ranks: tuple[int, ...] | None = None
    """Each member's rank in the group over which replicated tokens are split; by default its rank
    among the members."""

    @classmethod
    def of_rows(cls, group: ProcessGroup | None) -> "MemoryGroup":
        """Return a memory group that shards a table by rows over `group`, without replicas."""
        return cls(members=group, rows=group)

    @property
    def world_size(self) -> int:
        """W, the ranks that share the table."""
        return group_size(self.members)

    @property
    def row_ranks(self) -> int:
        """Ranks over which the rows are sharded."""
        return group_size(self.rows)

    @property
    def column_ranks(self) -> int:
        """Ranks over which the columns of a row are sharded."""
        return group_size(self.columns)

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


@dataclass(frozen=True)
class Partition:
    """All process groups of a world, as ranks; each rank is in one group of each kind."""

    members: list[list[int]]
    rows: list[list[int]]
    columns: list[list[int]]
    replicas: list[list[int]]


def partition(
    stages: list[list[int]], world_size: int, column_ranks: int, joined: Sequence[int] = ()
) -> Partition:
    """Divide the ranks of each pipeline stage into memory groups.

    Args:
        stages: the ranks of each pipeline stage; ranks with the fastest links are consecutive.
        world_size: W, which divides the number of ranks of a stage.
        column_ranks: ranks over which the columns of a row are sharded, which divides W.
        joined: the stages whose memory groups hold one and the same table.
    """
    found = Partition([], [], [], [])
    holders: dict[int, list[list[int]]] = {}
    for stage, ranks in enumerate(stages):
        assert len(ranks) % world_size == 0 and world_size % column_ranks == 0
        groups = [ranks[at : at + world_size] for at in range(0, len(ranks), world_size)]
        found.members.extend(groups)
        holders.setdefault(min(joined) if stage in joined else stage, []).extend(groups)
        for group in groups:
            found.columns.extend(
                group[at : at + column_ranks] for at in range(0, world_size, column_ranks)
            )
            found.rows.extend(group[at::column_ranks] for at in range(column_ranks))
    for groups in holders.values():
        found.replicas.extend(list(same) for same in zip(*groups, strict=True))
    return found


def form(
    groups: Partition,
    token_ranks: list[int] | None = None,
    timeout: timedelta | None = None,
) -> MemoryGroup:
    """Create the process groups of a partition. Every rank of the world must call this.

    Args:
        groups: the groups of the world.
        token_ranks: for every rank of the world, its rank in the group that splits its tokens.
        timeout: time-out of every collective; None is the default of the backend.

    Returns:
        The groups of which this rank is a member.
    """
    rank = dist.get_rank()

    def own(lists: list[list[int]]) -> ProcessGroup | None:
        mine = None
        for ranks in lists:
            # a group of one rank sends nothing, so it needs no communicator
            group: Any = dist.new_group(ranks, timeout) if len(ranks) > 1 else None
            mine = group if rank in ranks else mine
        return mine

    members = own(groups.members)
    one_column = all(len(ranks) == 1 for ranks in groups.columns)
    one_row = all(len(ranks) == 1 for ranks in groups.rows)
    own_members = next(ranks for ranks in groups.members if rank in ranks)
    return MemoryGroup(
        members=members,
        rows=members if one_column else own(groups.rows),
        columns=members if one_row else own(groups.columns),
        replicas=own(groups.replicas),
        token_ranks=tuple(token_ranks[member] for member in own_members) if token_ranks else None,
    )
