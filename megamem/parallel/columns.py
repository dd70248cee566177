"""Brings lookups to the ranks that hold the columns of a row, and the columns home.

rank p of the column ranks         [r, v_p]: its columns of every row of the set
gather_lookups                     every lookup of the set's tokens to every rank of the set
(each sums its columns)
join_columns                       token by token, the columns travel home and are joined
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megamem.parallel.collectives import (
    PendingCollectives,
    gather_padded,
    gather_weights,
    join_padded,
)


def gather_lookups(
    row_ids_TL: Tensor,
    weights_TL: Tensor,
    num_rows: int,
    counts: list[int],
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """The lookups of all the column ranks' tokens -> row_ids_XL, weights_XL.

    Args:
        row_ids_TL: rows of the whole table, not negative.
        weights_TL: their weights.
        num_rows: R.
        counts: T of every column rank; X is their sum.
        group: the column ranks.
    """
    if group is None:
        return row_ids_TL, weights_TL
    size, pending = max(counts), PendingCollectives()
    # rows of all but the largest tables fit in half the bytes
    row_ids_TL = row_ids_TL.to(torch.int32 if num_rows < 2**31 else torch.int64)
    row_ids = gather_padded(row_ids_TL, size, group, pending=pending)
    weights = gather_weights(weights_TL, size, group, pending)
    pending.wait()
    return join_padded(row_ids, counts), join_padded(weights, counts)
