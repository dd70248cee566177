"""Dot product of table rows with the vector of the bag that reads them, forward and backward.

Each of its three computations is one of embedding_bag's, so the kernels are the same:

    dots                        the gradient of the weights in embedding_bag's backward
    gradient of the values      the value gradient in embedding_bag's backward, with the gradients
                                of dots as weights and the vectors as gradients of the bags
    gradient of the vectors     embedding_bag's forward, with the gradients of dots as weights

Letters: r rows on this rank, V row width, M lookups, G bags.
"""

from typing import Any

import torch
from torch import Tensor

from megamem.kernels.embedding_bag import sum_bags
from megamem.kernels.row_gradient import row_gradient
from megamem.ops.backend import use_triton
from megamem.ops.checks import check_contents, check_inputs
from megamem.ops.row_buffer import RowBuffer, anchor_of, as_row_buffer
from megamem.ops.sort_lookups import NOTHING, Known, sort_lookups
from megamem.ops.value_gradient import add_value_gradient_
from megamem.reference.row_dot import row_dot as reference


class _RowDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_rV, vectors_GV, row_ids_M, offsets, known, buffer, anchor):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values_rV, vectors_GV, row_ids_M, offsets)
        ctx.buffer, ctx.known = buffer, known
        if not use_triton(values_rV):
            return reference(values_rV, vectors_GV, row_ids_M, offsets)
        lookups = sort_lookups(row_ids_M, _ones(row_ids_M), offsets, len(values_rV), known)
        return row_gradient(lookups, vectors_GV, values_rV, None)

    @staticmethod
    def backward(ctx: Any, grad_M):  # type: ignore[no-untyped-def]
        values_rV, vectors_GV, row_ids_M, offsets = ctx.saved_tensors
        want_values, want_vectors, *_ = ctx.needs_input_grad
        lookups = (row_ids_M, grad_M.contiguous(), offsets)
        grad_values = grad_vectors = None
        if ctx.buffer is not None:
            add_value_gradient_(ctx.buffer, vectors_GV, *lookups, ctx.known)
        elif want_values:
            grad_values = torch.zeros_like(values_rV)
            by_row = sort_lookups(*lookups, len(values_rV), ctx.known)
            row_gradient(by_row, vectors_GV, None, grad_values)
        if want_vectors and use_triton(values_rV):
            grad_vectors = sum_bags(values_rV, *lookups, ctx.known.may_skip).to(vectors_GV.dtype)
        elif want_vectors:
            grad_vectors = _reference_vector_gradient(values_rV, vectors_GV, *lookups)
        return grad_values, grad_vectors, None, None, None, None, None


def _reference_vector_gradient(
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
    known: Known = NOTHING,
    *,
    check_row_ids: bool | None = None,
    add_value_grad_to: RowBuffer | Tensor | None = None,
) -> Tensor:
    """Return the dot product of each lookup's row with its bag's vector.

    megamem.reference.row_dot defines it. Repeated runs agree bit for bit, forward and backward.

    Args:
        values_rV: this rank's shard of a table; V a multiple of 8.
        vectors_GV: the vector of each bag.
        row_ids_M: row of the shard that each lookup reads, or -1 for none.
        offsets: [G + 1], where the lookups of each bag start; the last entry is M.
        known: what is known of the lookups.
        check_row_ids: whether to check that row ids and offsets are in range. By default they are
            checked on a CPU only, as the host would have to wait for a GPU.
        add_value_grad_to: fp32 or bf16 [r, V] buffer to which the backward adds the gradient of the
            touched rows, and in which it marks them, even if no other input requires a gradient;
            autograd then gets no gradient of the values.

    Returns:
        dots_M: fp32 (fp64 for an fp64 table); 0 where a lookup reads no row.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or if a checked row id or offset is
            out of range.
    """
    check_inputs(values_rV, row_ids_M, _ones(row_ids_M), offsets)
    _check_vectors(vectors_GV, values_rV, offsets)
    buffer = as_row_buffer(add_value_grad_to, values_rV)
    if check_row_ids or (check_row_ids is None and not values_rV.is_cuda):
        check_contents(row_ids_M, offsets, len(values_rV), known.may_skip, known.equal_bags)
    if not use_triton(values_rV) and buffer is None:
        return reference(values_rV, vectors_GV, row_ids_M, offsets)
    return _RowDot.apply(
        values_rV.contiguous(),
        vectors_GV.contiguous(),
        row_ids_M.contiguous(),
        offsets.contiguous(),
        known,
        buffer,
        anchor_of(buffer),
    )


def _ones(row_ids_M: Tensor) -> Tensor:
    """Return a weight of 1 for every lookup, in one number of memory."""
    return torch.ones((), device=row_ids_M.device).expand(row_ids_M.shape)


def _check_vectors(vectors_GV: Tensor, values_rV: Tensor, offsets: Tensor) -> None:
    """Raise a ValueError where there is not one vector of the row width for each bag."""
    if vectors_GV.shape != (len(offsets) - 1, values_rV.shape[1]):
        raise ValueError(
            f"vectors have shape {tuple(vectors_GV.shape)}, but {len(offsets) - 1} bags and rows "
            f"of width {values_rV.shape[1]} need one vector of that width for each bag."
        )
    if not vectors_GV.is_floating_point():
        raise ValueError(f"vectors must be floating point, not {vectors_GV.dtype}.")
    if vectors_GV.device != values_rV.device:
        raise ValueError(
            f"vectors must be on {values_rV.device}, as the table is, not on {vectors_GV.device}."
        )
