"""Which rank holds which part of the value table."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

COLUMN_BLOCK = 8
"""Columns are dealt out in blocks of what the kernels load at once."""


@dataclass(frozen=True)
class RowShard:
    """Contiguous rows, as even as they come: rank p of W holds rows [p * R // W, (p + 1) * R // W).

    >>> [RowShard(num_rows=10, rank=p, world_size=4).num_local for p in range(4)]
    [2, 3, 2, 3]
    """

    num_rows: int
    rank: int
    world_size: int

    @property
    def start(self) -> int:
        """First row of this rank."""
        return self.rank * self.num_rows // self.world_size

    @property
    def num_local(self) -> int:
        """r, the rows of this rank."""
        return (self.rank + 1) * self.num_rows // self.world_size - self.start

    @property
    def local(self) -> slice:
        """The rows of this rank."""
        return slice(self.start, self.start + self.num_local)

    @property
    def even(self) -> bool:
        """Every rank holds as many."""
        return self.num_rows % self.world_size == 0

    def owner(self, row_ids: Tensor) -> Tensor:
        """Rank that holds each row."""
        return ((row_ids + 1) * self.world_size - 1) // self.num_rows

    def local_on(self, owners: Tensor, row_ids: Tensor) -> Tensor:
        """Each row's place in its owner's shard."""
        return row_ids - owners * self.num_rows // self.world_size


@dataclass(frozen=True)
class TableShard:
    """The piece of an [R, V] table that one rank holds: some rows, and some columns of them.

    Columns are dealt out in blocks of 8, as rows are one by one.
    """

    rows: RowShard
    column_blocks: RowShard

    @classmethod
    def cut(
        cls, shape: tuple[int, int], row: tuple[int, int] = (0, 1), column: tuple[int, int] = (0, 1)
    ) -> "TableShard":
        """The piece of one rank.

        Args:
            shape: R, V; V a multiple of 8.
            row: which of how many row ranks.
            column: which of how many column ranks.
        """
        num_rows, width = shape
        assert width % COLUMN_BLOCK == 0, width
        return cls(RowShard(num_rows, *row), RowShard(width // COLUMN_BLOCK, *column))

    @property
    def global_shape(self) -> tuple[int, int]:
        """R, V."""
        return self.rows.num_rows, self.column_blocks.num_rows * COLUMN_BLOCK

    @property
    def shape(self) -> tuple[int, int]:
        """r, v."""
        return self.rows.num_local, self.column_blocks.num_local * COLUMN_BLOCK

    @property
    def columns(self) -> slice:
        """The columns of this rank."""
        local = self.column_blocks.local
        return slice(local.start * COLUMN_BLOCK, local.stop * COLUMN_BLOCK)

    @property
    def offset(self) -> tuple[int, int]:
        """Where the piece begins in the table."""
        return self.rows.start, self.columns.start

    @property
    def even(self) -> bool:
        """All ranks' pieces have one shape."""
        return self.rows.even and self.column_blocks.even

    @cached_property
    def widths(self) -> list[int]:
        """v of every column rank."""
        blocks = self.column_blocks
        return [count * COLUMN_BLOCK for count in even_counts(blocks.num_rows, blocks.world_size)]


def even_counts(total: int, parts: int) -> list[int]:
    """`total` things over `parts` ranks, cut as RowShard cuts rows."""
    return [RowShard(total, part, parts).num_local for part in range(parts)]
