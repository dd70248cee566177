"""In-place optimizer steps on a table, AdamW and SGD, over every row or over the touched rows.

                                 every row         touched rows
    AdamW                        adamw_            touched_adamw_
    one second moment per row    rowwise_adamw_
    SGD                          sgd_              touched_sgd_

Touched rows are listed, or have flags (forms `list` and `flags` of op `row_adam`): for a list the
host waits for the number of rows, with flags the gradients stay where they are.

Weights in fp32 are the master weights; `copy_rV` receives their bf16 copy in the same pass. Weights
in bf16 with a `seed` are rounded stochastically and need no master. `grad_scale` is a number on the
device, the clipping factor over the loss scale, so that the host never waits for the device.
megamem.reference.row_adam defines the arithmetic.

Letters: r rows on this rank, V row width, E rows of a list, U distinct rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from megamem.kernels.row_adam import update_rows_
from megamem.ops.backend import use_triton
from megamem.reference import row_adam as reference
from megamem.reference.row_adam import AdamOptions

# numbers in a block, which take 1 MB in fp32
CACHED = 2**18


def adamw_(
    weights_rV: Tensor,
    grads_rV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    options: AdamOptions,
) -> None:
    """Update every row as torch.optim.AdamW does.

    Args:
        weights_rV: updated.
        grads_rV: the gradients; set to zero if `clear_grads` is set.
        exp_avg_rV: the first moment, updated; None for none.
        exp_avg_sq: the second moment, updated: [r, V], or [r] for one number per row; None for
            none.
        options: the gradients of rows where `touched_r` is 0 are not read, and count as zero.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.
    """
    _check_state(weights_rV, grads_rV, exp_avg_rV, exp_avg_sq, options)
    if grads_rV.shape != weights_rV.shape:
        raise ValueError(
            f"gradients have shape {tuple(grads_rV.shape)}, but weights have shape "
            f"{tuple(weights_rV.shape)}."
        )
    _check_rows("touched_r", options.touched_r, weights_rV, weights_rV.shape[:1])
    state = (weights_rV, grads_rV, exp_avg_rV, exp_avg_sq)
    with torch.no_grad():
        if use_triton(weights_rV):
            # the arguments of the kernel have the same names as the options
            update_rows_(*state, **vars(options))
        elif _torch_supports(*state, options):
            assert exp_avg_rV is not None and exp_avg_sq is not None
            _by_torch_(weights_rV, grads_rV, exp_avg_rV, exp_avg_sq, options)
        else:
            reference.adamw_(*state, options)


def touched_adamw_(
    weights_rV: Tensor,
    rows_E: Tensor | None,
    grads_EV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    touches_r: Tensor,
    last_steps_r: Tensor,
    options: AdamOptions,
) -> None:
    """Update the touched rows by AdamW, with a bias correction and a catch-up decay for each row.

    megamem.reference.row_adam documents how this differs from AdamW.

    Args:
        weights_rV: updated.
        rows_E: distinct rows, or -1 for none, as megamem.ops.sparse_gradients returns them. None:
            the rows that are marked in the option `touched_r`, which the host need not list.
        grads_EV: their gradients; those of all rows if there is no list.
        exp_avg_rV: the first moment, updated; None for none.
        exp_avg_sq: the second moment, updated: [r, V], or [r] for one number per row; None for
            none.
        touches_r: number of steps that touched each row; updated.
        last_steps_r: the last step that touched each row, 0 before the first; updated.
        options: options of the step.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or if an option is set that only
            applies to steps on every row.
    """
    _check_touched(weights_rV, rows_E, grads_EV, exp_avg_rV, exp_avg_sq, options)
    if not len(touches_r) == len(last_steps_r) == len(weights_rV):
        raise ValueError(
            f"there are {len(touches_r)} touches and {len(last_steps_r)} last steps for "
            f"{len(weights_rV)} rows; one of each is needed per row."
        )
    _check_rows("touches_r", touches_r, weights_rV, weights_rV.shape[:1])
    _check_rows("last_steps_r", last_steps_r, weights_rV, weights_rV.shape[:1])
    moments, counters = (exp_avg_rV, exp_avg_sq), (touches_r, last_steps_r)
    with torch.no_grad():
        if use_triton(weights_rV):
            update_rows_(
                weights_rV,
                grads_EV,
                *moments,
                rows_E,
                *counters,
                **vars(options),
                skip_untouched=rows_E is None,
            )
        else:
            for rows_U, grads_UV in _listed(rows_E, grads_EV, options):
                reference.touched_adamw_(weights_rV, rows_U, grads_UV, *moments, *counters, options)


def rowwise_adamw_(
    weights_rV: Tensor,
    grads_rV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq_r: Tensor,
    options: AdamOptions,
) -> None:
    """Update every row by AdamW with one second moment per row.

    The second moment is the running mean of the mean square of the row's gradient.

    Raises:
        ValueError: as adamw_ does, and if the second moment is not one number per row.
    """
    _check_row_moment(exp_avg_sq_r, weights_rV)
    adamw_(weights_rV, grads_rV, exp_avg_rV, exp_avg_sq_r, options)


def sgd_(weights_rV: Tensor, grads_rV: Tensor, options: AdamOptions) -> None:
    """Set every row to weights * (1 - lr * weight_decay) - lr * gradient.

    Raises:
        ValueError: as adamw_ does.
    """
    adamw_(weights_rV, grads_rV, None, None, options)


def touched_sgd_(
    weights_rV: Tensor, rows_E: Tensor | None, grads_EV: Tensor, options: AdamOptions
) -> None:
    """Set the touched rows to weights * (1 - lr * weight_decay) - lr * gradient.

    Other rows do not decay.

    Args:
        weights_rV: updated.
        rows_E: distinct rows, or -1 for none; None as in touched_adamw_.
        grads_EV: their gradients; those of all rows if there is no list.
        options: options of the step.

    Raises:
        ValueError: as touched_adamw_ does.
    """
    _check_touched(weights_rV, rows_E, grads_EV, None, None, options)
    with torch.no_grad():
        if use_triton(weights_rV):
            arguments = (weights_rV, grads_EV, None, None, rows_E)
            update_rows_(*arguments, **vars(options), skip_untouched=rows_E is None)
        else:
            for rows_U, grads_UV in _listed(rows_E, grads_EV, options):
                reference.touched_sgd_(weights_rV, rows_U, grads_UV, options)


def _listed(
    rows_E: Tensor | None, grads_EV: Tensor, options: AdamOptions
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows to update and their gradients; those of touched_r are cleared if asked for."""
    if rows_E is not None:
        yield rows_E, grads_EV
        return
    assert options.touched_r is not None
    # in blocks, so that copies of the gradients stay small
    block = max(1, CACHED // grads_EV.shape[1])
    for rows_U in options.touched_r.nonzero().squeeze(1).split(block):
        yield rows_U, grads_EV[rows_U]
        if options.clear_grads:
            grads_EV[rows_U] = 0


def _torch_supports(
    weights_rV: Tensor,
    grads_rV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    options: AdamOptions,
) -> bool:
    """Return whether torch's fused AdamW for CPUs can make the step.

    It is tens of times faster than the reference, and needs fp32 or fp64 tensors of one dtype.
    """
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
    # in blocks whose copy of the gradient stays in the cache of a core
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
            # torch adds one before the step
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
    rows_E: Tensor | None,
    grads_EV: Tensor,
    exp_avg_rV: Tensor | None,
    exp_avg_sq: Tensor | None,
    options: AdamOptions,
) -> None:
    _check_state(weights_rV, grads_EV, exp_avg_rV, exp_avg_sq, options)
    if options.row_squares_r is not None:
        raise ValueError(
            "row_squares_r is an option of steps on every row; drop it for a step on touched rows."
        )
    if rows_E is None:
        if options.touched_r is None:
            raise ValueError("a step on touched rows needs a list of them, or touched_r.")
        _check_rows("touched_r", options.touched_r, weights_rV, weights_rV.shape[:1])
    elif options.touched_r is not None or options.clear_grads:
        raise ValueError(
            "touched_r and clear_grads are options of steps without a list of rows; drop them for "
            "a step on a list."
        )
    else:
        _check_rows("rows_E", rows_E, weights_rV, rows_E.shape[:1])
    num_rows = len(weights_rV) if rows_E is None else len(rows_E)
    if grads_EV.shape != (num_rows, weights_rV.shape[1]):
        raise ValueError(
            f"gradients have shape {tuple(grads_EV.shape)}, but there are {num_rows} rows of width "
            f"{weights_rV.shape[1]}."
        )


