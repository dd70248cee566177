"""Counter-based random numbers: Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers").

Element (row, column) of a tensor is drawn from the counter (column / 4, row, stream) under the key
`seed`. Any rank can therefore draw any rows alone, and the table does not depend on the number of
ranks.

Letters: E counters or rows of a list, B blocks of four columns; a digit is an axis of that size.
"""

import math
from typing import Literal

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter_4E: Tensor, seed: int) -> Tensor:
    """Return four random 32-bit words for each counter of four 32-bit words.

    Args:
        counter_4E: int64 words in [0, 2**32).
        seed: the key, of which the low 64 bits are used.

    Returns:
        words_4E: int64 words in [0, 2**32).
    """
    c0, c1, c2, c3 = counter_4E
    key = [seed & _MASK, seed >> 32 & _MASK]
    for _ in range(_ROUNDS):
        # a product of two 32-bit words wraps into the sign bit; masking after the shift undoes it
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (right >> 32 & _MASK) ^ c1 ^ key[0],
            right & _MASK,
            (left >> 32 & _MASK) ^ c3 ^ key[1],
            left & _MASK,
        )
        key = [(word + step) & _MASK for word, step in zip(key, _KEY_STEPS, strict=True)]
    return torch.stack((c0, c1, c2, c3))


def random_rows(
    row_ids_E: Tensor,
    width: int,
    seed: int,
    stream: int,
    distribution: Literal["normal", "uniform"],
) -> Tensor:
    """Return rows of a random [*, width] tensor: standard normal, or uniform on (-1, 1).

    Args:
        row_ids_E: int64 ids of the rows, in [0, 2**62).
        width: numbers per row.
        seed: any integer, of which the low 64 bits are used.
        stream: number of the tensor within the model, in [0, 2**32).
        distribution: the distribution of the numbers.

    Returns:
        [E, width] in fp64.
    """
    blocks = -(-width // 4)
    column = torch.arange(blocks, device=row_ids_E.device)
    row = row_ids_E.unsqueeze(-1)
    counter = torch.stack(
        torch.broadcast_tensors(
            column, row & _MASK, row >> 32, torch.tensor(stream, device=row_ids_E.device)
        )
    )
    # adding a half keeps the draws above 0, where the logarithm would be infinite
    draws_4EB = (philox(counter.flatten(1), seed).double() + 0.5) * 2.0**-32
    if distribution == "uniform":
        out_4EB = 2 * draws_4EB - 1
    else:
        # Box-Muller
        radius_2EB = (-2 * draws_4EB[:2].log()).sqrt()
        angle_2EB = 2 * math.pi * draws_4EB[2:]
        out_4EB = torch.cat((radius_2EB * angle_2EB.cos(), radius_2EB * angle_2EB.sin()))
    return out_4EB.T.reshape(len(row_ids_E), blocks * 4)[:, :width]
