"""AdamW over the rows of a table, in place: every row, or only the touched ones."""

from typing import Any

import torch
from torch import Tensor

from megamem.kernels.row_adam import update_rows_
from megamem.ops.backend import use_triton
from megamem.reference import row_adam as reference


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
) -> None:
    """One step of torch.optim.AdamW on every row; see the reference for the arguments."""
    options: dict[str, Any] = {
        "step": step,
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "grad_scale": grad_scale,
        "copy_rV": copy_rV,
        "seed": seed,
        "row_offset": row_offset,
    }
    _check_state(weights_rV, grads_rV, exp_avg_rV, exp_avg_sq, options)
    if grads_rV.shape != weights_rV.shape:
        raise ValueError(
            f"gradients of shape {tuple(grads_rV.shape)} for weights of shape "
            f"{tuple(weights_rV.shape)}."
        )
    state = (weights_rV, grads_rV, exp_avg_rV, exp_avg_sq)
    with torch.no_grad():
        if use_triton(weights_rV):
            update_rows_(*state, **options)
        else:
            reference.adamw_(*state, **options)


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
) -> None:
    """One step of AdamW on the touched rows, with a bias correction and a decay of their own.

    The rows are distinct; -1 is skipped (megamem.ops.sparse_gradients returns them so). See
    the reference for the arguments, and for what makes this differ from AdamW.
    """
    options: dict[str, Any] = {
        "step": step,
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "grad_scale": grad_scale,
        "copy_rV": copy_rV,
        "seed": seed,
        "row_offset": row_offset,
    }
    _check_state(weights_rV, grads_EV, exp_avg_rV, exp_avg_sq, options)
    if grads_EV.shape != (len(rows_E), weights_rV.shape[1]):
        raise ValueError(
            f"gradients of shape {tuple(grads_EV.shape)} for {len(rows_E)} rows of width "
            f"{weights_rV.shape[1]}."
        )
    if not len(touches_r) == len(last_steps_r) == len(weights_rV):
        raise ValueError(
            f"{len(touches_r)} touches and {len(last_steps_r)} last steps for "
            f"{len(weights_rV)} rows."
        )
    with torch.no_grad():
        if use_triton(weights_rV):
            update_rows_(
                weights_rV,
                grads_EV,
                exp_avg_rV,
                exp_avg_sq,
                rows_E,
                touches_r,
                last_steps_r,
                **options,
            )
        else:
            reference.touched_adamw_(
                weights_rV,
                rows_E,
                grads_EV,
                exp_avg_rV,
                exp_avg_sq,
                touches_r,
                last_steps_r,
                **options,
            )


def _check_state(
    weights_rV: Tensor,
    grads_EV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    options: dict[str, Any],
) -> None:
    tensors = {
        "weights": weights_rV,
        "gradients": grads_EV,
        "first moment": exp_avg_rV,
        "second moment": exp_avg_sq,
        "copy": options["copy_rV"],
    }
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"the {name} must be contiguous.")
        if x is not None and x.device != weights_rV.device:
            raise ValueError(f"the {name} on {x.device}, the weights on {weights_rV.device}.")
        if name in ("first moment", "copy") and x is not None and x.shape != weights_rV.shape:
            raise ValueError(
                f"the {name} of shape {tuple(x.shape)} for weights of shape "
                f"{tuple(weights_rV.shape)}."
            )
    if exp_avg_sq is not None and exp_avg_sq.shape not in (weights_rV.shape, weights_rV.shape[:1]):
        raise ValueError(
            f"the second moment of shape {tuple(exp_avg_sq.shape)} for weights of shape "
            f"{tuple(weights_rV.shape)}: the same, or one number per row."
        )
    if options["seed"] is not None and weights_rV.dtype != torch.bfloat16:
        raise ValueError(f"weights of {weights_rV.dtype}: only bf16 is rounded at random.")
    if options["step"] < 1:
        raise ValueError(f"step {options['step']}: steps are counted from 1.")
    if options["lr"] * options["weight_decay"] >= 1:
        raise ValueError(
            f"lr {options['lr']} times weight decay {options['weight_decay']} must be below 1."
        )
