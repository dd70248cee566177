"""Optimizer steps on a table, AdamW and SGD, over every row or the touched rows: the specification.

A moment that is None is left out. Without the second moment the step is momentum SGD, as nothing is
divided by its root; without both it is lr * gradient, plain SGD. A second moment of shape [r] holds
one number per row, the running mean of the mean square of the row's gradient.

Letters: r rows on this rank, V row width, E rows of a list, U distinct rows.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megamem.reference.philox import philox


@dataclass(frozen=True, kw_only=True)
class AdamOptions:
    """Options of one step. SGD uses those that apply to it.

    Raises:
        ValueError: a number is out of range.
    """

    step: int
    """Number of the step, from 1. In plain SGD only stochastic rounding depends on it."""

    lr: float
    """Learning rate."""

    weight_decay: float = 0.0
    """Decoupled weight decay: the weights are multiplied by 1 - lr * weight_decay."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and of the second moment."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    grad_scale: Tensor | None = None
    """One number on the device that multiplies the gradients."""

    copy_rV: Tensor | None = None
    """Receives a copy of the new weights, rounded to nearest."""

    seed: int | None = None
    """Seed of the stochastic rounding of weights in bf16; None rounds them to nearest."""

    row_offset: int = 0
    """First row of the shard in the unsharded table, on which stochastic rounding depends."""

    column_offset: int = 0
    """First column of the shard in the unsharded table, a multiple of 8. With both offsets, the
    rounding of an element does not depend on how the table is sharded."""

    touched_r: Tensor | None = None
    """For steps on every row: where it is 0, the gradient counts as zero and is not read."""

    clear_grads: bool = False
    """For steps on every row: set the gradients of the touched rows to zero."""

    row_squares_r: Tensor | None = None
    """For steps on every row with one second moment per row, where the shard has only some columns:
    mean squares of the gradients over all columns, before grad_scale."""

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"step is {self.step}, but steps are counted from 1.")
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"lr {self.lr} times weight_decay {self.weight_decay} must be below 1."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}, but each must be at least 0 and below 1.")
        if self.column_offset % 8:
            raise ValueError(
                f"column_offset is {self.column_offset}, but it must be a multiple of 8."
            )


def adamw_(
    weights_rV: Tensor,
    grads_rV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    options: AdamOptions,
) -> None:
    """Update every row as torch.optim.AdamW does, computed in fp32 (fp64 for fp64 weights).

    Args:
        weights_rV: updated; rounded to nearest, or stochastically where a seed is given (bf16).
        grads_rV: the gradients; set to zero if `clear_grads` is set.
        exp_avg_rV: the first moment, updated; None for none.
        exp_avg_sq: the second moment, updated: [r, V], or [r] for one number per row; None for
            none.
        options: options of the step.
    """
    rows_r = torch.arange(len(weights_rV), device=weights_rV.device)
    has_gradient = torch.ones_like(rows_r, dtype=torch.bool).unsqueeze(-1)
    row_squares_r, touched_r = options.row_squares_r, options.touched_r
    if touched_r is not None:
        has_gradient = touched_r.bool().unsqueeze(-1)
        row_squares_r = None if row_squares_r is None else row_squares_r * touched_r
    corrections = [torch.tensor(1 - b**options.step, dtype=torch.float64) for b in options.betas]
    decay = torch.tensor(1 - options.lr * options.weight_decay, dtype=torch.float64)
    _update_rows_(
        weights_rV,
        rows_r,
        grads_rV.where(has_gradient, 0),
        exp_avg_rV,
        exp_avg_sq,
        corrections,
        decay,
        options,
        row_squares_r,
    )
    if options.clear_grads:
        grads_rV.masked_fill_(has_gradient, 0)


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
    """Update the touched rows by lazy AdamW; the other rows are not read.

    It differs from AdamW in rows that a step does not touch. Their moments do not change, the bias
    correction of a row counts the steps that touched it, and the weight decay of the steps between
    is applied at the next touch, with the learning rate of that step. If every step touches every
    row, it is AdamW.

    Args:
        weights_rV: updated.
        rows_E: distinct rows, or -1 for none.
        grads_EV: their gradients.
        exp_avg_rV: the first moment, updated; None for none.
        exp_avg_sq: the second moment, updated: [r, V], or [r] for one number per row; None for
            none.
        touches_r: number of steps that touched each row; updated.
        last_steps_r: the last step that touched each row, 0 before the first; updated.
        options: options of the step.
    """
    present_E = rows_E >= 0
    rows_U, grads_UV = rows_E[present_E], grads_EV[present_E]
    touches_r[rows_U] += 1
    touches = touches_r[rows_U].double().unsqueeze(-1)
    gaps = (options.step - last_steps_r[rows_U]).double().unsqueeze(-1)
    last_steps_r[rows_U] = options.step
    corrections = [-torch.expm1(touches * math.log(beta)) for beta in options.betas]
    decay = torch.exp(gaps * math.log1p(-options.lr * options.weight_decay))
    moments = (exp_avg_rV, exp_avg_sq)
    _update_rows_(weights_rV, rows_U, grads_UV, *moments, corrections, decay, options)


def touched_sgd_(
    weights_rV: Tensor, rows_E: Tensor, grads_EV: Tensor, options: AdamOptions
) -> None:
    """Set the touched rows to weights * (1 - lr * weight_decay) - lr * gradient.

    Other rows do not decay.

    Args:
        weights_rV: updated.
        rows_E: distinct rows, or -1 for none.
        grads_EV: their gradients.
        options: options of the step.
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
    """Return x rounded stochastically to one of the two nearest bf16, so that its mean is x.

    Sixteen random bits are added to the low sixteen bits of fp32, which are then set to zero. The
    random bits of eight adjacent columns are the halves of one Philox draw at the counter
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
    words = philox(counter.flatten(1), seed).view(4, num_rows, blocks)
    halves = torch.stack((words & 0xFFFF, words >> 16))
    # of the eight columns, column 4 * half + 2 * (word % 2) + word / 2 gets this half of the word
    noise = halves.view(2, 2, 2, num_rows, blocks).permute(3, 4, 0, 2, 1)
    noise_UV = noise.reshape(num_rows, blocks * 8)[:, :width].to(torch.int32)
    bits_UV = x_UV.float().contiguous().view(torch.int32)
    finite_UV = x_UV.isfinite()
    rounded_UV = torch.where(finite_UV, bits_UV + noise_UV, bits_UV) & -0x10000
    # the payload of a NaN may lie in the bits that were set to zero
    return torch.where(x_UV.isnan(), x_UV, rounded_UV.view(torch.float32)).to(torch.bfloat16)
