"""Triton kernel of the placement of rows; megamem.reference.placement specifies the result.

Letters: J lookups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _hash(x, key):
    # 32-bit words in 64-bit numbers: products may overflow, as only their low 32 bits are used
    x = (x * 0x9E3779B9 + key) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["num_lookups", "key_0", "key_1", "key_2", "key_3"])
def _place_kernel(
    rows,  # [J]
    placed,  # [J]
    num_lookups,
    num_keys,
    key_0: tl.int64,
    key_1: tl.int64,
    key_2: tl.int64,
    key_3: tl.int64,
    BLOCK: tl.constexpr,
):
    o_lookup = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_lookup = o_lookup < num_lookups
    b_row = tl.load(rows + o_lookup, mask=m_lookup, other=0).to(tl.int64)
    b_i = b_row // num_keys
    b_j = b_row - b_i * num_keys
    b_i = (b_i + _hash(b_j, key_0)) % num_keys
    b_j = (b_j + _hash(b_i, key_1)) % num_keys
    b_i = (b_i + _hash(b_j, key_2)) % num_keys
    b_j = (b_j + _hash(b_i, key_3)) % num_keys
    tl.store(placed + o_lookup, b_i * num_keys + b_j, mask=m_lookup)


def place_rows(
    row_ids: Tensor, num_keys: int, round_keys: list[int], dtype: torch.dtype = torch.int64
) -> Tensor:
    """Return the rows that the pairs i * N + j read, in the shape of row_ids and in `dtype`."""
    row_ids = row_ids.contiguous()
    placed = torch.empty(row_ids.shape, dtype=dtype, device=row_ids.device)
    if row_ids.numel():
        grid = (triton.cdiv(row_ids.numel(), BLOCK),)
        _place_kernel[grid](row_ids, placed, row_ids.numel(), num_keys, *round_keys, BLOCK=BLOCK)
    return placed
