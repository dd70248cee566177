"""Specification of sort_lookups in plain torch.

Letters: M lookups, E lookups that read a row.
"""

import torch
from torch import Tensor


def sort_lookups(
    row_ids_M: Tensor, weights_M: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the lookups that read a row, sorted by row, and by position where rows are equal.

    The host waits for their number.

    Args:
        row_ids_M: row of the shard that each lookup reads, or a negative number for none.
        weights_M: weight of each lookup.
        offsets: [G + 1], where the lookups of each bag start; the last entry is M.

    Returns:
        rows_E: row of each lookup, ascending.
        order_E: its position before the sort.
        bags_E: its bag.
        weights_E: its weight.
    """
    (positions_E,) = torch.where(row_ids_M >= 0)
    rows_E, order = row_ids_M[positions_E].sort(stable=True)
    order_E = positions_E[order]
    bags_E = torch.searchsorted(offsets, order_E.to(offsets.dtype), right=True) - 1
    return rows_E, order_E, bags_E, weights_M[order_E]
