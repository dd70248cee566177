"""Row optimizers as arithmetic: AdamW and SGD, over all rows or only those that were touched.

A moment that is None is left out: without the second there is no division (momentum SGD), without
either a step is lr * gradient (plain SGD). A second moment of shape [r] holds one number per row,
the running mean of the squares of its gradient.
"""

import math

import torch
from torch import Tensor

from megamem.reference.philox import philox


def adamw_(
    weights_rV: Tensor,
    grads_rV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: Tensor | None = None,
    copy_rV: Tensor | None = None,
    seed: int | None = None,
    row_offset: int = 0,
    column_offset: int = 0,
    row_squares_r: Tensor | None = None,
    touched_r: Tensor | None = None,
    clear_grads: bool = False,
) -> None:
    """One step of torch.optim.AdamW on every row, in fp32, whatever the dtypes.

    Args:
        weights_rV: rounded to nearest, or at random where a seed is given (bf16 only).
        exp_avg_sq: [r, V], or [r] for one number per row.
        step: counted from 1.
        grad_scale: one number that multiplies the gradients, read on the device.
        copy_rV: what also receives the new weights, rounded to nearest.
        seed: of the random rounding.
        row_offset, column_offset: place of the first element in the whole table, so that the
            rounding of an element does not depend on how the table is cut; the column a multiple
            of 8.
        row_squares_r: mean squares of the gradients of whole rows, before grad_scale, where these
            are only some of their columns.
        touched_r: rows where it is 0 have a gradient of zero, whatever `grads_rV` says.
        clear_grads: leave zeros in the gradients of the touched rows.
    """
    rows_r = torch.arange(len(weights_rV), device=weights_rV.device)
    with_gradient_r1 = torch.ones_like(rows_r, dtype=torch.bool).unsqueeze(-1)
    if touched_r is not None:
        with_gradient_r1 = touched_r.bool().unsqueeze(-1)
    corrections = [torch.tensor(1 - beta**step, dtype=torch.float64) for beta in betas]
    decay = torch.tensor(1 - lr * weight_decay, dtype=torch.float64)
    _update_rows_(
        weights_rV,
        rows_r,
        grads_rV.where(with_gradient_r1, 0),
        exp_avg_rV,
        exp_avg_sq,
        corrections,
        decay,
        step,
        lr,
        betas,
        eps,
        grad_scale,
        copy_rV,
        seed,
        row_offset,
        column_offset,
        row_squares_r if touched_r is None or row_squares_r is None else row_squares_r * touched_r,
    )
    if clear_grads:
        grads_rV.masked_fill_(with_gradient_r1, 0)


def touched_adamw_(
    weights_rV: Tensor,
    rows_E: Tensor,
    grads_EV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    touches_r: Tensor,
    last_steps_r: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: Tensor | None = None,
    copy_rV: Tensor | None = None,
    seed: int | None = None,
    row_offset: int = 0,
    column_offset: int = 0,
) -> None:
    """One step of AdamW on the touched rows; the others are not read.

    Not AdamW: the moments of an idle row stand still, and their bias correction counts the row's
    own touches. Its weight decay is made up for at the next touch, at that step's learning rate.
    When every step touches every row, it is AdamW.

    Args:
        rows_E: distinct rows, or -1 for none.
        grads_EV: their gradients.
        touches_r: how often each row was touched; updated.
        last_steps_r: the step of its last touch, 0 before the first; updated.
    """
    present_E = rows_E >= 0
    rows_U, grads_UV = rows_E[present_E], grads_EV[present_E]
    touches_r[rows_U] += 1
    touches_U1 = touches_r[rows_U].double().unsqueeze(-1)
    gaps_U1 = (step - last_steps_r[rows_U]).double().unsqueeze(-1)
    last_steps_r[rows_U] = step
    corrections = [-torch.expm1(touches_U1 * math.log(beta)) for beta in betas]
    decay_U1 = torch.exp(gaps_U1 * math.log1p(-lr * weight_decay))
    _update_rows_(
        weights_rV,
        rows_U,
        grads_UV,
        exp_avg_rV,
        exp_avg_sq,
        corrections,
        decay_U1,
        step,
        lr,
        betas,
        eps,
        grad_scale,
        copy_rV,
        seed,
        row_offset,
        column_offset,
    )


