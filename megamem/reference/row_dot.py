"""Dot product of each lookup's row with its bag's vector: the specification of the op.

Letters: r rows on this rank, V row width, M lookups, G bags, E lookups that read a row.
"""

import torch
from torch import Tensor


def row_dot(values_rV: Tensor, vectors_GV: Tensor, row_ids_M: Tensor, offsets: Tensor) -> Tensor:
    """Return dots[m] = values[row_ids[m]] . vectors[g], where offsets[g] <= m < offsets[g + 1].

    A lookup with a negative row id gives 0, whatever its bag's vector. Sums are formed in fp32
    (fp64 for fp64 tables).

    Args:
        values_rV: rows of a table.
        vectors_GV: the vector of each bag.
        row_ids_M: int64 row that each lookup reads, or -1 for none.
        offsets: [G + 1] int64, where the lookups of each bag start; the last entry is M.

    Returns:
        dots_M: fp32 (fp64 for fp64 tables).
    """
    accumulate = torch.promote_types(values_rV.dtype, torch.float32)
    bag_ids_M = torch.repeat_interleave(
        torch.arange(len(offsets) - 1, device=offsets.device),
        offsets.diff(),
        output_size=len(row_ids_M),
    )
    (present,) = (row_ids_M >= 0).nonzero(as_tuple=True)
    # cast before the gather, so that autograd sums the gradients of a row unrounded as well
    rows_EV = values_rV.to(accumulate)[row_ids_M[present]]
    products_EV = rows_EV * vectors_GV.to(accumulate)[bag_ids_M[present]]
    dots_M = products_EV.new_zeros(len(row_ids_M))
    return dots_M.index_put((present,), products_EV.sum(-1))
