"""Which row of the table a pair of sub-keys reads, by plain torch.

Pairs that are read together share a sub-key, so they lie side by side in the order i * N + j, and a
popular sub-key would make one rank's rows hot. A keyed bijection of the N * N pairs scatters them.

It is a Feistel network on (i, j) with addition mod N, which inverts for any N:

    i += f(j, key 0),  j += f(i, key 1),  i += f(j, key 2),  j += f(i, key 3)      (mod N)
"""

from torch import Tensor

ROUNDS = 4
_MASK = 0xFFFFFFFF
_GOLDEN, _MIX_A, _MIX_B = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35


def round_keys(seed: int) -> list[int]:
    """One 32-bit key for each round."""
    return [_mix((seed * ROUNDS + number + 1) * _GOLDEN & _MASK) for number in range(ROUNDS)]


def place_rows(row_ids: Tensor, num_keys: int, seed: int) -> Tensor:
    """Pair i * N + j -> the row of the table that it reads. A bijection of 0 .. N * N - 1."""
    i, j = row_ids.long() // num_keys, row_ids.long() % num_keys
    for number, key in enumerate(round_keys(seed)):
        if number % 2 == 0:
            i = (i + _hash(j, key)) % num_keys
        else:
            j = (j + _hash(i, key)) % num_keys
    return i * num_keys + j


def unplace_rows(rows: Tensor, num_keys: int, seed: int) -> Tensor:
    """Row of the table -> the pair i * N + j that reads it; undoes place_rows."""
    i, j = rows.long() // num_keys, rows.long() % num_keys
    for number, key in reversed(list(enumerate(round_keys(seed)))):
        if number % 2 == 0:
            i = (i - _hash(j, key)) % num_keys
        else:
            j = (j - _hash(i, key)) % num_keys
    return i * num_keys + j


def _hash(x: Tensor, key: int) -> Tensor:
    """32 bits of x and key, well mixed."""
    x = (x * _GOLDEN + key) & _MASK
    x = ((x ^ (x >> 16)) * _MIX_A) & _MASK
    x = ((x ^ (x >> 13)) * _MIX_B) & _MASK
    return x ^ (x >> 16)


def _mix(x: int) -> int:
    x = (x ^ x >> 16) * _MIX_A & _MASK
    x = (x ^ x >> 13) * _MIX_B & _MASK
    return x ^ x >> 16
