"""Two-stage top-k by Tucker-decomposed scores, forward and backward.

Letters: T tokens, H heads, N sub-keys per side, C key width of a side, A rank, O cores, K rows and
columns kept of each token and head, F pairs returned, P = K * K pairs; M lookups of keys, G bags
and E = 2 * H * N * A keys, of both sides of all heads and ranks; 2 sides, rows and columns.
"""

from typing import Any

import torch
from torch import Tensor

from megamem.kernels import tucker_topk as kernels
from megamem.kernels.embedding_bag import sum_bags
from megamem.kernels.row_gradient import row_gradient
from megamem.kernels.tucker_topk_backward import tucker_topk_backward as kernel_of_pairs
from megamem.ops import forms
from megamem.ops.backend import use_triton
from megamem.ops.sort_lookups import Known, sort_lookups
from megamem.reference.tucker_topk import (
    best_pairs,
    ids_of_pairs,
    kept_sides,
    leading_directions,
    tokens_of_a_piece,
    weights_of_pairs,
)
from megamem.reference.tucker_topk import tucker_topk as reference

__all__ = ["leading_directions", "tucker_topk"]


class _TuckerTopk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_T2AC, keys_2HNAC, cores_OHAA, directions_2HA, sizes, chosen):  # type: ignore[no-untyped-def]
        form, ctx.form = chosen
        inputs = (query_T2AC, keys_2HNAC, cores_OHAA.float(), directions_2HA.float())
        forward = kernels.tucker_topk if _picked(form, *sizes) == "triton" else _by_torch
        weights_THFO, row_ids_THF, *found = forward(*inputs, *sizes)
        ctx.save_for_backward(query_T2AC, keys_2HNAC, cores_OHAA, *found)
        ctx.mark_non_differentiable(row_ids_THF)
        return weights_THFO, row_ids_THF

    @staticmethod
    def backward(ctx: Any, grad_THFO, _):  # type: ignore[no-untyped-def]
        query_T2AC, keys_2HNAC, cores_OHAA, pairs_THF, kept_2THK, sides_2THAK = ctx.saved_tensors
        want_query, want_keys, want_cores = ctx.needs_input_grad[:3]
        by_kernel = (ctx.form or forms.pick("tucker_topk_backward")) == "triton"
        backward = kernel_of_pairs if by_kernel else _pairs_by_torch
        fp32_OHAA = cores_OHAA.float().contiguous()
        grad_2THAK, grad_OHAA = backward(grad_THFO.contiguous(), pairs_THF, sides_2THAK, fp32_OHAA)
        grad_query, grad_keys = _keys_backward(
            grad_2THAK, kept_2THK, query_T2AC, keys_2HNAC, want_query, want_keys
        )
        grad_cores = grad_OHAA.to(cores_OHAA.dtype) if want_cores else None
        return grad_query, grad_keys, grad_cores, None, None, None


def _picked(form: str | None, topk: int, final_topk: int) -> str:
    form = form or forms.pick("tucker_topk")
    if form == "triton" and (topk > kernels.MAX_TOPK or final_topk > kernels.MAX_FINAL_TOPK):
        raise ValueError(
            f"topk is {topk} and final_topk is {final_topk}, but the form triton supports at most "
            f"{kernels.MAX_TOPK} rows and columns and {kernels.MAX_FINAL_TOPK} pairs per head; "
            f"drop tucker_topk=triton from {forms.ENVIRONMENT}."
        )
    return form