def touched_sgd_(
    weights_rV: Tensor,
    rows_E: Tensor,
    grads_EV: Tensor,
    *,
    step: int,
    lr: float,
    weight_decay: float = 0.0,
    grad_scale: Tensor | None = None,
    copy_rV: Tensor | None = None,
    seed: int | None = None,
    row_offset: int = 0,
    column_offset: int = 0,
) -> None:
    """weights * (1 - lr * weight_decay) - lr * gradient on the touched rows; no state, no others.

    Args:
        rows_E: distinct rows, or -1 for none. Idle rows do not decay.
        step: counted from 1; only the random rounding depends on it.
    """
    present_E = rows_E >= 0
    _update_rows_(
        weights_rV,
        rows_E[present_E],
        grads_EV[present_E],
        None,
        None,
        [torch.ones(()), torch.ones(())],
        torch.tensor(1 - lr * weight_decay, dtype=torch.float64),
        step,
        lr,
        (0.0, 0.0),
        0.0,
        grad_scale,
        copy_rV,
        seed,
        row_offset,
        column_offset,
    )


def _update_rows_(
    weights_rV: Tensor,
    rows_U: Tensor,
    grads_UV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    corrections: list[Tensor],
    decay: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    grad_scale: Tensor | None,
    copy_rV: Tensor | None,
    seed: int | None,
    row_offset: int,
    column_offset: int,
    row_squares_r: Tensor | None = None,
) -> None:
    compute = torch.promote_types(weights_rV.dtype, torch.float32)
    first_correction, second_correction = (c.to(weights_rV.device, compute) for c in corrections)
    grads_UV = grads_UV.to(compute)
    if grad_scale is not None:
        grads_UV = grads_UV * grad_scale.to(compute)
    update_UV = grads_UV
    if exp_avg_rV is not None:
        old_UV = exp_avg_rV[rows_U].to(compute)
        update_UV = old_UV + (grads_UV - old_UV) * (1 - betas[0])
        exp_avg_rV[rows_U] = update_UV.to(exp_avg_rV.dtype)
        update_UV = update_UV / first_correction
    if exp_avg_sq is not None:
        row_wise = exp_avg_sq.dim() == 1
        squares = grads_UV.square()
        squares = squares.mean(-1) if row_wise else squares
        if row_squares_r is not None:
            scale = 1.0 if grad_scale is None else grad_scale.to(compute)
            squares = row_squares_r[rows_U].to(compute) * scale**2
        second = exp_avg_sq[rows_U].to(compute) * betas[1] + squares * (1 - betas[1])
        exp_avg_sq[rows_U] = second.to(exp_avg_sq.dtype)
        second = second.unsqueeze(-1) if row_wise else second
        update_UV = update_UV / ((second / second_correction).sqrt() + eps)
    new_UV = weights_rV[rows_U].to(compute) * decay.to(weights_rV.device, compute) - lr * update_UV
    if seed is None:
        weights_rV[rows_U] = new_UV.to(weights_rV.dtype)
    else:
        weights_rV[rows_U] = round_randomly(new_UV, rows_U + row_offset, step, seed, column_offset)
    if copy_rV is not None:
        copy_rV[rows_U] = new_UV.to(copy_rV.dtype)


def round_randomly(
    x_UV: Tensor, rows_U: Tensor, step: int, seed: int, column_offset: int = 0
) -> Tensor:
    """Round fp32 to one of the two nearest bf16, so that the mean of many roundings is x.

    Sixteen random bits are added to the sixteen that bf16 lacks, then these are cut off. The bits
    of eight neighbours in a row are the halves of one Philox draw at the counter
    (column / 8, row, step).
    """
    num_rows, width = x_UV.shape
    blocks = -(-width // 8)
    column = torch.arange(blocks, device=x_UV.device) + column_offset // 8
    row = rows_U.unsqueeze(-1)
    counter = torch.stack(
        torch.broadcast_tensors(
            column, row & 0xFFFFFFFF, row >> 32, torch.tensor(step, device=x_UV.device)
        )
    )
    words_4UB = philox(counter.flatten(1), seed).view(4, num_rows, blocks)
    halves_24UB = torch.stack((words_4UB & 0xFFFF, words_4UB >> 16))
    # element 4 * half + 2 * (word % 2) + word / 2 of the eight
    noise = halves_24UB.view(2, 2, 2, num_rows, blocks).permute(3, 4, 0, 2, 1)
    noise_UV = noise.reshape(num_rows, blocks * 8)[:, :width].to(torch.int32)
    bits_UV = x_UV.float().contiguous().view(torch.int32)
    finite_UV = x_UV.isfinite()
    rounded_UV = torch.where(finite_UV, bits_UV + noise_UV, bits_UV) & -0x10000
    # a NaN's payload may sit in the bits that were cut off
    return torch.where(x_UV.isnan(), x_UV, rounded_UV.view(torch.float32)).to(torch.bfloat16)
