"""Value gradients of embedding_bag whose cost does not depend on the number of rows of the table.

Autograd computes a dense [r, V] gradient. These functions return the gradients of the touched rows,
or add them to a gradient buffer that already exists.

Letters: r rows on this rank, V row width, M lookups, O cores, G bags, U distinct rows, E entries of
the result.
"""

from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from megamem.kernels.row_gradient import mark_rows_
from megamem.kernels.sort_lookups import SortedLookups
from megamem.ops.backend import use_triton
from megamem.ops.checks import check_gradient, check_inputs
from megamem.ops.cores import columns_of, cores_of, row_gradient_of_cores
from megamem.ops.row_buffer import Pass, RowBuffer
from megamem.ops.sort_lookups import NOTHING, Known, sort_lookups
from megamem.reference.embedding_bag import Cores
from megamem.reference.embedding_bag import embedding_bag as reference


def sparse_gradients(
    values_rV: Tensor,
    grad_GV: Tensor,
    row_ids_M: Tensor,
    weights: Tensor,
    offsets: Tensor,
    known: Known = NOTHING,
    *,
    first_column: int = 0,
    core_width: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the touched rows. The host does not wait for their number.

    Args:
        values_rV: this rank's shard of the value table.
        grad_GV: gradient of the bags.
        row_ids_M: row of the shard that each lookup reads, or -1 for none.
        weights: [M] or [M, O], weight of each lookup, or of each of its cores.
        offsets: [G + 1], where the lookups of each bag start; the last entry is M.
        known: what is known of the lookups.
        first_column: column of the whole table with which the shard begins.
        core_width: columns of the whole table that have the same weight; None for V // O.

    Returns:
        rows_E: the touched rows, ascending, then -1; E = min(M, r).
        grads_EV: their gradients in the dtype of grad_GV; undefined where rows_E is -1.
        weight_grads: gradient of the weights in their shape, fp32 (fp64 for an fp64 table).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.
    """
    check_inputs(values_rV, row_ids_M, weights, offsets)
    check_gradient(grad_GV, values_rV, offsets)
    cores = cores_of(weights, values_rV.shape[1], first_column, core_width)
    (num_rows, width), device = values_rV.shape, grad_GV.device
    num_slots = min(len(row_ids_M), num_rows)
    grads_EV = torch.empty(num_slots, width, dtype=grad_GV.dtype, device=device)
    if not use_triton(values_rV):
        rows_E = torch.full((num_slots,), -1, dtype=torch.int64, device=device)
        rows_U, grads_UV = _reference_gradient(grad_GV, row_ids_M, weights, offsets, cores)
        rows_E[: len(rows_U)], grads_EV[: len(rows_U)] = rows_U, grads_UV
        weights = weights.detach().requires_grad_()
        with torch.enable_grad():
            bags_GV = reference(
                values_rV.detach(), row_ids_M, weights, offsets, **columns_of(cores)
            )
            (weight_grads,) = torch.autograd.grad(bags_GV, weights, grad_GV)
        return rows_E, grads_EV, weight_grads
    lookups = sort_lookups(row_ids_M, weights, offsets, num_rows, known)
    rows_M = lookups.rows_or_none()
    starts_M = torch.ones(len(row_ids_M), dtype=torch.bool, device=device)
    starts_M[1:] = rows_M[1:] != rows_M[:-1]
    slots_M = starts_M.cumsum(0, dtype=torch.int32) - 1
    grad_GV = grad_GV.contiguous()
    by_weight = row_gradient_of_cores(lookups, grad_GV, values_rV, grads_EV, slots_M, cores=cores)
    assert by_weight is not None
    # lookups of no row share the slot after the last row, which may lie beyond the result
    rows_E = torch.full((num_slots + 1,), -1, dtype=torch.int64, device=device)
    rows_E[slots_M] = torch.where(rows_M < num_rows, rows_M.long(), -1)
    return rows_E[:num_slots], grads_EV, by_weight


def add_value_gradient_(
    buffer: RowBuffer | Tensor,
    grad_GV: Tensor,
    row_ids_M: Tensor,
    weights: Tensor,
    offsets: Tensor,
    known: Known = NOTHING,
    *,
    first_column: int = 0,
    core_width: int | None = None,
) -> None:
    """Add the value gradient to the touched rows of a buffer, and mark them.

    A buffer that defers keeps it until enough passes have come, or until add_deferred_().

    Sums are formed in fp32 and rounded once.

    Args:
        buffer: receives the gradient.
        grad_GV: gradient of the bags.
        row_ids_M: row of the shard that each lookup reads, or -1 for none.
        weights: [M] or [M, O], weight of each lookup, or of each of its cores.
        offsets: [G + 1], where the lookups of each bag start; the last entry is M.
        known: what is known of the lookups.
        first_column: column of the whole table with which the shard begins.
        core_width: columns of the whole table that have the same weight; None for V // O.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.
    """
    if isinstance(buffer, Tensor):
        buffer = RowBuffer(buffer)
    buffer_rV = buffer.buffer_rV
    check_inputs(buffer_rV, row_ids_M, weights, offsets)
    check_gradient(grad_GV, buffer_rV, offsets)
    cores = cores_of(weights, buffer_rV.shape[1], first_column, core_width)
    if buffer.deferred is not None:
        passes = buffer.deferred.passes
        passes.append(Pass(grad_GV, row_ids_M, weights.detach(), offsets, known, cores))
        if len(passes) >= buffer.deferred.every:
            add_deferred_(buffer)
        return
    if not use_triton(grad_GV):
        rows_U, grads_UV = _reference_gradient(
            grad_GV.to(torch.promote_types(grad_GV.dtype, torch.float32)),
            row_ids_M,
            weights,
            offsets,
            cores,
        )
        old_UV = buffer_rV[rows_U]
        if buffer.overwrites and buffer.touched_r is not None:
            old_UV = old_UV.where(buffer.touched_r[rows_U].unsqueeze(1), 0)
        buffer_rV[rows_U] = (old_UV + grads_UV).to(buffer_rV.dtype)
        buffer.mark(rows_U)
        return
    lookups = sort_lookups(row_ids_M, weights, offsets, len(buffer_rV), known)
    add_rows_(buffer, lookups, grad_GV.contiguous(), None, cores)


def add_deferred_(buffer: RowBuffer) -> None:
    """Add the gradients of all passes that the buffer holds back, as those of one larger pass."""
    if buffer.deferred is None or not buffer.deferred.passes:
        return
    passes = buffer.deferred.passes[:]
    buffer.deferred.passes.clear()
    starts = accumulate((len(one.row_ids_M) for one in passes), initial=0)
    ends = [one.offsets[1:] + start for one, start in zip(passes, starts, strict=False)]
    offsets = torch.cat((passes[0].offsets[:1], *ends))
    expected = [one.known.expected for one in passes if one.known.expected is not None]
    lengths = {len(one.row_ids_M) / max(1, len(one.offsets) - 1) for one in passes}
    add_value_gradient_(
        replace(buffer, deferred=None),
        torch.cat([one.grad_GV for one in passes]),
        torch.cat([one.row_ids_M for one in passes]),
        torch.cat([one.weights for one in passes]),
        offsets,
        Known(
            may_skip=any(one.known.may_skip for one in passes),
            equal_bags=all(one.known.equal_bags for one in passes) and len(lengths) == 1,
            expected=sum(expected) if len(expected) == len(passes) else None,
        ),
        **columns_of(passes[0].cores),
    )


def add_rows_(
    buffer: RowBuffer,
    lookups: SortedLookups,
    grad_GV: Tensor,
    values_rV: Tensor | None,
    cores: Cores | None = None,
) -> Tensor | None:
    """Add the value gradient of sorted lookups to a buffer; return that of their weights, if any.

    The gradient of the weights is computed if `values_rV`, the table, is given.
    """
    if buffer.overwrites:
        out, touched_r = buffer.buffer_rV, buffer.touched_r
        return row_gradient_of_cores(
            lookups, grad_GV, values_rV, out, add=True, touched_r=touched_r, cores=cores
        )
    by_weight = row_gradient_of_cores(
        lookups, grad_GV, values_rV, buffer.buffer_rV, add=True, cores=cores
    )
    if lookups.count is None:
        buffer.mark(lookups.rows_M)
    elif buffer.touched_r is not None:
        mark_rows_(lookups, buffer.touched_r)
    return by_weight


def _reference_gradient(
    grad_GV: Tensor, row_ids_M: Tensor, weights: Tensor, offsets: Tensor, cores: Cores | None
) -> tuple[Tensor, Tensor]:
    """Return the touched rows and their gradients, by autograd on a table of these rows alone."""
    rows_U, slots = row_ids_M[row_ids_M >= 0].unique(return_inverse=True)
    compact_ids_M = torch.full_like(row_ids_M, -1)
    compact_ids_M[row_ids_M >= 0] = slots.to(compact_ids_M.dtype)
    table_UV = grad_GV.new_zeros(max(1, len(rows_U)), grad_GV.shape[1], requires_grad=True)
    with torch.enable_grad():
        bags_GV = reference(table_UV, compact_ids_M, weights.detach(), offsets, **columns_of(cores))
        (grads_UV,) = torch.autograd.grad(bags_GV, table_UV, grad_GV)
    return rows_U, grads_UV[: len(rows_U)]