def _check_rows(name: str, x: Tensor | None, weights_rV: Tensor, shape: torch.Size) -> None:
    if x is None:
        return
    if x.shape != shape or x.is_floating_point() or not x.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}, but it must be contiguous, of "
            f"integers or booleans, and of shape {tuple(shape)}."
        )
    if x.device != weights_rV.device:
        raise ValueError(
            f"{name} must be on {weights_rV.device}, as the weights are, not on {x.device}."
        )


def _check_row_moment(exp_avg_sq_r: Tensor, weights_rV: Tensor) -> None:
    if exp_avg_sq_r.shape != weights_rV.shape[:1]:
        raise ValueError(
            f"the second moment has shape {tuple(exp_avg_sq_r.shape)}, but weights of shape "
            f"{tuple(weights_rV.shape)} need one number per row."
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
            raise ValueError(f"the {name} must be floating point, not {x.dtype}.")
        if x.device != weights_rV.device:
            raise ValueError(
                f"the {name} must be on {weights_rV.device}, as the weights are, not on {x.device}."
            )
        if name in ("first moment", "copy") and x.shape != weights_rV.shape:
            raise ValueError(
                f"the {name} has shape {tuple(x.shape)}, but weights have shape "
                f"{tuple(weights_rV.shape)}."
            )
        if name == "gradient scale" and x.numel() != 1:
            raise ValueError(f"the {name} must be one number, not of shape {tuple(x.shape)}.")
    if weights_rV.dim() != 2 or weights_rV.shape[1] % 8:
        raise ValueError(
            f"weights have shape {tuple(weights_rV.shape)}, but a table must be [rows, width] with "
            "a width that is a multiple of 8."
        )
    if exp_avg_sq is not None and exp_avg_sq.shape not in (weights_rV.shape, weights_rV.shape[:1]):
        raise ValueError(
            f"the second moment has shape {tuple(exp_avg_sq.shape)}, but weights of shape "
            f"{tuple(weights_rV.shape)} need the same shape, or one number per row."
        )
    if options.seed is not None and weights_rV.dtype != torch.bfloat16:
        raise ValueError(
            f"weights must be bf16 to be rounded stochastically, not {weights_rV.dtype}."
        )
