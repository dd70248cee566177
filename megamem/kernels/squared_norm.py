"""Triton kernel of the gradient norm of a table; megamem.reference.squared_norm specifies it.

A program reads ROWS rows, some of whose columns at a time, and adds up squares in fp64, one sum for
each place of its tile; the squares of fp32 numbers are exact in fp64. Rows without a gradient are
masked, which costs no memory traffic. The tiles' sums are added in one order whatever the GPU, so
runs agree bit for bit. torch adds the programs' sums.

Letters: r rows on this rank, V row width, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamem.kernels import choices
from megamem.kernels.embedding_bag import block_width


@triton.jit
def _squared_norm_kernel(
    grads,  # [r, V]
    touched,  # [r] bool, if HAS_TOUCHED
    sums,  # [P]
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_TOUCHED: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    o_r, o_v = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_V)
    b_sum = tl.zeros([BLOCK_R, BLOCK_V], tl.float64)
    for i_r in range(0, ROWS, BLOCK_R):
        b_row = first + i_r + o_r
        m_row = b_row < num_rows
        if HAS_TOUCHED:
            m_row &= tl.load(touched + b_row, mask=m_row, other=0) != 0
        for i_v in range(0, WIDTH, BLOCK_V):
            b_column = i_v + o_v
            m_grad = m_row[:, None] & (b_column < WIDTH)[None, :]
            p_grad = grads + b_row[:, None] * WIDTH + b_column[None, :]
            b_grad = tl.load(p_grad, mask=m_grad, other=0.0).to(tl.float64)
            b_sum += b_grad * b_grad
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(b_sum, 1), 0))


def squared_norm(grads_rV: Tensor, touched_r: Tensor | None) -> Tensor:
    """Return the sum of squares of the touched rows' gradients; the reference has the arguments."""
    num_rows, width = grads_rV.shape
    chosen = choices.current().squared_norm
    programs = triton.cdiv(num_rows, chosen.rows)
    sums_P = torch.zeros(programs, dtype=torch.float64, device=grads_rV.device)
    if programs:
        block = block_width(width, chosen.max_block_v)
        _squared_norm_kernel[(programs,)](
            grads_rV,
            touched_r,
            sums_P,
            num_rows,
            WIDTH=width,
            ROWS=chosen.rows,
            BLOCK_R=min(chosen.rows, max(1, chosen.tile // block)),
            BLOCK_V=block,
            HAS_TOUCHED=touched_r is not None,
            num_warps=chosen.num_warps,
        )
    return sums_P.sum()
