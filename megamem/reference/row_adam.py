"""Row optimizers as arithmetic: AdamW and SGD, over all rows or only those that were touched.

A moment that is None is left out: without the second there is no division (momentum SGD), without
either a step is lr * gradient (plain SGD). A second moment of shape [r] holds one number per row,
the running mean of the squares of its gradient.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megamem.reference.philox import philox


@dataclass(frozen=True, kw_only=True)
class AdamOptions:
    """What one step takes beside the table, its gradients and its state; SGD is a special case.

    Raises:
        ValueError: a number is out of range.
    """

    step: int
    """Counted from 1. In plain SGD only the random rounding depends on it."""

    lr: float
    weight_decay: float = 0.0
    """Decoupled: the weights are multiplied by 1 - lr * weight_decay."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment."""

    eps: float = 1e-8
    grad_scale: Tensor | None = None
    """One number that multiplies the gradients, read on the device."""

    copy_rV: Tensor | None = None
    """Also receives the new weights, rounded to nearest."""

    seed: int | None = None
    """Of the random rounding of weights in bf16; without it they are rounded to nearest."""

    row_offset: int = 0
    column_offset: int = 0
    """Place of the first element in the whole table, so that the rounding of an element does not
    depend on how the table is cut; the column is a multiple of 8."""

    touched_r: Tensor | None = None
    """Steps on every row: where it is 0, the gradient is zero, whatever the gradients say."""

    clear_grads: bool = False
    """Steps on every row: leave zeros in the gradients of the touched rows."""

    row_squares_r: Tensor | None = None
    """Steps on every row: mean squares of the gradients of whole rows, before grad_scale, where the
    gradients given are only some of their columns."""

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"step {self.step}: steps are counted from 1.")
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"lr {self.lr} times weight decay {self.weight_decay} must be below 1."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: each must be at least 0 and below 1.")
        if self.column_offset % 8:
            raise ValueError(f"column offset {self.column_offset} is not a multiple of 8.")


def adamw_(
    weights_rV: Tensor,
    grads_rV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    options: AdamOptions,
) -> None:
    """One step of torch.optim.AdamW on every row, in fp32, whatever the dtypes.

    Args:
        weights_rV: rounded to nearest, or at random where a seed is given (bf16 only).
        exp_avg_sq: [r, V], or [r] for one number per row.
    """
    rows_r = torch.arange(len(weights_rV), device=weights_rV.device)
    with_gradient_r1 = torch.ones_like(rows_r, dtype=torch.bool).unsqueeze(-1)
    row_squares_r, touched_r = options.row_squares_r, options.touched_r
    if touched_r is not None:
        with_gradient_r1 = touched_r.bool().unsqueeze(-1)
        row_squares_r = None if row_squares_r is None else row_squares_r * touched_r
    corrections = [torch.tensor(1 - b**options.step, dtype=torch.float64) for b in options.betas]
    decay = torch.tensor(1 - options.lr * options.weight_decay, dtype=torch.float64)
    _update_rows_(
        weights_rV,
        rows_r,
        grads_rV.where(with_gradient_r1, 0),
        exp_avg_rV,
        exp_avg_sq,
        corrections,
        decay,
        options,
        row_squares_r,
    )
    if options.clear_grads:
        grads_rV.masked_fill_(with_gradient_r1, 0)


def touched_adamw_(
    weights_rV: Tensor,
    rows_E: Tensor,
    grads_EV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    touches_r: Tensor,
    last_steps_r: Tensor,
    options: AdamOptions,
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
    gaps_U1 = (options.step - last_steps_r[rows_U]).double().unsqueeze(-1)
    last_steps_r[rows_U] = options.step
    corrections = [-torch.expm1(touches_U1 * math.log(beta)) for beta in options.betas]
    decay_U1 = torch.exp(gaps_U1 * math.log1p(-options.lr * options.weight_decay))
    moments = (exp_avg_rV, exp_avg_sq)
    _update_rows_(weights_rV, rows_U, grads_UV, *moments, corrections, decay_U1, options)


def touched_sgd_(
    weights_rV: Tensor, rows_E: Tensor, grads_EV: Tensor, options: AdamOptions
) -> None:
    """weights * (1 - lr * weight_decay) - lr * gradient on the touched rows; no state, no others.

    Args:
        rows_E: distinct rows, or -1 for none. Idle rows do not decay.
    """
    present_E = rows_E >= 0
    rows_U, grads_UV = rows_E[present_E], grads_EV[present_E]
    no_corrections = [torch.ones(()), torch.ones(())]
    decay = torch.tensor(1 - options.lr * options.weight_decay, dtype=torch.float64)
    _update_rows_(weights_rV, rows_U, grads_UV, None, None, no_corrections, decay, options)


def _update_rows_(
    weights_rV: Tensor,
    rows_U: Tensor,
    grads_UV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    corrections: list[Tensor],
    decay: Tensor,
    options: AdamOptions,
    row_squares_r: Tensor | None = None,
) -> None:
    (beta1, beta2), grad_scale, copy_rV = options.betas, options.grad_scale, options.copy_rV
    compute = torch.promote_types(weights_rV.dtype, torch.float32)
    first_correction, second_correction = (c.to(weights_rV.device, compute) for c in corrections)
    grads_UV = grads_UV.to(compute)
    if grad_scale is not None:
        grads_UV = grads_UV * grad_scale.to(compute)
    update_UV = grads_UV
    if exp_avg_rV is not None:
        old_UV = exp_avg_rV[rows_U].to(compute)
        update_UV = old_UV + (grads_UV - old_UV) * (1 - beta1)
        exp_avg_rV[rows_U] = update_UV.to(exp_avg_rV.dtype)
        update_UV = update_UV / first_correction
    if exp_avg_sq is not None:
        row_wise = exp_avg_sq.dim() == 1
        squares = grads_UV.square()
        squares = squares.mean(-1) if row_wise else squares
        if row_squares_r is not None:
            scale = 1.0 if grad_scale is None else grad_scale.to(compute)
            squares = row_squares_r[rows_U].to(compute) * scale**2
        second = exp_avg_sq[rows_U].to(compute) * beta2 + squares * (1 - beta2)
        exp_avg_sq[rows_U] = second.to(exp_avg_sq.dtype)
        second = second.unsqueeze(-1) if row_wise else second
        update_UV = update_UV / ((second / second_correction).sqrt() + options.eps)
    decay = decay.to(weights_rV.device, compute)
    new_UV = weights_rV[rows_U].to(compute) * decay - options.lr * update_UV
    if options.seed is None:
        weights_rV[rows_U] = new_UV.to(weights_rV.dtype)
    else:
        table_rows_U = rows_U + options.row_offset
        weights_rV[rows_U] = round_randomly(
            new_UV, table_rows_U, options.step, options.seed, options.column_offset
        )
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
