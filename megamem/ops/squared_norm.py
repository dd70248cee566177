"""Sum of the squares of a table's gradient, for the gradient norm of a step.

Letters: r rows on this rank, V row width, E touched rows.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from megamem.kernels import squared_norm as kernels
from megamem.ops import forms
from megamem.ops.backend import use_triton

# numbers in a block, which take 256 MB in fp64
BLOCK = 2**25


def rows_of_a_block(num_rows: int, width: int) -> int:
    """Return rows few enough for a copy to be small, and enough of them to occupy a GPU."""
    return max(1, min(-(-num_rows // 64), BLOCK // max(1, width)))


def squared_norm(
    grads_rV: Tensor,
    touched_r: Tensor,
    *,
    few: bool = False,
    defined: bool = True,
    form: str | None = None,
) -> Tensor:
    """Return the sum of the squares of a gradient, in fp64.

    megamem.reference.squared_norm defines the result, which is not finite where a gradient is not.

    Args:
        grads_rV: gradients.
        touched_r: bool, whether each row has a gradient.
        few: few rows have one. The form `torch` then reads these alone, and the host waits for
            their number. The form `triton` never reads others.
        defined: whether the gradients of rows that were not touched are zero. Otherwise their
            numbers are undefined, and are masked.
        form: takes precedence over the form that is selected or the default.

    Returns:
        a scalar, fp64.

    Raises:
        ValueError: if the gradients are no table of floating-point numbers, or shapes or devices do
            not fit.
    """
    if grads_rV.dim() != 2 or not grads_rV.is_floating_point():
        raise ValueError(
            f"gradients must be floating point and of shape [rows, width], not {grads_rV.dtype} of "
            f"shape {tuple(grads_rV.shape)}."
        )
    if touched_r.shape != grads_rV.shape[:1] or touched_r.device != grads_rV.device:
        raise ValueError(
            f"touched must have one entry per row, {grads_rV.shape[0]}, on {grads_rV.device}, but "
            f"has shape {tuple(touched_r.shape)} on {touched_r.device}."
        )
    with torch.no_grad():
        if use_triton(grads_rV) and (form or forms.pick("squared_norm")) == "triton":
            return kernels.squared_norm(grads_rV.contiguous(), touched_r.contiguous())
        return _by_torch(grads_rV, touched_r, few, defined)


def _by_torch(grads_rV: Tensor, touched_r: Tensor, few: bool, defined: bool) -> Tensor:
    """Read the gradients in blocks, as torch makes an fp64 copy of what it takes the norm of."""
    rows = rows_of_a_block(*grads_rV.shape)
    blocks: Iterable[Tensor] = grads_rV.split(rows)
    if few:
        blocks = (grads_rV[rows_E] for rows_E in touched_r.nonzero().squeeze(1).split(rows))
    elif not defined:
        flags = touched_r.unsqueeze(1).split(rows)
        blocks = (block.where(here, 0) for block, here in zip(blocks, flags, strict=True))
    total = torch.zeros((), dtype=torch.float64, device=grads_rV.device)
    for block in blocks:
        total += torch.linalg.vector_norm(block, dtype=torch.float64).square()
    return total
