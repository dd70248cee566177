"""Which rank holds which rows and columns of a value table.

R and V are the rows and the row width of the unsharded table; r and v those of one rank's shard.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

COLUMN_BLOCK = 8
"""Columns are distributed in blocks of as many as the kernels load at once."""


@dataclass(frozen=True)
class RowShard:
    """The contiguous rows of one rank: rank p of W holds rows [p * R // W, (p + 1) * R // W).

    The shards of two ranks differ by at most one row.

    >>> [RowShard(num_rows=10, rank=p, world_size=4).num_local for p in range(4)]
    [2, 3, 2, 3]
    """

    num_rows: int
    rank: int
    world_size: int

    @property
    def start(self) -> int:
        """The first row of this rank."""
        return self.rank * self.num_rows // self.world_size

    @property
    def num_local(self) -> int:
        """r, the number of rows of this rank."""
        return (self.rank + 1) * self.num_rows // self.world_size - self.start

    @property
    def local(self) -> slice:
        """The rows of this rank, as a slice of the unsharded table."""
        return slice(self.start, self.start + self.num_local)

    @property
    def even(self) -> bool:
        """Whether every rank holds the same number of rows."""
        return self.num_rows % self.world_size == 0

    def owner(self, row_ids: Tensor) -> Tensor:
        """Return the rank that holds each row, int64."""
        # products of a row id and a number of ranks need not fit in 32 bits
        return ((row_ids.long() + 1) * self.world_size - 1) // self.num_rows

    def local_on(self, owners: Tensor, row_ids: Tensor) -> Tensor:
        """Return the index of each row in the shard of its owner, given as int64."""
        return row_ids - owners * self.num_rows // self.world_size


@dataclass(frozen=True)
class TableShard:
    """The shard of an [R, V] table that one rank holds: some rows, and some columns of them.

    Blocks of 8 columns are distributed over the column ranks as rows are over the row ranks.
    """

    rows: RowShard
    column_blocks: RowShard

    @classmethod
    def cut(
        cls, shape: tuple[int, int], row: tuple[int, int] = (0, 1), column: tuple[int, int] = (0, 1)
    ) -> "TableShard":
        """Return the shard of one rank.

        Args:
            shape: (R, V), with V a multiple of 8.
            row: the row rank and the number of row ranks.
            column: the column rank and the number of column ranks.
        """
        num_rows, width = shape
        assert width % COLUMN_BLOCK == 0, width
        return cls(RowShard(num_rows, *row), RowShard(width // COLUMN_BLOCK, *column))

    @property
    def global_shape(self) -> tuple[int, int]:
        """(R, V), the shape of the unsharded table."""
        return self.rows.num_rows, self.column_blocks.num_rows * COLUMN_BLOCK

    @property
    def shape(self) -> tuple[int, int]:
        """(r, v), the shape of the shard."""
        return self.rows.num_local, self.column_blocks.num_local * COLUMN_BLOCK

    @property
    def columns(self) -> slice:
        """The columns of this rank, as a slice of the unsharded table."""
        local = self.column_blocks.local
        return slice(local.start * COLUMN_BLOCK, local.stop * COLUMN_BLOCK)

    @property
    def offset(self) -> tuple[int, int]:
        """The first row and the first column of the shard."""
        return self.rows.start, self.columns.start

    @property
    def even(self) -> bool:
        """Whether the shards of all ranks have the same shape."""
        return self.rows.even and self.column_blocks.even

    @cached_property
    def widths(self) -> list[int]:
        """The number of columns of every column rank."""
        blocks = self.column_blocks
        return [count * COLUMN_BLOCK for count in even_counts(blocks.num_rows, blocks.world_size)]


def id_dtype(num_rows: int) -> torch.dtype:
    """Return the dtype of row ids: int32, which halves their bytes, for all but huge tables."""
    return torch.int32 if num_rows < 2**31 else torch.int64


def even_counts(total: int, parts: int) -> list[int]:
    """Return the share of each of `parts` ranks in `total`, divided as RowShard divides rows."""
    return [RowShard(total, part, parts).num_local for part in range(parts)]
