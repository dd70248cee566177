"""Chunk and block sizes of the ops, from which the planner estimates the memory that they take.

They follow the choices that are in use (megamem.ops.tuning).
"""

import torch

from megamem.kernels.product_topk import padded_topk, tokens_of_a_piece
from megamem.kernels.row_gradient import chunks_and_room, column_block
from megamem.kernels.tucker_topk import tokens_of_a_piece as tucker_tokens
from megamem.reference.tucker_topk import tokens_of_a_piece as tokens_of_reference

__all__ = [
    "chunks_and_room",
    "column_block",
    "padded_topk",
    "tokens_of_a_piece",
    "tucker_tokens",
    "tucker_tokens_by_torch",
]


def tucker_tokens_by_torch(num_keys: int, heads: int, rank: int, topk: int) -> int:
    """Return the tokens that form `torch` of tucker_topk scores at once."""
    return tokens_of_reference(torch.empty(2, heads, num_keys, rank, 1, device="meta"), topk)
