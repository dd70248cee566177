"""Triton kernels of embedding_bag's forward; megamem.reference.embedding_bag specifies the result.

    sum_bags   _compact_kernel (only if lookups may be skipped), then _bag_kernel

A program of _bag_kernel computes BLOCK_V columns of one bag and loops over its lookups, UNROLL at a
time. The columns of a tile [UNROLL, BLOCK_V] are distributed over the threads, so that a thread
issues UNROLL independent 16-byte loads before it uses the first, and the sum over lookups needs no
exchange between threads. The row ids of the next tile are loaded while the rows of this tile are.

A lookup with row id -1 only costs the load of its id: _compact_kernel removes these lookups from
the bags before _bag_kernel runs.

Where a lookup has a weight for each of O cores, a block of columns lies within the columns of one
core, so that a program reads one weight for each lookup.

The backward is in row_gradient.py. Letters: r rows on this rank, V row width, M lookups, O cores,
G bags.
Prefixes in kernels: i_ an index, o_ offsets, m_ a mask, b_ a block in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamem.kernels import choices

# a multiplication and an addition may be fused, independently of Triton's default
OPTIONS = {"enable_fp_fusion": True}
WHOLE = slice(None)


@triton.jit
def block_of_columns(
    i_v,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FIRST: tl.constexpr,
    CORE_WIDTH: tl.constexpr,
):
    """Return the columns of block i_v, which of them are computed, and the core of all of them."""
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    i_core = 0
    if CORE_WIDTH is not None:
        BLOCKS: tl.constexpr = (CORE_WIDTH + BLOCK_V - 1) // BLOCK_V
        o_piece = (i_v % BLOCKS) * BLOCK_V + tl.arange(0, BLOCK_V)
        o_v = (i_v // BLOCKS) * CORE_WIDTH - FIRST % CORE_WIDTH + o_piece
        m_v = (o_piece < CORE_WIDTH) & (o_v >= 0) & (o_v < V)
        i_core = i_v // BLOCKS + FIRST // CORE_WIDTH
    return o_v, m_v, i_core


@triton.jit
def _compact_kernel(
    row_ids,  # [M]
    weights,  # [M, O]
    offsets,  # [G + 1]
    row_ids_out,  # [M] present lookups first, in the range of each bag
    weights_out,  # [M, O]
    ends,  # [G] end of the present lookups of each bag
    BLOCK_M: tl.constexpr,
    CORES: tl.constexpr,
):
    i_g = tl.program_id(0).to(tl.int64)
    i_out = tl.load(offsets + i_g)
    i_end = tl.load(offsets + i_g + 1)
    for i in range(i_out, i_end, BLOCK_M):
        o_m = i + tl.arange(0, BLOCK_M)
        b_row = tl.load(row_ids + o_m, mask=o_m < i_end, other=-1)
        m_present = b_row >= 0
        b_weight = tl.load(weights + o_m * CORES, mask=m_present, other=0.0)
        b_count = tl.cumsum(m_present.to(tl.int32), axis=0)
        o_out = i_out + b_count - 1
        tl.store(row_ids_out + o_out, b_row, mask=m_present)
        tl.store(weights_out + o_out * CORES, b_weight, mask=m_present)
        for i_core in tl.static_range(1, CORES):
            b_weight = tl.load(weights + o_m * CORES + i_core, mask=m_present, other=0.0)
            tl.store(weights_out + o_out * CORES + i_core, b_weight, mask=m_present)
        i_out += tl.sum(m_present.to(tl.int32), axis=0)
    tl.store(ends + i_g, i_out)


@triton.jit
def _bag_kernel(
    values,  # [r, V]
    row_ids,  # [M]
    weights,  # [M, O]
    starts,  # [G]
    ends,  # [G]
    out,  # [G, V]
    V: tl.constexpr,
    ROW: tl.constexpr,  # from a row of values or out to the next
    BLOCK_V: tl.constexpr,
    UNROLL: tl.constexpr,
    CORES: tl.constexpr,
    FIRST: tl.constexpr,  # column of the whole table with which values begin
    CORE_WIDTH: tl.constexpr,  # columns of the whole table with one weight; None: all
):
    i_g = tl.program_id(0).to(tl.int64)
    o_v, m_v, i_core = block_of_columns(tl.program_id(1), V, BLOCK_V, FIRST, CORE_WIDTH)
    i_start = tl.load(starts + i_g)
    i_end = tl.load(ends + i_g)

    b_sum = tl.zeros([BLOCK_V], tl.float32)
    o_m = i_start + tl.arange(0, UNROLL)
    b_row_next = tl.load(row_ids + o_m, mask=o_m < i_end, other=0).to(tl.int64)
    b_weight_next = tl.load(weights + o_m * CORES + i_core, mask=o_m < i_end, other=0.0)
    for i in range(i_start, i_end, UNROLL):
        b_row, b_weight = b_row_next, b_weight_next
        m_m = i + tl.arange(0, UNROLL) < i_end
        o_m = i + UNROLL + tl.arange(0, UNROLL)
        b_row_next = tl.load(row_ids + o_m, mask=o_m < i_end, other=0).to(tl.int64)
        b_weight_next = tl.load(weights + o_m * CORES + i_core, mask=o_m < i_end, other=0.0)
        # [UNROLL, BLOCK_V]
        b_values = tl.load(
            values + b_row[:, None] * ROW + o_v[None, :],
            mask=m_m[:, None] & m_v[None, :],
            other=0.0,
        ).to(tl.float32)
        b_sum += tl.sum(b_values * b_weight.to(tl.float32)[:, None], axis=0)
    tl.store(out + i_g * ROW + o_v, b_sum.to(out.dtype.element_ty), mask=m_v)


def sum_bags(
    values_rV: Tensor,
    row_ids_M: Tensor,
    weights: Tensor,
    offsets: Tensor,
    may_skip: bool = True,
    out_GV: Tensor | None = None,
    columns: slice = WHOLE,
    first_column: int = 0,
    core_width: int | None = None,
) -> Tensor:
    """Return bags_GV in the dtype of the table, the weighted sum of the rows of each bag.

    Args:
        values_rV: this rank's shard of the value table.
        row_ids_M: row of the shard that each lookup reads, or a negative number for none.
        weights: [M], weight of each lookup; with core_width [M, O], that of each of its cores.
        offsets: [G + 1], where the lookups of each bag start; the last entry is M.
        may_skip: whether row ids may be negative.
        out_GV: receives the bags; None for a new tensor.
        columns: the columns to compute.
        first_column: column of the whole table with which these columns begin.
        core_width: columns of the whole table that have the same weight; None for all.
    """
    num_bags, row = len(offsets) - 1, values_rV.shape[1]
    if out_GV is None:
        out_GV = torch.empty(num_bags, row, dtype=values_rV.dtype, device=values_rV.device)
    if num_bags == 0:
        return out_GV
    values_rV = values_rV[:, columns]
    width = values_rV.shape[1]
    starts, ends = offsets[:-1], offsets[1:]
    if may_skip:
        row_ids_M, weights, ends = _close_gaps(row_ids_M, weights, offsets)
    chosen = choices.current().embedding_bag
    block, num_blocks, _ = blocks_of_columns(width, chosen.max_block_v, first_column, core_width)
    _bag_kernel[(num_bags, num_blocks)](
        values_rV,
        row_ids_M,
        weights,
        starts,
        ends,
        out_GV[:, columns],
        V=width,
        ROW=row,
        BLOCK_V=block,
        UNROLL=chosen.unroll,
        CORES=1 if core_width is None else weights.shape[1],
        FIRST=first_column,
        CORE_WIDTH=core_width,
        num_warps=num_warps(block, values_rV.element_size()),
        **OPTIONS,
    )
    return out_GV


def _close_gaps(
    row_ids_M: Tensor, weights: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    device, num_lookups = offsets.device, len(row_ids_M)
    present_ids_M = torch.empty(num_lookups, dtype=row_ids_M.dtype, device=device)
    present_weights = torch.empty(weights.shape, dtype=weights.dtype, device=device)
    ends = torch.empty(len(offsets) - 1, dtype=offsets.dtype, device=device)
    _compact_kernel[(len(ends),)](
        row_ids_M,
        weights,
        offsets,
        present_ids_M,
        present_weights,
        ends,
        choices.current().embedding_bag.compact_block,
        1 if weights.dim() == 1 else weights.shape[1],
        num_warps=1,
        **OPTIONS,
    )
    return present_ids_M, present_weights, ends


def block_width(width: int, limit: int) -> int:
    """Return the columns of one program: a power of two that divides the width, where one does.

    Args:
        width: columns of a row.
        limit: the most columns of a program.
    """
    block = limit
    while block >= 256 and width % block:
        block //= 2
    return block if width % block == 0 else min(limit, triton.next_power_of_2(width))


def blocks_of_columns(
    width: int, limit: int, first_column: int, core_width: int | None
) -> tuple[int, int, int]:
    """Return the columns of a block, the number of blocks, and that of the pieces of one weight.

    A block lies within a piece, and every piece has the blocks of a whole core.

    Args:
        width: columns of a row.
        limit: the most columns of a block.
        first_column: column of the whole table with which the row begins.
        core_width: columns of the whole table that have the same weight; None for all.
    """
    if core_width is None:
        block = block_width(width, limit)
        return block, triton.cdiv(width, block), 1
    block = block_width(core_width, limit)
    num_pieces = triton.cdiv(first_column % core_width + width, core_width)
    return block, num_pieces * triton.cdiv(core_width, block), num_pieces


def num_warps(block: int, element_size: int) -> int:
    """Return the warps that load a block of columns with one 16-byte load per thread, 1 to 8."""
    return max(1, min(8, block * element_size // (16 * 32)))
