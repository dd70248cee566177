"""The gradients of embedding_bag in the two forms that cost nothing per row of the table.

Autograd wants a dense [r, V] gradient. These are for an optimizer that updates touched rows, and
for a gradient buffer that already exists.
"""

import torch
from torch import Tensor

from megamem.kernels.row_gradient import row_gradient, sort_lookups
from megamem.ops.backend import use_triton
from megamem.ops.checks import check_gradient, check_inputs
from megamem.reference.embedding_bag import embedding_bag as reference


def sparse_gradients(
    values_rV: Tensor, grad_GV: Tensor, row_ids_M: Tensor, weights_M: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the touched rows only, without waiting for how many there are.

    Args:
        grad_GV: gradient of the bags.

    Returns:
        rows_E: [min(M, r)] ascending touched rows, then -1.
        grads_EV: their gradients, in the dtype of grad_GV; the rest is undefined.
        weight_grads_M: fp32 (fp64 for an fp64 table).
    """
    check_inputs(values_rV, row_ids_M, weights_M, offsets)
    check_gradient(grad_GV, values_rV, offsets)
    (num_rows, width), device = values_rV.shape, grad_GV.device
    num_slots = min(len(row_ids_M), num_rows)
    grads_EV = torch.empty(num_slots, width, dtype=grad_GV.dtype, device=device)
    if not use_triton(values_rV):
        rows_E = torch.full((num_slots,), -1, dtype=torch.int64, device=device)
        rows_U, grads_UV = _twin_gradient(grad_GV, row_ids_M, weights_M, offsets)
        rows_E[: len(rows_U)], grads_EV[: len(rows_U)] = rows_U, grads_UV
        weights_M = weights_M.detach().requires_grad_()
        with torch.enable_grad():
            bags_GV = reference(values_rV.detach(), row_ids_M, weights_M, offsets)
            (weight_grads_M,) = torch.autograd.grad(bags_GV, weights_M, grad_GV)
        return rows_E, grads_EV, weight_grads_M
    lookups = sort_lookups(row_ids_M, weights_M, offsets, num_rows)
    starts_M = torch.ones(len(row_ids_M), dtype=torch.bool, device=device)
    starts_M[1:] = lookups.rows_M[1:] != lookups.rows_M[:-1]
    slots_M = starts_M.cumsum(0, dtype=torch.int32) - 1
    by_weight_M = row_gradient(lookups, grad_GV.contiguous(), values_rV, grads_EV, slots_M)
    assert by_weight_M is not None
    # absent lookups share one slot after the last row, which may be one more than there are
    rows_E = torch.full((num_slots + 1,), -1, dtype=torch.int64, device=device)
    rows_M = lookups.rows_M.to(torch.int64)
    rows_E[slots_M] = torch.where(rows_M < num_rows, rows_M, -1)
    return rows_E[:num_slots], grads_EV, by_weight_M


def add_value_gradient_(
    buffer_rV: Tensor, grad_GV: Tensor, row_ids_M: Tensor, weights_M: Tensor, offsets: Tensor
) -> Tensor:
    """Add the value gradient to the touched rows of a buffer, summed in fp32, rounded once."""
    check_inputs(buffer_rV, row_ids_M, weights_M, offsets)
    check_gradient(grad_GV, buffer_rV, offsets)
    if not use_triton(grad_GV):
        rows_U, grads_UV = _twin_gradient(
            grad_GV.to(torch.promote_types(grad_GV.dtype, torch.float32)),
            row_ids_M,
            weights_M,
            offsets,
        )
        buffer_rV[rows_U] = (buffer_rV[rows_U] + grads_UV).to(buffer_rV.dtype)
        return buffer_rV
    lookups = sort_lookups(row_ids_M, weights_M, offsets, len(buffer_rV))
    row_gradient(lookups, grad_GV.contiguous(), None, buffer_rV, add=True)
    return buffer_rV


def _twin_gradient(
    grad_GV: Tensor, row_ids_M: Tensor, weights_M: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """The touched rows and their gradients, by autograd over a table of only these."""
    rows_U, slots = row_ids_M[row_ids_M >= 0].unique(return_inverse=True)
    compact_ids_M = torch.full_like(row_ids_M, -1)
    compact_ids_M[row_ids_M >= 0] = slots
    table_UV = grad_GV.new_zeros(max(1, len(rows_U)), grad_GV.shape[1], requires_grad=True)
    with torch.enable_grad():
        bags_GV = reference(table_UV, compact_ids_M, weights_M.detach(), offsets)
        (grads_UV,) = torch.autograd.grad(bags_GV, table_UV, grad_GV)
    return rows_U, grads_UV[: len(rows_U)]
