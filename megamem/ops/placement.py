"""Placement: the bijection from pairs of sub-keys to rows of the table."""

from torch import Tensor

from megamem.kernels import placement as kernels
from megamem.ops.backend import use_triton
from megamem.reference import placement as reference

unplace_rows = reference.unplace_rows


def place_rows(row_ids: Tensor, num_keys: int, seed: int) -> Tensor:
    """Return the rows of the table that pairs i * N + j read: int64, in the shape of row_ids."""
    if use_triton(row_ids):
        return kernels.place_rows(row_ids, num_keys, reference.round_keys(seed))
    return reference.place_rows(row_ids, num_keys, seed)
