"""Lookups with a weight for each core: each piece of a row's columns has the weight of its core.

The form of op `embedding_bag_cores` that is selected (megamem.ops.forms) computes them:

    pieces    each piece as a table of its own, by the kernels for one weight a lookup
    triton    all pieces in one launch of each kernel

Letters: r rows on this rank, V row width, M lookups, O cores, G bags.
"""

from dataclasses import replace

import torch
from torch import Tensor

from megamem.kernels.embedding_bag import sum_bags
from megamem.kernels.row_gradient import row_gradient
from megamem.kernels.sort_lookups import SortedLookups
from megamem.ops import forms
from megamem.reference.embedding_bag import Cores


def cores_of(
    weights: Tensor, num_columns: int, first_column: int, core_width: int | None
) -> Cores | None:
    """Return which weight each column has; None for weights [M], one for all columns.

    Args:
        weights: [M] or [M, O].
        num_columns: V.
        first_column: column of the whole table with which the shard begins.
        core_width: columns of the whole table that have the same weight; None for V // O.

    Raises:
        ValueError: if the pieces do not cover the shard, or are no multiples of 8 columns.
    """
    num_cores = 1 if weights.dim() == 1 else weights.shape[1]
    width = core_width or num_columns // max(1, num_cores)
    covered = width * num_cores
    if first_column < 0 or first_column + num_columns > covered:
        raise ValueError(
            f"columns {first_column} to {first_column + num_columns} of the table are read, but "
            f"{num_cores} weights a lookup for {width} columns each cover {covered}."
        )
    if width % 8 or first_column % 8:
        raise ValueError(
            f"the columns of one weight are {width}, and the shard begins with column "
            f"{first_column}, but both must be multiples of 8."
        )
    return None if weights.dim() == 1 else Cores(first_column, width)


def columns_of(cores: Cores | None) -> dict[str, int]:
    """Return the keyword arguments of an op that has these cores."""
    return {} if cores is None else vars(cores)


def sum_bags_of_cores(
    values_rV: Tensor,
    row_ids_M: Tensor,
    weights_MO: Tensor,
    offsets: Tensor,
    may_skip: bool,
    cores: Cores,
) -> Tensor:
    """Return bags_GV by the form of op `embedding_bag_cores` that is selected."""
    if forms.pick("embedding_bag_cores") == "triton":
        return sum_bags(
            values_rV,
            row_ids_M,
            weights_MO,
            offsets,
            may_skip,
            first_column=cores.first_column,
            core_width=cores.core_width,
        )
    num_bags, width = len(offsets) - 1, values_rV.shape[1]
    out_GV = torch.empty(num_bags, width, dtype=values_rV.dtype, device=values_rV.device)
    for core, start, end in cores.pieces(width):
        weights_M = weights_MO[:, core].contiguous()
        lookups = (row_ids_M, weights_M, offsets)
        sum_bags(values_rV, *lookups, may_skip, out_GV, slice(start, end))
    return out_GV


def row_gradient_of_cores(
    lookups: SortedLookups,
    grad_GV: Tensor,
    values_rV: Tensor | None,
    out: Tensor | None,
    slots_M: Tensor | None = None,
    add: bool = False,
    touched_r: Tensor | None = None,
    cores: Cores | None = None,
) -> Tensor | None:
    """Write the value gradient to `out`, and return that of the weights.

    megamem.kernels.row_gradient describes the arguments. With cores, the form of op
    `embedding_bag_cores` that is selected computes it; in the form pieces, no row is marked before
    all pieces were computed, as a row that is marked is added to.

    Returns:
        The weight gradient in the shape of the weights, in fp32; None without values.
    """
    if cores is None:
        return row_gradient(lookups, grad_GV, values_rV, out, slots_M, add, touched_r)
    if forms.pick("embedding_bag_cores") == "triton":
        return row_gradient(
            lookups,
            grad_GV,
            values_rV,
            out,
            slots_M,
            add,
            touched_r,
            first_column=cores.first_column,
            core_width=cores.core_width,
        )
    weights_MO = lookups.weights_M
    grad_MO = torch.zeros(weights_MO.shape, dtype=torch.float32, device=grad_GV.device)
    pieces = cores.pieces(grad_GV.shape[1])
    for piece in pieces:
        grad_M = row_gradient(
            replace(lookups, weights_M=weights_MO[:, piece.core].contiguous()),
            grad_GV,
            values_rV,
            out,
            slots_M,
            add,
            touched_r,
            slice(piece.start, piece.end),
            mark=piece is pieces[-1],
        )
        if grad_M is not None:
            grad_MO[:, piece.core] = grad_M
    return None if values_rV is None else grad_MO
