"""Product of table rows with the vector of the bag that reads them, forward and backward.

Its three directions are those of embedding_bag, so its kernels are, too:

    dots             what embedding_bag's backward computes as the gradient of its weights
    row gradient     its value gradient, with gradients of dots for weights and vectors for bags
    vector gradient  its forward, with gradients of dots for weights
"""

from typing import Any

import torch
from torch import Tensor

from megamem.kernels.embedding_bag import sum_bags
from megamem.kernels.row_gradient import row_gradient, sort_lookups
from megamem.ops.backend import use_triton
from megamem.ops.checks import check_buffer, check_contents, check_inputs
from megamem.ops.value_gradient import add_value_gradient_
from megamem.reference.row_dot import row_dot as reference


class _RowDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_rV, vectors_GV, row_ids_M, offsets, buffer_rV, anchor):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values_rV, vectors_GV, row_ids_M, offsets)
        ctx.buffer_rV = buffer_rV
        if not use_triton(values_rV):
            return reference(values_rV, vectors_GV, row_ids_M, offsets)
        lookups = sort_lookups(row_ids_M, _ones(row_ids_M), offsets, len(values_rV))
        return row_gradient(lookups, vectors_GV, values_rV, None)

    @staticmethod
    def backward(ctx: Any, grad_M):  # type: ignore[no-untyped-def]
        values_rV, vectors_GV, row_ids_M, offsets = ctx.saved_tensors
        want_values, want_vectors, *_ = ctx.needs_input_grad
        lookups = (row_ids_M, grad_M.contiguous(), offsets)
        grad_values = grad_vectors = None
        if ctx.buffer_rV is not None:
            add_value_gradient_(ctx.buffer_rV, vectors_GV, *lookups)
        elif want_values:
            grad_values = torch.zeros_like(values_rV)
            row_gradient(sort_lookups(*lookups, len(values_rV)), vectors_GV, None, grad_values)
        if want_vectors:
            backward = _vector_gradient if use_triton(values_rV) else _twin_vector_gradient
            grad_vectors = backward(values_rV, vectors_GV, *lookups)
        return grad_values, grad_vectors, None, None, None, None


def _vector_gradient(
    values_rV: Tensor, vectors_GV: Tensor, row_ids_M: Tensor, grad_M: Tensor, offsets: Tensor
) -> Tensor:
    return sum_bags(values_rV, row_ids_M, grad_M, offsets).to(vectors_GV.dtype)


def _twin_vector_gradient(
    values_rV: Tensor, vectors_GV: Tensor, row_ids_M: Tensor, grad_M: Tensor, offsets: Tensor
) -> Tensor:
    vectors_GV = vectors_GV.detach().requires_grad_()
    with torch.enable_grad():
        dots_M = reference(values_rV.detach(), vectors_GV, row_ids_M, offsets)
    return torch.autograd.grad(dots_M, vectors_GV, grad_M)[0]


def row_dot(
    values_rV: Tensor,
    vectors_GV: Tensor,
    row_ids_M: Tensor,
    offsets: Tensor,
    *,
    check_row_ids: bool | None = None,
    add_value_grad_to: Tensor | None = None,
) -> Tensor:
    """Multiply table rows with the vectors of their bags; see the reference for the arithmetic.

    Repeated runs agree bit for bit, forward and backward.

    Args:
        values_rV: this rank's shard of a table; V a multiple of 8.
        vectors_GV: one for each bag.
        row_ids_M: local row each lookup reads, or -1 for none.
        offsets: [G + 1], where each bag starts; the last entry is M.
        check_row_ids: whether to look for row ids that the table does not have, and for offsets
            that are none. By default only on a CPU, as a GPU would have to wait for the answer.
        add_value_grad_to: fp32 or bf16 [r, V] buffer that the backward adds the gradient of the
            rows to, touched rows only, whether or not anything else wants a gradient; autograd
            then gets none.

    Returns:
        dots_M, fp32 (fp64 for an fp64 table); 0 where a lookup reads no row.

    Raises:
        ValueError: tensors whose shapes, devices or dtypes do not fit, or, where checked, a row id
            or an offset out of range.
    """
    check_inputs(values_rV, row_ids_M, _ones(row_ids_M), offsets)
    _check_vectors(vectors_GV, values_rV, offsets)
    if add_value_grad_to is not None:
        check_buffer(add_value_grad_to, values_rV)
    if check_row_ids or (check_row_ids is None and not values_rV.is_cuda):
        check_contents(row_ids_M, offsets, len(values_rV), may_skip=True)
    if not use_triton(values_rV) and add_value_grad_to is None:
        return reference(values_rV, vectors_GV, row_ids_M, offsets)
    # autograd calls back only for what leads to an input that wants a gradient
    anchor = None if add_value_grad_to is None else torch.zeros((), requires_grad=True)
    return _RowDot.apply(
        values_rV.contiguous(),
        vectors_GV.contiguous(),
        row_ids_M.contiguous(),
        offsets.contiguous(),
        add_value_grad_to,
        anchor,
    )


def _ones(row_ids_M: Tensor) -> Tensor:
    """Weights of lookups that all count once; they take no memory."""
    return torch.ones((), device=row_ids_M.device).expand(row_ids_M.shape)


def _check_vectors(vectors_GV: Tensor, values_rV: Tensor, offsets: Tensor) -> None:
    """Raise a ValueError where there is not one vector for each bag."""
    if vectors_GV.shape != (len(offsets) - 1, values_rV.shape[1]):
        raise ValueError(
            f"vectors of shape {tuple(vectors_GV.shape)} for {len(offsets) - 1} bags and rows of "
            f"width {values_rV.shape[1]}: one vector for each bag is needed, as wide as a row."
        )
    if not vectors_GV.is_floating_point():
        raise ValueError(f"vectors of {vectors_GV.dtype}: they must be floating point.")
    if vectors_GV.device != values_rV.device:
        raise ValueError(
            f"vectors on {vectors_GV.device}, the table on {values_rV.device}: use one device."
        )
