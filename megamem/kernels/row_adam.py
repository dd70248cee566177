"""Triton kernel of the optimizer steps; megamem.reference.row_adam specifies the result.

    update_rows_   _update_kernel   all rows, those of a list, or those with a flag

A program updates BLOCK_R rows, a block of columns at a time. It reads gradients, weights and
moments once, and writes weights and moments once, with every kind of rounding. With one second
moment per row it reads the gradients twice, the second time from the cache. Every load of a block
is issued before the first is used: a store in between would delay the loads after it, as they might
read what it wrote.

Stochastic rounding draws its bits from the counter (column / 8, row, step), so it needs no state
and is reproducible. One Philox draw of four words serves eight columns.

A program stores to a tensor that it also loads from only after a barrier. The compiler may give a
load and a store of one tensor different layouts, or hold a small tensor in every warp, so that
without the barrier a thread could overwrite what another has yet to read.

Division and square root are those of IEEE 754 (`div_rn`, `sqrt_rn`; Triton's `/` and `sqrt` are
approximate on a GPU), and exp consists of additions and multiplications, so that a step in fp32 is
as close to float64 as torch's.

Letters: r rows on this rank, V row width, E rows of a list. Prefixes in kernels: i_ an index, o_
offsets, m_ a mask, b_ a block in registers.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from megamem.kernels import choices
from megamem.kernels.embedding_bag import OPTIONS, block_width

NO_MOMENT, FULL_MOMENT, ROW_MOMENT = 0, 1, 2


@triton.jit
def _exp(x):
    """Return exp(x) for x <= 0, to one unit in the last place; 0 where it is below 1e-37."""
    b_power = tl.floor(x * 1.4426950408889634 + 0.5)
    # ln 2 in two parts; the product of the first with a small integer is exact
    b_rest = x - b_power * 0.693359375 + b_power * 2.12194440054690583e-4
    series = b_rest * (1 / 7) + 1
    for n in tl.static_range(6):
        series = b_rest * (1 / (6 - n)) * series + 1
    b_scale = ((tl.maximum(b_power, -126.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x > -85.0, series * b_scale, 0.0)


@triton.jit
def _one_minus_exp(x):
    """Return 1 - exp(x) for x <= 0, without cancellation near 0."""
    series = x * (1 / 9) + 1
    for n in tl.static_range(7):
        series = x * (1 / (8 - n)) * series + 1
    return tl.where(x > -0.5, -x * series, 1 - _exp(x))


@triton.jit
def _round_randomly(b_x, b_row, i_v, step, seed, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return each element rounded to one of the two nearest bf16, as fp32 with 16 zero bits.

    b_row are the rows and i_v is the first column, a multiple of 8, in the unsharded table.
    """
    b_column = i_v // 8 + tl.arange(0, BLOCK_V // 8)
    b_zero = tl.zeros([BLOCK_R, BLOCK_V // 8], tl.int32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        b_zero + b_column[None, :],
        b_zero + b_row.to(tl.int32)[:, None],
        b_zero + (b_row >> 32).to(tl.int32)[:, None],
        b_zero + step,
    )
    # [BLOCK_R, BLOCK_V / 8, half, word % 2, word / 2]
    b_pairs = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    b_low, b_high = b_pairs & 0xFFFF, b_pairs >> 16
    b_noise = tl.permute(tl.join(b_low, b_high), (0, 1, 4, 2, 3))
    b_noise = tl.reshape(b_noise, [BLOCK_R, BLOCK_V]).to(tl.int32, bitcast=True)
    b_bits = b_x.to(tl.int32, bitcast=True)
    m_finite = (b_bits & 0x7F800000) != 0x7F800000
    b_rounded = tl.where(m_finite, b_bits + b_noise, b_bits) & -0x10000
    return tl.where(b_x == b_x, b_rounded.to(tl.float32, bitcast=True), b_x)


@triton.jit(do_not_specialize=["num_rows", "row_offset", "column_offset", "step", "seed"])
def _update_kernel(
    weights,  # [r, V]
    copy,  # [r, V] or None
    grads,  # [E, V]
    exp_avg,  # [r, V] or None
    exp_avg_sq,  # [r, V], [r] or None
    rows,  # [E]; None for all rows
    touches,  # [r] or None
    last_steps,  # [r] or None
    touched,  # [r] or None; where it is 0, the gradients of a row are neither read nor cleared,
    # and with SKIP nothing else of the row is either
    grad_scale,  # [1] or None
    row_squares,  # [r] or None: mean squares of the gradients over all columns of a row
    num_rows,
    row_offset,
    column_offset,
    step,
    seed,
    lr,
    beta1,
    beta2,
    eps,
    unbias1,  # 1 / (1 - beta1**step)
    unbias2,  # 1 / sqrt(1 - beta2**step)
    log_beta1,
    log_beta2,
    decay,
    log_decay,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SECOND: tl.constexpr,
    RANDOM: tl.constexpr,
    CLEAR: tl.constexpr,
    SKIP: tl.constexpr,
):
    o_e = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_e = o_e < num_rows
    b_row = o_e
    b_decay = tl.zeros([BLOCK_R], tl.float32) + decay
    b_unbias1 = tl.zeros([BLOCK_R], tl.float32) + unbias1
    b_unbias2 = tl.zeros([BLOCK_R], tl.float32) + unbias2
    if rows is not None:
        b_row = tl.load(rows + o_e, mask=m_e, other=-1).to(tl.int64)
        m_e = b_row >= 0
    m_grads = m_e
    if touched is not None:
        m_grads = tl.load(touched + b_row, mask=m_e, other=0) != 0
        if SKIP:
            m_e = m_grads
    if touches is not None:
        b_touches = tl.load(touches + b_row, mask=m_e, other=0) + 1
        b_gap = step - tl.load(last_steps + b_row, mask=m_e, other=0)
        tl.debug_barrier()
        tl.store(touches + b_row, b_touches, mask=m_e)
        tl.store(last_steps + b_row, b_gap * 0 + step, mask=m_e)
        b_decay = _exp(b_gap.to(tl.float32) * log_decay)
        b_one = tl.full([BLOCK_R], 1.0, tl.float32)
        b_unbias1 = tl.div_rn(b_one, _one_minus_exp(b_touches.to(tl.float32) * log_beta1))
        b_correction2 = _one_minus_exp(b_touches.to(tl.float32) * log_beta2)
        b_unbias2 = tl.div_rn(b_one, tl.sqrt_rn(b_correction2))
    scale = 1.0
    if grad_scale is not None:
        scale = tl.load(grad_scale).to(tl.float32)
    o_v = tl.arange(0, BLOCK_V)

    # [BLOCK_R, 1]
    b_divisor = tl.zeros([BLOCK_R, 1], tl.float32)
    if SECOND == 2:
        b_square = tl.zeros([BLOCK_R], tl.float32)
        if row_squares is not None:
            b_square = tl.load(row_squares + b_row, mask=m_grads, other=0.0) * scale * scale
        else:
            for i_v in range(0, V, BLOCK_V):
                m_grad = m_grads[:, None] & (i_v + o_v < V)[None, :]
                o_grads = grads + o_e[:, None] * V + i_v + o_v[None, :]
                b_grad = tl.load(o_grads, mask=m_grad, other=0.0).to(tl.float32) * scale
                b_square += tl.sum(b_grad * b_grad, axis=1)
            b_square = b_square * (1 / V)
        b_second = tl.load(exp_avg_sq + b_row, mask=m_e, other=0.0).to(tl.float32)
        b_second = b_second * beta2 + b_square * (1 - beta2)
        tl.debug_barrier()
        tl.store(exp_avg_sq + b_row, b_second.to(exp_avg_sq.dtype.element_ty), mask=m_e)
        b_divisor = (tl.sqrt_rn(b_second) * b_unbias2 + eps)[:, None]

    for i_v in range(0, V, BLOCK_V):
        m = m_e[:, None] & (i_v + o_v < V)[None, :]
        m_grad = m_grads[:, None] & (i_v + o_v < V)[None, :]
        o_state = b_row[:, None] * V + i_v + o_v[None, :]
        o_grads = grads + o_e[:, None] * V + i_v + o_v[None, :]
        b_grad = tl.load(o_grads, mask=m_grad, other=0.0)
        b_weight = tl.load(weights + o_state, mask=m, other=0.0)
        if exp_avg is not None:
            b_first = tl.load(exp_avg + o_state, mask=m, other=0.0)
        if SECOND == 1:
            b_second = tl.load(exp_avg_sq + o_state, mask=m, other=0.0)

        tl.debug_barrier()
        if CLEAR:
            tl.store(o_grads, tl.zeros([BLOCK_R, BLOCK_V], grads.dtype.element_ty), mask=m_grad)
        b_grad = b_grad.to(tl.float32) * scale
        b_update = b_grad
        if exp_avg is not None:
            b_first = b_first.to(tl.float32)
            b_first += (b_grad - b_first) * (1 - beta1)
            tl.store(exp_avg + o_state, b_first.to(exp_avg.dtype.element_ty), mask=m)
            b_update = b_first * b_unbias1[:, None]
        if SECOND == 1:
            b_second = b_second.to(tl.float32) * beta2 + b_grad * b_grad * (1 - beta2)
            tl.store(exp_avg_sq + o_state, b_second.to(exp_avg_sq.dtype.element_ty), mask=m)
            b_root = tl.sqrt_rn(b_second) * b_unbias2[:, None]
            b_update = tl.div_rn(b_update, b_root + eps)
        if SECOND == 2:
            b_update = tl.div_rn(b_update, b_divisor)
        b_new = b_weight.to(tl.float32) * b_decay[:, None] - lr * b_update
        if copy is not None:
            tl.store(copy + o_state, b_new.to(copy.dtype.element_ty), mask=m)
        if RANDOM:
            b_new = _round_randomly(
                b_new, b_row + row_offset, i_v + column_offset, step, seed, BLOCK_R, BLOCK_V
            )
        tl.store(weights + o_state, b_new.to(weights.dtype.element_ty), mask=m)


def update_rows_(
    weights_rV: Tensor,
    grads_EV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    rows_E: Tensor | None = None,
    touches_r: Tensor | None = None,
    last_steps_r: Tensor | None = None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
    copy_rV: Tensor | None,
    seed: int | None,
    row_offset: int,
    column_offset: int,
    row_squares_r: Tensor | None,
    touched_r: Tensor | None,
    clear_grads: bool,
    skip_untouched: bool = False,
) -> None:
    """Update all rows, those of a list, or those of touched_r, in place.

    Args:
        weights_rV: updated.
        grads_EV: gradients of all rows, or of those of the list.
        exp_avg_rV: the first moment, updated; None for none.
        exp_avg_sq: the second moment, updated: [r, V], or [r] for one number per row; None for
            none.
        rows_E: distinct rows, or -1 for none; None for all rows.
        touches_r: number of steps that touched each row, updated; None for AdamW or SGD.
        last_steps_r: the last step that touched each row, updated; None for AdamW or SGD.
        skip_untouched: update only the rows of touched_r.

    The other keywords are the options of megamem.reference.row_adam.AdamOptions.
    """
    num_rows, width = grads_EV.shape
    if num_rows == 0:
        return
    second = NO_MOMENT
    if exp_avg_sq is not None:
        second = ROW_MOMENT if exp_avg_sq.dim() == 1 else FULL_MOMENT
    chosen = choices.current().row_adam
    tile, max_block_v = chosen.tile, chosen.max_block_v
    if second == ROW_MOMENT and rows_E is None and not skip_untouched:
        tile, max_block_v = chosen.row_moment_tile, chosen.row_moment_block_v
    block_v = block_width(width, max_block_v)
    block_r = max(1, tile // block_v)
    # the key of Philox is unsigned, and Triton takes the signed number with the same bits
    key = ((seed or 0) + 2**63) % 2**64 - 2**63
    _update_kernel[(triton.cdiv(num_rows, block_r),)](
        weights_rV,
        copy_rV,
        grads_EV,
        exp_avg_rV,
        exp_avg_sq,
        rows_E,
        touches_r,
        last_steps_r,
        touched_r,
        grad_scale,
        row_squares_r,
        num_rows=num_rows,
        row_offset=row_offset,
        column_offset=column_offset,
        step=step,
        seed=key,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        unbias1=1 / (1 - betas[0] ** step),
        unbias2=1 / math.sqrt(1 - betas[1] ** step),
        log_beta1=_log(betas[0]),
        log_beta2=_log(betas[1]),
        decay=1 - lr * weight_decay,
        log_decay=_log(1 - lr * weight_decay),
        V=width,
        BLOCK_R=block_r,
        BLOCK_V=block_v,
        SECOND=second,
        RANDOM=seed is not None,
        CLEAR=clear_grads,
        SKIP=skip_untouched,
        num_warps=chosen.num_warps,
        **OPTIONS,
    )


def _log(x: float) -> float:
    # the logarithm of 0 as a large negative number, so that powers of a beta of 0 are 0
    return math.log(x) if x > 0 else -1e30
