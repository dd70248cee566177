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
    accumulate = torch.promote_types(values_rV.dtype, torch.float32)
    present_M = row_ids_M >= 0
    # how many present lookups come before each of M, and before the end
    before_M1 = torch.nn.functional.pad(present_M.cumsum(0), (1, 0))
    bags_GV = torch.nn.functional.embedding_bag(
        row_ids_M[present_M].long(),
        # cast before the gather: autograd then sums a row's gradients unrounded, too
        values_rV.to(accumulate),
        before_M1[offsets.long()],
        mode="sum",
        per_sample_weights=weights_M[present_M].to(accumulate),
        include_last_offset=True,
    )
    return bags_GV.to(values_rV.dtype)
