"""Weighted sum of table rows into bags: the specification of the op.

Letters: r rows on this rank, V row width, M lookups, G bags.
"""

import torch
from torch import Tensor


def embedding_bag(
    values_rV: Tensor, row_ids_M: Tensor, weights_M: Tensor, offsets: Tensor
) -> Tensor:
    """Return the weighted sum of the rows of each bag.

    bags[g] is the sum of weights[m] * values[row_ids[m]] over offsets[g] <= m < offsets[g + 1].
    A lookup with a negative row id adds nothing, whatever its weight; a bag may be empty. Sums are
    formed in fp32 (fp64 for fp64 tables) and rounded once.

    Args:
        values_rV: rows of the value table.
        row_ids_M: int64 row that each lookup reads, or -1 for none.
        weights_M: weight of each lookup.
        offsets: [G + 1] int64, where the lookups of each bag start; the last entry is M.

    Returns:
        bags_GV: in the dtype of the table.
    """
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
