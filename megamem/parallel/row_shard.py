"""Which rank holds which rows of the value table."""

from dataclasses import dataclass

from torch import Tensor


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

    def owner(self, row_ids: Tensor) -> Tensor:
        """Rank that holds each row."""
        return ((row_ids + 1) * self.world_size - 1) // self.num_rows

    def local_on(self, owners: Tensor, row_ids: Tensor) -> Tensor:
        """Each row's place in its owner's shard."""
        return row_ids - owners * self.num_rows // self.world_size


def even_counts(total: int, parts: int) -> list[int]:
    """`total` things over `parts` ranks, cut as RowShard cuts rows."""
    return [RowShard(total, part, parts).num_local for part in range(parts)]
