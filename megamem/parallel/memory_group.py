"""The ranks that one table is spread over, and which of them this rank exchanges what with.

The ranks of a pipeline stage, tensor-parallel rank fastest, are cut into memory groups of W
neighbours. Each holds the whole table, as `row_ranks` x `column_ranks` pieces:

    stage of 8 ranks, groups of 4, 2 column ranks      rank 5 of the stage
    group 0: ranks 0 1 | 2 3                           columns   4 5   hold its rows
    group 1: ranks 4 5 | 6 7                           rows      5 7   hold its columns
                                                       replicas  1 5   hold the same piece
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megamem.parallel.collectives import group_rank, group_size


@dataclass(frozen=True)
class MemoryGroup:
    """Process groups of one rank. None stands for this rank alone."""

    members: ProcessGroup | None = None
    """All that share the table: W = row_ranks * column_ranks, column rank fastest."""

    rows: ProcessGroup | None = None
    """Those that hold other rows of the same columns."""

    columns: ProcessGroup | None = None
    """Those that hold other columns of the same rows."""

    replicas: ProcessGroup | None = None
    """Those that hold the same piece in another memory group."""

    token_ranks: tuple[int, ...] | None = None
    """For each member, its rank in the group that splits replicated tokens; by default its own."""

    @classmethod
    def of_rows(cls, group: ProcessGroup | None) -> "MemoryGroup":
        """Every rank of the group holds rows of its own; no replicas."""
        return cls(members=group, rows=group)

    @property
    def world_size(self) -> int:
        """W."""
        return group_size(self.members)

    @property
    def row_ranks(self) -> int:
        return group_size(self.rows)

    @property
    def column_ranks(self) -> int:
        return group_size(self.columns)

    @property
    def replica(self) -> int:
        """0 on one of the ranks that hold this piece, another number on each other."""
        return group_rank(self.replicas)

    def split_counts(self, counts: list[int]) -> list[int]:
        """Tokens of each member, where rank p of the splitting group takes counts[p]."""
        return [counts[rank] for rank in self.token_ranks or range(self.world_size)]


@dataclass(frozen=True)
class Partition:
    """Every group of one kind that a world has; each rank is in one of each kind."""

    members: list[list[int]]
    rows: list[list[int]]
    columns: list[list[int]]
    replicas: list[list[int]]


def partition(stages: list[list[int]], world_size: int, column_ranks: int) -> Partition:
    """Cut each stage's ranks into memory groups.

    Args:
        stages: the ranks of each pipeline stage, neighbours first.
        world_size: W, a divisor of a stage's ranks.
        column_ranks: a divisor of W.
    """
    found = Partition([], [], [], [])
    for ranks in stages:
        assert len(ranks) % world_size == 0 and world_size % column_ranks == 0
        groups = [ranks[at : at + world_size] for at in range(0, len(ranks), world_size)]
        found.members.extend(groups)
        found.replicas.extend(list(same) for same in zip(*groups, strict=True))
        for group in groups:
            found.columns.extend(
                group[at : at + column_ranks] for at in range(0, world_size, column_ranks)
            )
            found.rows.extend(group[at::column_ranks] for at in range(column_ranks))
    return found


def form(
    groups: Partition,
    token_ranks: list[int] | None = None,
    timeout: timedelta | None = None,
) -> MemoryGroup:
    """Make the process groups of a partition; every rank of the world must call this.

    Args:
        groups: of the whole world.
        token_ranks: of every rank of the world, its rank in the group that splits its tokens.
        timeout: of every collective; None is that of the backend.

    Returns:
        those that this rank is in.
    """
    rank = dist.get_rank()

    def own(lists: list[list[int]]) -> ProcessGroup | None:
        mine = None
        for ranks in lists:
            # a group of one exchanges nothing, so it needs no communicator
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
