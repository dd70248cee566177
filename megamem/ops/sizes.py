"""Chunk and block sizes of the ops, from which the planner estimates the memory that they take.

They follow the choices that are in use (megamem.ops.tuning).
"""

from megamem.kernels.product_topk import padded_topk, tokens_of_a_piece
from megamem.kernels.row_gradient import chunks_and_room, column_block

__all__ = ["chunks_and_room", "column_block", "padded_topk", "tokens_of_a_piece"]