def _by_torch(
    query_T2AC: Tensor,
    keys_2HNAC: Tensor,
    cores_OHAA: Tensor,
    directions_2HA: Tensor,
    topk: int,
    final_topk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what the kernel does, by the parts of the reference, for some tokens at a time."""
    query_T2AC, keys_2HNAC = query_T2AC.float(), keys_2HNAC.float()
    query_T2AC = query_T2AC.expand(-1, -1, keys_2HNAC.shape[3], -1)
    parts = []
    for query in query_T2AC.split(tokens_of_a_piece(keys_2HNAC, topk)):
        kept_2THK, scores_2THKA = kept_sides(query, keys_2HNAC, directions_2HA, topk)
        pairs_THF = best_pairs(scores_2THKA, cores_OHAA, final_topk)
        weights_THFO = weights_of_pairs(scores_2THKA, cores_OHAA, pairs_THF)
        row_ids_THF = ids_of_pairs(kept_2THK, pairs_THF, keys_2HNAC.shape[2])
        sides_2THAK = scores_2THKA.transpose(3, 4)
        parts.append((weights_THFO, row_ids_THF, pairs_THF.int(), kept_2THK.int(), sides_2THAK))
    weights, row_ids, pairs, kept, sides = zip(*parts, strict=True)
    of_tokens = (torch.cat(weights), torch.cat(row_ids), torch.cat(pairs))
    return *of_tokens, torch.cat(kept, dim=1), torch.cat(sides, dim=1)


def _pairs_by_torch(
    grad_THFO: Tensor, pairs_THF: Tensor, sides_2THAK: Tensor, cores_OHAA: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the scores of the kept rows and columns, and of the cores.

    The gradients of the pairs of some tokens are written to a tensor of all their pairs. No two of
    a token write to the same place, so that the sums over pairs have a fixed order.
    """
    num_cores, heads, rank, _ = cores_OHAA.shape
    topk = sides_2THAK.shape[-1]
    grad_2THAK = torch.empty_like(sides_2THAK)
    grad_OHAA = torch.zeros_like(cores_OHAA)
    piece = max(1, kernels.score_bytes() // (4 * heads * num_cores * topk**2))
    for start in range(0, len(grad_THFO), piece):
        here = slice(start, start + piece)
        row_THAK, column_THAK = sides_2THAK[:, here]
        given_THOF = grad_THFO[here].transpose(-2, -1).to(cores_OHAA.dtype)
        grad_THOP = given_THOF.new_zeros(*given_THOF.shape[:3], topk**2)
        places_THOF = pairs_THF[here].long().unsqueeze(2).expand_as(given_THOF)
        grad_THOKK = grad_THOP.scatter_(3, places_THOF, given_THOF).unflatten(3, (topk, topk))
        # the gradients of C_c times the scores of a column, and of their transposes times a row's
        of_left_THOAK = torch.einsum("thoij,thbj->thobi", grad_THOKK, column_THAK)
        of_right_THOAK = torch.einsum("thoij,thai->thoaj", grad_THOKK, row_THAK)
        grad_2THAK[0, here] = torch.einsum("thobi,ohab->thai", of_left_THOAK, cores_OHAA)
        grad_2THAK[1, here] = torch.einsum("thoaj,ohab->thbj", of_right_THOAK, cores_OHAA)
        grad_OHAA += torch.einsum("thai,thobi->ohab", row_THAK, of_left_THOAK)
    return grad_2THAK, grad_OHAA


def _keys_backward(
    grad_2THAK: Tensor,
    kept_2THK: Tensor,
    query_T2AC: Tensor,
    keys_2HNAC: Tensor,
    want_query: bool,
    want_keys: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the queries and of the keys, by the kernels of embedding_bag."""
    _, num_tokens, heads, rank, topk = grad_2THAK.shape
    num_keys, width = keys_2HNAC.shape[2], keys_2HNAC.shape[4]
    # the gradient of a query is a bag of the keys that were kept for it, of one rank or of all
    bags_of_a_side = query_T2AC.shape[2]
    table_EC = keys_2HNAC.reshape(-1, width)
    device = kept_2THK.device
    sets_2H = torch.arange(2 * heads, device=device).view(2, 1, heads, 1, 1)
    row_ids_2THAK = (kept_2THK.long().unsqueeze(3) + sets_2H * num_keys) * rank
    row_ids_2THAK = row_ids_2THAK + torch.arange(rank, device=device).view(rank, 1)
    # the heads of a rank are beside each other, to be one bag
    row_ids_M = row_ids_2THAK.transpose(2, 3).flatten()
    weights_M = grad_2THAK.transpose(2, 3).flatten()
    bag_size = heads * topk * rank // bags_of_a_side
    offsets = torch.arange(0, len(row_ids_M) + 1, bag_size, device=device)
    grad_query = grad_keys = None
    if want_query:
        bags_GC = sum_bags(table_EC, row_ids_M, weights_M, offsets, may_skip=False)
        grad_query = bags_GC.view(2, num_tokens, bags_of_a_side, width).transpose(0, 1)
    if want_keys:
        queries_GC = query_T2AC.transpose(0, 1).reshape(-1, width)
        known = Known(may_skip=False, equal_bags=True)
        lookups = sort_lookups(row_ids_M, weights_M, offsets, len(table_EC), known)
        grad_EC = torch.zeros_like(table_EC)
        row_gradient(lookups, queries_GC, None, grad_EC)
        grad_keys = grad_EC.view_as(keys_2HNAC)
    return grad_query, grad_keys


def tucker_topk(
    query_T2AC: Tensor,
    keys_2HNAC: Tensor,
    cores_OHAA: Tensor,
    directions_2HA: Tensor,
    topk: int,
    final_topk: int,
    *,
    form: str | None = None,
    backward_form: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the best `final_topk` pairs of a row and a column for every token and head.

    megamem.reference.tucker_topk defines the result. Wherever scores are exact, the ids and their
    order are those of the reference, ties included. Repeated runs agree bit for bit, forward and
    backward.

    Args:
        query_T2AC: the row and the column query of each token, one for each rank; or one for all of
            them, with an axis of size 1. All heads share them.
        keys_2HNAC: the keys of rows and of columns.
        cores_OHAA: the cores of each head; their sum scores a pair.
        directions_2HA: u and t, the leading singular vectors of the summed core of each head; see
            leading_directions. They receive no gradient.
        topk: K, at most N.
        final_topk: F, at most K * K.
        form: takes precedence over the form that is selected or the default.
        backward_form: the same for the backward, which is tucker_topk_backward in the table of
            forms.

    Returns:
        weights_THFO: the score of each single core, in fp32 (fp64 for fp64 queries), in the order
            of the summed scores, best first.
        row_ids_THF: int64, id = i * N + j.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or if topk or final_topk is out of
            range.
    """
    _check_inputs(query_T2AC, keys_2HNAC, cores_OHAA, directions_2HA)
    _check_sizes(keys_2HNAC.shape[2], topk, final_topk)
    if not use_triton(query_T2AC) or not use_triton(keys_2HNAC):
        return reference(query_T2AC, keys_2HNAC, cores_OHAA, directions_2HA, topk, final_topk)
    dtype = torch.promote_types(query_T2AC.dtype, keys_2HNAC.dtype)
    return _TuckerTopk.apply(
        query_T2AC.to(dtype).contiguous(),
        keys_2HNAC.to(dtype).contiguous(),
        cores_OHAA,
        directions_2HA,
        (topk, final_topk),
        (form, backward_form),
    )


def _check_inputs(
    query_T2AC: Tensor, keys_2HNAC: Tensor, cores_OHAA: Tensor, directions_2HA: Tensor
) -> None:
    if query_T2AC.dim() != 4 or keys_2HNAC.dim() != 5 or len(keys_2HNAC) != 2:
        raise ValueError(
            f"queries have shape {tuple(query_T2AC.shape)} and keys {tuple(keys_2HNAC.shape)}, but "
            "they must be [tokens, 2, ranks or 1, width] and [2, heads, keys, ranks, width]."
        )
    named = {
        "queries": query_T2AC,
        "keys": keys_2HNAC,
        "cores": cores_OHAA,
        "directions": directions_2HA,
    }
    for name, x in named.items():
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {x.dtype}.")
    _, heads, _, rank, width = keys_2HNAC.shape
    if query_T2AC.shape[1:] not in ((2, rank, width), (2, 1, width)):
        raise ValueError(
            f"queries have shape {tuple(query_T2AC.shape)}, but keys of shape "
            f"{tuple(keys_2HNAC.shape)} need [tokens, 2, {rank} or 1, {width}]."
        )
    if cores_OHAA.dim() != 4 or cores_OHAA.shape[1:] != (heads, rank, rank) or not len(cores_OHAA):
        raise ValueError(
            f"cores have shape {tuple(cores_OHAA.shape)}, but keys of shape "
            f"{tuple(keys_2HNAC.shape)} need [cores, {heads}, {rank}, {rank}]."
        )
    if directions_2HA.shape != (2, heads, rank):
        raise ValueError(
            f"directions have shape {tuple(directions_2HA.shape)}, but keys of shape "
            f"{tuple(keys_2HNAC.shape)} need [2, {heads}, {rank}]."
        )
    if len(devices := {x.device for x in named.values()}) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"queries, keys, cores and directions are on {names}; use one device.")


def _check_sizes(num_keys: int, topk: int, final_topk: int) -> None:
    if not 1 <= topk <= num_keys:
        raise ValueError(
            f"topk is {topk}, but it must be between 1 and the {num_keys} keys per side."
        )
    if not 1 <= final_topk <= topk * topk:
        raise ValueError(
            f"final_topk is {final_topk}, but {topk} rows and {topk} columns have 1 to "
            f"{topk * topk} pairs."
        )
    if num_keys**2 >= 2**31:
        raise ValueError(
            f"there are {num_keys} keys per side, but row ids fit in 31 bits for at most 46340."
        )
