"""Weighted sum of table rows into bags, as arithmetic."""

import torch
from torch import Tensor


def embedding_bag(
    values_rV: Tensor, row_ids_M: Tensor, weights_M: Tensor, offsets: Tensor
) -> Tensor:
    """bags[g] = sum of weights[m] * values[row_ids[m]] over offsets[g] <= m < offsets[g + 1].

    A lookup with a negative row id adds nothing, whatever its weight; a bag may be empty. Sums are
    formed in fp32 (fp64 for fp64 tables) and rounded once.

    Args:
        values_rV: rows of the value table.
        row_ids_M: int64 row each lookup reads, or -1 for none.
        weights_M: weight of each lookup.
        offsets: [G + 1] int64, where each bag starts; the last entry is M.

    Returns:
        bags_GV in the table's dtype.
    """
    num_bags = len(offsets) - 1
    accumulate = torch.promote_types(values_rV.dtype, torch.float32)
    bag_ids_M = torch.repeat_interleave(
        torch.arange(num_bags, device=offsets.device), offsets.diff(), output_size=len(row_ids_M)
    )
    present_M = row_ids_M >= 0
    # cast before the gather: autograd then sums a row's gradients unrounded, too
    rows_MV = values_rV.to(accumulate)[row_ids_M[present_M]]
    terms_MV = rows_MV * weights_M[present_M].to(accumulate).unsqueeze(-1)
    bags_GV = terms_MV.new_zeros(num_bags, values_rV.shape[1]).index_add(
        0, bag_ids_M[present_M], terms_MV
    )
    return bags_GV.to(values_rV.dtype)
