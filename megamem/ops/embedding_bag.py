"""Weighted sum of table rows into bags, forward and backward.

Letters: r rows on this rank, V row width, M lookups, O cores, G bags.
"""

from typing import Any

import torch
from torch import Tensor

from megamem.kernels.embedding_bag import sum_bags
from megamem.ops.backend import use_triton
from megamem.ops.checks import check_contents, check_inputs
from megamem.ops.cores import columns_of, cores_of, row_gradient_of_cores, sum_bags_of_cores
from megamem.ops.row_buffer import RowBuffer, anchor_of, as_row_buffer
from megamem.ops.sort_lookups import NOTHING, Known, sort_lookups
from megamem.ops.value_gradient import add_rows_, add_value_gradient_
from megamem.reference.embedding_bag import Cores
from megamem.reference.embedding_bag import embedding_bag as reference


class _EmbeddingBag(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_rV, row_ids_M, weights, offsets, known, buffer, cores, anchor):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values_rV, row_ids_M, weights, offsets)
        ctx.buffer, ctx.known, ctx.cores = buffer, known, cores
        lookups = (values_rV, row_ids_M, weights, offsets)
        if not use_triton(values_rV):
            return reference(values_rV, row_ids_M, weights, offsets, **columns_of(cores))
        if cores is None:
            return sum_bags(*lookups, known.may_skip)
        return sum_bags_of_cores(*lookups, known.may_skip, cores)

    @staticmethod
    def backward(ctx: Any, grad_GV):  # type: ignore[no-untyped-def]
        values_rV, row_ids_M, weights, offsets = ctx.saved_tensors
        want_values, _, want_weights, *_ = ctx.needs_input_grad
        want_values = want_values or ctx.buffer is not None
        backward = _backward if use_triton(values_rV) else _reference_backward
        grad_values, grad_weights = backward(
            grad_GV.contiguous(),
            values_rV,
            row_ids_M,
            weights,
            offsets,
            want_values,
            want_weights,
            ctx.buffer,
            ctx.known,
            ctx.cores,
        )
        return grad_values, None, grad_weights, None, None, None, None, None


def _backward(
    grad_GV: Tensor,
    values_rV: Tensor,
    row_ids_M: Tensor,
    weights: Tensor,
    offsets: Tensor,
    want_values: bool,
    want_weights: bool,
    buffer: RowBuffer | None,
    known: Known,
    cores: Cores | None,
) -> tuple[Tensor | None, Tensor | None]:
    if buffer is not None and buffer.deferred is not None:
        add_value_gradient_(
            buffer, grad_GV, row_ids_M, weights, offsets, known, **columns_of(cores)
        )
        # what is left is the gradient of the weights
        buffer, want_values = None, False
    if not (want_values or want_weights):
        return None, None
    grad_values = None
    lookups = sort_lookups(row_ids_M, weights, offsets, len(values_rV), known)
    read_rV = values_rV if want_weights else None
    if buffer is not None:
        grad_weights = add_rows_(buffer, lookups, grad_GV, read_rV, cores)
    else:
        grad_values = torch.zeros_like(values_rV) if want_values else None
        grad_weights = row_gradient_of_cores(lookups, grad_GV, read_rV, grad_values, cores=cores)
    if grad_weights is not None:
        grad_weights = grad_weights.to(weights.dtype)
    return grad_values, grad_weights


def _reference_backward(
    grad_GV: Tensor,
    values_rV: Tensor,
    row_ids_M: Tensor,
    weights: Tensor,
    offsets: Tensor,
    want_values: bool,
    want_weights: bool,
    buffer: RowBuffer | None,
    known: Known,
    cores: Cores | None,
) -> tuple[Tensor | None, Tensor | None]:
    grad_weights = None
    if want_weights:
        weights = weights.detach().requires_grad_()
        with torch.enable_grad():
            bags_GV = reference(
                values_rV.detach(), row_ids_M, weights, offsets, **columns_of(cores)
            )
        (grad_weights,) = torch.autograd.grad(bags_GV, weights, grad_GV)
    if want_values and buffer is not None:
        add_value_gradient_(
            buffer, grad_GV, row_ids_M, weights, offsets, known, **columns_of(cores)
        )
    return None, grad_weights


def embedding_bag(
    values_rV: Tensor,
    row_ids_M: Tensor,
    weights: Tensor,
    offsets: Tensor,
    known: Known = NOTHING,
    *,
    check_row_ids: bool | None = None,
    add_value_grad_to: RowBuffer | Tensor | None = None,
    first_column: int = 0,
    core_width: int | None = None,
) -> Tensor:
    """Return the weighted sum of the rows of each bag; megamem.reference.embedding_bag defines it.

    Repeated runs agree bit for bit, forward and backward.

    Args:
        values_rV: this rank's shard of the value table; V a multiple of 8.
        row_ids_M: row of the shard that each lookup reads, or -1 for none.
        weights: [M] or [M, O], weight of each lookup, or of each of its cores: then column c of a
            row has weights[:, (first_column + c) // core_width].
        offsets: [G + 1], where the lookups of each bag start; the last entry is M.
        known: what is known of the lookups.
        check_row_ids: whether to check that row ids and offsets are in range. By default they are
            checked on a CPU only, as the host would have to wait for a GPU.
        add_value_grad_to: fp32 or bf16 [r, V] buffer to which the backward adds the gradient of the
            touched rows, and in which it marks them, even if no other input requires a gradient;
            autograd then gets no gradient of the values.
        first_column: column of the whole table with which the shard begins, a multiple of 8.
        core_width: columns of the whole table that have the same weight, a multiple of 8; None for
            V // O.

    Returns:
        bags_GV in the dtype of the table.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, if the weights do not cover the columns
            of the shard, or if a checked row id or offset is out of range.
    """
    check_inputs(values_rV, row_ids_M, weights, offsets)
    cores = cores_of(weights, values_rV.shape[1], first_column, core_width)
    buffer = as_row_buffer(add_value_grad_to, values_rV)
    if check_row_ids or (check_row_ids is None and not values_rV.is_cuda):
        check_contents(row_ids_M, offsets, len(values_rV), known.may_skip, known.equal_bags)
    if not use_triton(values_rV) and buffer is None:
        return reference(values_rV, row_ids_M, weights, offsets, **columns_of(cores))
    return _EmbeddingBag.apply(
        values_rV.contiguous(),
        row_ids_M.contiguous(),
        weights.contiguous(),
        offsets.contiguous(),
        known,
        buffer,
        cores,
        anchor_of(buffer),
    )
