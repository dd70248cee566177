"""Row optimizers, in place: AdamW and SGD, over every row of a table or only the touched ones.

                            every row          touched rows
    AdamW                   adamw_             touched_adamw_
    a second moment of [r]  rowwise_adamw_
    SGD                     sgd_               touched_sgd_

Weights in fp32 are the master weights, and `copy_rV` may receive their bf16 copy in the same pass.
Weights in bf16 with a `seed` are rounded at random and need no master. `grad_scale` is one number
on the device, for clipping times the inverse of the loss scale: no step waits for the host.
megamem.reference.row_adam has the arithmetic.
"""

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from megamem.kernels.row_adam import update_rows_
from megamem.ops.backend import use_triton
from megamem.reference import row_adam as reference
from megamem.reference.row_adam import AdamOptions

# numbers: 1 MB in fp32
CACHED = 2**18


def adamw_(
    weights_rV: Tensor,
    grads_rV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    options: AdamOptions,
) -> None:
    """One step of torch.optim.AdamW on every row.

    Args:
        exp_avg_rV: None for no first moment.
        exp_avg_sq: [r, V], or [r] for one number per row, or None.
        options: gradients of rows that `touched_r` leaves out are not read, and `clear_grads`
            zeroes those that were read in the same pass.

    Raises:
        ValueError: tensors whose shapes, devices or dtypes do not fit.
    """
    _check_state(weights_rV, grads_rV, exp_avg_rV, exp_avg_sq, options)
    if grads_rV.shape != weights_rV.shape:
        raise ValueError(
            f"gradients of shape {tuple(grads_rV.shape)} for weights of shape "
            f"{tuple(weights_rV.shape)}."
        )
    _check_rows("touched_r", options.touched_r, weights_rV, weights_rV.shape[:1])
    state = (weights_rV, grads_rV, exp_avg_rV, exp_avg_sq)
    with torch.no_grad():
        if use_triton(weights_rV):
            # the kernel's arguments have the names of the options
            update_rows_(*state, **vars(options))
        elif _torch_has_it(*state, options):
            assert exp_avg_rV is not None and exp_avg_sq is not None
            _by_torch_(weights_rV, grads_rV, exp_avg_rV, exp_avg_sq, options)
        else:
            reference.adamw_(*state, options)


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
    """One step of AdamW on the touched rows, with a bias correction and a decay of their own.

    The rows are distinct; -1 is skipped (megamem.ops.sparse_gradients returns them so). The
    reference says what makes this differ from AdamW.

    Raises:
        ValueError: tensors whose shapes, devices or dtypes do not fit, or options of the steps on
            every row.
    """
    _check_touched(weights_rV, rows_E, grads_EV, exp_avg_rV, exp_avg_sq, options)
    if not len(touches_r) == len(last_steps_r) == len(weights_rV):
        raise ValueError(
            f"{len(touches_r)} touches and {len(last_steps_r)} last steps for "
            f"{len(weights_rV)} rows."
        )
    _check_rows("touches_r", touches_r, weights_rV, weights_rV.shape[:1])
    _check_rows("last_steps_r", last_steps_r, weights_rV, weights_rV.shape[:1])
    moments, counters = (exp_avg_rV, exp_avg_sq), (touches_r, last_steps_r)
    with torch.no_grad():
        if use_triton(weights_rV):
            update_rows_(weights_rV, grads_EV, *moments, rows_E, *counters, **vars(options))
        else:
            reference.touched_adamw_(weights_rV, rows_E, grads_EV, *moments, *counters, options)


def rowwise_adamw_(
    weights_rV: Tensor,
    grads_rV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq_r: Tensor,
    options: AdamOptions,
) -> None:
    """adamw_ with one second moment per row, of the mean square of the row's gradient.

    Raises:
        ValueError: as adamw_, and where the second moment is not one number per row.
    """
    _check_row_moment(exp_avg_sq_r, weights_rV)
    adamw_(weights_rV, grads_rV, exp_avg_rV, exp_avg_sq_r, options)


def sgd_(weights_rV: Tensor, grads_rV: Tensor, options: AdamOptions) -> None:
    """weights * (1 - lr * weight_decay) - lr * gradient, on every row.

    Raises:
        ValueError: as adamw_.
    """
    adamw_(weights_rV, grads_rV, None, None, options)


def touched_sgd_(
    weights_rV: Tensor, rows_E: Tensor, grads_EV: Tensor, options: AdamOptions
) -> None:
    """weights * (1 - lr * weight_decay) - lr * gradient, on the touched rows; others do not decay.

    Args:
        rows_E: distinct rows, or -1 for none.

    Raises:
        ValueError: tensors whose shapes, devices or dtypes do not fit, or options of the steps on
            every row.
    """
    _check_touched(weights_rV, rows_E, grads_EV, None, None, options)
    with torch.no_grad():
        if use_triton(weights_rV):
            update_rows_(weights_rV, grads_EV, None, None, rows_E, **vars(options))
        else:
            reference.touched_sgd_(weights_rV, rows_E, grads_EV, options)


