"""Weighted sum of table rows into bags: the specification of the op.

Letters: r rows on this rank, V row width, M lookups, O cores (weights of a lookup), G bags.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Columns of a shard that have the same weight."""

    core: int
    """Which of the weights of a lookup."""
    start: int
    """The first of the columns, counted in the shard."""
    end: int
    """After the last of them."""


@dataclass(frozen=True)
class Cores:
    """Which of several weights of a lookup each column of a shard has."""

    first_column: int
    """Column of the whole table with which the shard begins."""
    core_width: int
    """Columns of the whole table that have the same weight."""

    def pieces(self, num_columns: int) -> list[Piece]:
        """Return the pieces of a shard of so many columns, left to right."""
        end = self.first_column + num_columns
        edges = range(self.first_column // self.core_width, -(-end // self.core_width))
        return [
            Piece(
                core,
                max(0, core * self.core_width - self.first_column),
                min(num_columns, (core + 1) * self.core_width - self.first_column),
            )
            for core in edges
        ]


def embedding_bag(
    values_rV: Tensor,
    row_ids_M: Tensor,
    weights: Tensor,
    offsets: Tensor,
    first_column: int = 0,
    core_width: int | None = None,
) -> Tensor:
    """Return the weighted sum of the rows of each bag.

    bags[g] is the sum of weights[m] * values[row_ids[m]] over offsets[g] <= m < offsets[g + 1].
    A lookup with a negative row id adds nothing, whatever its weight; a bag may be empty. Sums are
    formed in fp32 (fp64 for fp64 tables) and rounded once.

    With weights [M, O], column c of a row has weights[m, (first_column + c) // core_width].

    Args:
        values_rV: rows of the value table.
        row_ids_M: int64 row that each lookup reads, or -1 for none.
        weights: [M] or [M, O], weight of each lookup, or of each of its cores.
        offsets: [G + 1] int64, where the lookups of each bag start; the last entry is M.
        first_column: column of the whole table with which these rows begin.
        core_width: columns of the whole table that have the same weight; None for V // O.

    Returns:
        bags_GV: in the dtype of the table.
    """
    if weights.dim() == 1:
        return _sum_bags(values_rV, row_ids_M, weights, offsets)
    width = values_rV.shape[1]
    cores = Cores(first_column, core_width or width // weights.shape[1])
    bags = [
        _sum_bags(values_rV[:, start:end], row_ids_M, weights[:, core], offsets)
        for core, start, end in cores.pieces(width)
    ]
    return torch.cat(bags, dim=1)


def _sum_bags(values_rV: Tensor, row_ids_M: Tensor, weights_M: Tensor, offsets: Tensor) -> Tensor:
    accumulate = torch.promote_types(values_rV.dtype, torch.float32)
    present_M = row_ids_M >= 0
    # [M + 1], the number of present lookups before each lookup, and of all of them
    present_before = torch.nn.functional.pad(present_M.cumsum(0), (1, 0))
    bags_GV = torch.nn.functional.embedding_bag(
        row_ids_M[present_M].long(),
        # cast before the gather, so that autograd sums the gradients of a row unrounded as well
        values_rV.to(accumulate),
        present_before[offsets.long()],
        mode="sum",
        per_sample_weights=weights_M[present_M].to(accumulate),
        include_last_offset=True,
    )
    return bags_GV.to(values_rV.dtype)
