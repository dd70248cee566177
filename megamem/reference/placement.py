"""Placement: which row of the table a pair of sub-keys reads. The specification of the op.

Pairs that are read together often share a sub-key, so in the order i * N + j they are neighbours,
and the rank that holds the rows of a frequently chosen sub-key would get most of the lookups. A
keyed bijection of the N * N pairs distributes them over the table instead.

It is a Feistel network on (i, j) with addition mod N, which can be inverted for any N:

    i += f(j, key 0),  j += f(i, key 1),  i += f(j, key 2),  j += f(i, key 3)      (mod N)
"""

import torch
from torch import Tensor

ROUNDS = 4
_MASK = 0xFFFFFFFF
_GOLDEN, _MIX_A, _MIX_B = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35


def round_keys(seed: int) -> list[int]:
    """Return one 32-bit key for each round."""
    return [_mix((seed * ROUNDS + number + 1) * _GOLDEN & _MASK) for number in range(ROUNDS)]


def place_rows(
    row_ids: Tensor, num_keys: int, seed: int, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Return the row that each pair i * N + j reads. It is a bijection of 0 .. N * N - 1."""
    i, j = row_ids.long() // num_keys, row_ids.long() % num_keys
    for number, key in enumerate(round_keys(seed)):
        if number % 2 == 0:
            i = (i + _hash(j, key)) % num_keys
        else:
            j = (j + _hash(i, key)) % num_keys
    return (i * num_keys + j).to(dtype)


def unplace_rows(rows: Tensor, num_keys: int, seed: int) -> Tensor:
    """Return the pair i * N + j that reads each row, int64; the inverse of place_rows."""
    i, j = rows.long() // num_keys, rows.long() % num_keys
    for number, key in reversed(list(enumerate(round_keys(seed)))):
        if number % 2 == 0:
            i = (i - _hash(j, key)) % num_keys
        else:
            j = (j - _hash(i, key)) % num_keys
    return i * num_keys + j


def _hash(x: Tensor, key: int) -> Tensor:
    """Return a 32-bit hash of x and key."""
    x = (x * _GOLDEN + key) & _MASK
    x = ((x ^ (x >> 16)) * _MIX_A) & _MASK
    x = ((x ^ (x >> 13)) * _MIX_B) & _MASK
    return x ^ (x >> 16)


def _mix(x: int) -> int:
    x = (x ^ x >> 16) * _MIX_A & _MASK
    x = (x ^ x >> 13) * _MIX_B & _MASK
    return x ^ x >> 16
