"""Product of table rows with the vector of the bag that reads them, as arithmetic."""

import torch
from torch import Tensor


def row_dot(values_rV: Tensor, vectors_GV: Tensor, row_ids_M: Tensor, offsets: Tensor) -> Tensor:
    """dots[m] = values[row_ids[m]] . vectors[g], where offsets[g] <= m < offsets[g + 1].

    A lookup with a negative row id gives 0, whatever its bag's vector. Sums are formed in fp32
    (fp64 for fp64 tables).

    Args:
        values_rV: rows of a table.
        vectors_GV: one for each bag.
        row_ids_M: int64 row each lookup reads, or -1 for none.
        offsets: [G + 1] int64, where each bag starts; the last entry is M.

    Returns:
        dots_M in fp32 (fp64).
    """
    accumulate = torch.promote_types(values_rV.dtype, torch.float32)
    bag_ids_M = torch.repeat_interleave(
        torch.arange(len(offsets) - 1, device=offsets.device),
        offsets.diff(),
        output_size=len(row_ids_M),
    )
    (present,) = (row_ids_M >= 0).nonzero(as_tuple=True)
    # cast before the gather: autograd then sums a row's gradients unrounded, too
    rows_MV = values_rV.to(accumulate)[row_ids_M[present]]
    products_MV = rows_MV * vectors_GV.to(accumulate)[bag_ids_M[present]]
    dots_M = products_MV.new_zeros(len(row_ids_M))
    return dots_M.index_put((present,), products_MV.sum(-1))