def _torch_has_it(
    weights_rV: Tensor,
    grads_rV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    options: AdamOptions,
) -> bool:
    """Whether torch's fused AdamW for CPUs, tens of times as fast as the reference, does this."""
    if exp_avg_rV is None or exp_avg_sq is None or exp_avg_sq.shape != weights_rV.shape:
        return False
    one_dtype = len({x.dtype for x in (weights_rV, grads_rV, exp_avg_rV, exp_avg_sq)}) == 1
    wide = weights_rV.dtype in (torch.float32, torch.float64)
    return weights_rV.is_cpu and wide and one_dtype and options.copy_rV is None


def _by_torch_(
    weights_rV: Tensor,
    grads_rV: Tensor,
    exp_avg_rV: Tensor,
    exp_avg_sq: Tensor,
    options: AdamOptions,
) -> None:
    touched_r, scale = options.touched_r, options.grad_scale
    # in blocks that stay in a core's cache, as the gradient is copied
    block = max(1, CACHED // weights_rV.shape[1])
    for start in range(0, len(weights_rV), block):
        rows = slice(start, start + block)
        used_EV = grads_rV[rows]
        if touched_r is not None:
            used_EV = used_EV.where(touched_r[rows].bool().unsqueeze(-1), 0)
        if scale is not None:
            used_EV = used_EV * scale.to(used_EV.dtype)
        torch_adamw(
            [weights_rV[rows]],
            [used_EV],
            [exp_avg_rV[rows]],
            [exp_avg_sq[rows]],
            max_exp_avg_sqs=[],
            # it counts the step itself
            state_steps=[torch.tensor(options.step - 1.0)],
            fused=True,
            amsgrad=False,
            beta1=options.betas[0],
            beta2=options.betas[1],
            lr=options.lr,
            weight_decay=options.weight_decay,
            eps=options.eps,
            maximize=False,
        )
    if options.clear_grads:
        grads_rV[slice(None) if touched_r is None else touched_r.bool()] = 0


def _check_touched(
    weights_rV: Tensor,
    rows_E: Tensor,
    grads_EV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    options: AdamOptions,
) -> None:
    _check_state(weights_rV, grads_EV, exp_avg_rV, exp_avg_sq, options)
    if options.touched_r is not None or options.clear_grads or options.row_squares_r is not None:
        raise ValueError(
            "touched_r, clear_grads and row_squares_r are options of the steps on every row, not "
            "of those on touched rows."
        )
    _check_rows("rows_E", rows_E, weights_rV, rows_E.shape[:1])
    if grads_EV.shape != (len(rows_E), weights_rV.shape[1]):
        raise ValueError(
            f"gradients of shape {tuple(grads_EV.shape)} for {len(rows_E)} rows of width "
            f"{weights_rV.shape[1]}."
        )


def _check_rows(name: str, x: Tensor | None, weights_rV: Tensor, shape: torch.Size) -> None:
    if x is None:
        return
    if x.shape != shape or x.is_floating_point() or not x.is_contiguous():
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} and {x.dtype}: one contiguous tensor of integers is "
            f"needed, for weights of shape {tuple(weights_rV.shape)}."
        )
    if x.device != weights_rV.device:
        raise ValueError(f"{name} on {x.device}, the weights on {weights_rV.device}.")


def _check_row_moment(exp_avg_sq_r: Tensor, weights_rV: Tensor) -> None:
    if exp_avg_sq_r.shape != weights_rV.shape[:1]:
        raise ValueError(
            f"the second moment of shape {tuple(exp_avg_sq_r.shape)} for weights of shape "
            f"{tuple(weights_rV.shape)}: one number per row is needed."
        )


def _check_state(
    weights_rV: Tensor,
    grads_EV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    options: AdamOptions,
) -> None:
    tensors = {
        "weights": weights_rV,
        "gradients": grads_EV,
        "first moment": exp_avg_rV,
        "second moment": exp_avg_sq,
        "copy": options.copy_rV,
        "gradient scale": options.grad_scale,
    }
    for name, x in tensors.items():
        if x is None:
            continue
        if not x.is_contiguous():
            raise ValueError(f"the {name} must be contiguous.")
        if not x.is_floating_point():
            raise ValueError(f"the {name} of {x.dtype} must be floating point.")
        if x.device != weights_rV.device:
            raise ValueError(f"the {name} on {x.device}, the weights on {weights_rV.device}.")
        if name in ("first moment", "copy") and x.shape != weights_rV.shape:
            raise ValueError(
                f"the {name} of shape {tuple(x.shape)} for weights of shape "
                f"{tuple(weights_rV.shape)}."
            )
        if name == "gradient scale" and x.numel() != 1:
            raise ValueError(f"the {name} of shape {tuple(x.shape)}: one number is needed.")
    if weights_rV.dim() != 2 or weights_rV.shape[1] % 8:
        raise ValueError(
            f"weights of shape {tuple(weights_rV.shape)}: a table is [rows, width], the width a "
            "multiple of 8."
        )
    if exp_avg_sq is not None and exp_avg_sq.shape not in (weights_rV.shape, weights_rV.shape[:1]):
        raise ValueError(
            f"the second moment of shape {tuple(exp_avg_sq.shape)} for weights of shape "
            f"{tuple(weights_rV.shape)}: the same, or one number per row."
        )
    if options.seed is not None and weights_rV.dtype != torch.bfloat16:
        raise ValueError(f"weights of {weights_rV.dtype}: only bf16 is rounded at random.")
