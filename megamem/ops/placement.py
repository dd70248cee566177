"""Placement: the bijection from pairs of sub-keys to rows of the table."""

import torch
from torch import Tensor

from megamem.kernels import placement as kernels
from megamem.ops.backend import use_triton
from megamem.reference import placement as reference

unplace_rows = reference.unplace_rows


def place_rows(
    row_ids: Tensor, num_keys: int, seed: int, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Return the rows of the table that pairs i * N + j read, in the shape of row_ids.

    Args:
        row_ids: pairs of sub-keys, i * N + j.
        num_keys: N, sub-keys per half.
        seed: which bijection of the pairs it is.
        dtype: int32 or int64, of the result; it must be able to hold N * N - 1.
    """
    if use_triton(row_ids):
        return kernels.place_rows(row_ids, num_keys, reference.round_keys(seed), dtype)
    return reference.place_rows(row_ids, num_keys, seed, dtype)
