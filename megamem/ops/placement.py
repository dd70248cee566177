"""Which row of the table a pair of sub-keys reads."""

from torch import Tensor

from megamem.kernels import placement as kernels
from megamem.ops.backend import use_triton
from megamem.reference import placement as reference

unplace_rows = reference.unplace_rows


def place_rows(row_ids: Tensor, num_keys: int, seed: int) -> Tensor:
    """Pair i * N + j -> row of the table, int64: a bijection keyed by the seed."""
    if use_triton(row_ids):
        return kernels.place_rows(row_ids, num_keys, reference.round_keys(seed))
    return reference.place_rows(row_ids, num_keys, seed)
