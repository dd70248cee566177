"""Exact product-key top-k, forward and backward.

Letters: T tokens, H heads, Q = 2C query width, C sub-key width, N sub-keys per half, K top-k;
M lookups of sub-keys, G bags and E = 2 * H * N sub-keys, of both halves of all tokens and heads;
2 halves.
"""

from typing import Any

import torch
from torch import Tensor

from megamem.kernels import product_topk as kernels
from megamem.kernels import product_topk_backward as dense_backward
from megamem.kernels import product_topk_fused as fused
from megamem.kernels.embedding_bag import sum_bags
from megamem.kernels.row_gradient import row_gradient
from megamem.ops import forms
from megamem.ops.backend import use_triton
from megamem.ops.sort_lookups import Known, sort_lookups
from megamem.reference.product_topk import product_topk as reference


class _ProductTopk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_THQ, sub_keys_2HNC, topk, chosen):  # type: ignore[no-untyped-def]
        form, ctx.form = chosen
        scores_THK, row_ids_THK = _forward(query_THQ, sub_keys_2HNC, topk, form)
        ctx.save_for_backward(query_THQ, sub_keys_2HNC, row_ids_THK)
        ctx.mark_non_differentiable(row_ids_THK)
        return scores_THK, row_ids_THK

    @staticmethod
    def backward(ctx: Any, grad_THK, _):  # type: ignore[no-untyped-def]
        query_THQ, sub_keys_2HNC, row_ids_THK = ctx.saved_tensors
        dense = (ctx.form or forms.pick("product_topk_backward")) == "dense"
        # the docstring of the kernel says why for these only
        dense &= sub_keys_2HNC.shape[2] <= dense_backward.MAX_KEYS
        dense &= query_THQ.dtype in (torch.bfloat16, torch.float32)
        backward = dense_backward.product_topk_backward if dense else _backward_by_bags
        saved = (row_ids_THK, query_THQ, sub_keys_2HNC)
        return *backward(grad_THK.contiguous(), *saved, *ctx.needs_input_grad[:2]), None, None


def _backward_by_bags(
    grad_THK: Tensor,
    row_ids_THK: Tensor,
    query_THQ: Tensor,
    sub_keys_2HNC: Tensor,
    want_query: bool,
    want_keys: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the queries and of the sub-keys, by the kernels of embedding_bag."""
    (num_tokens, heads, topk), num_keys = row_ids_THK.shape, sub_keys_2HNC.shape[2]
    # the gradient of a half query is a bag of the sub-keys that were chosen for it
    table_EC = sub_keys_2HNC.flatten(0, 2)
    halves_2THK = torch.stack((row_ids_THK // num_keys, row_ids_THK % num_keys))
    sets_2H = torch.arange(2 * heads, device=row_ids_THK.device).view(2, heads)
    row_ids_M = (halves_2THK + sets_2H.view(2, 1, heads, 1) * num_keys).flatten()
    weights_M = grad_THK.expand(2, -1, -1, -1).reshape(-1)
    offsets = torch.arange(0, len(row_ids_M) + 1, topk, device=row_ids_M.device)
    grad_query = grad_keys = None
    if want_query:
        bags_GC = sum_bags(table_EC, row_ids_M, weights_M, offsets, may_skip=False)
        grad_query = torch.cat(bags_GC.view(2, num_tokens, heads, -1).unbind(), dim=-1)
    if want_keys:
        halves_GC = torch.stack(query_THQ.chunk(2, dim=-1)).flatten(0, 2)
        known = Known(may_skip=False, equal_bags=True)
        lookups = sort_lookups(row_ids_M, weights_M, offsets, len(table_EC), known)
        grad_EC = torch.zeros_like(table_EC)
        row_gradient(lookups, halves_GC, None, grad_EC)
        grad_keys = grad_EC.view_as(sub_keys_2HNC)
    return grad_query, grad_keys


def _forward(
    query_THQ: Tensor, sub_keys_2HNC: Tensor, topk: int, form: str | None
) -> tuple[Tensor, Tensor]:
    # on a GPU, two_looks was only run with bf16 and at most 64 rows per head
    tried = topk <= (64 if query_THQ.is_cuda else kernels.MAX_TOPK)
    tried &= query_THQ.dtype == torch.bfloat16 or not query_THQ.is_cuda
    form = form or forms.pick("product_topk", otherwise=None if tried else "torch")
    if form == "fused" and topk <= fused.MAX_TOPK and query_THQ.dtype != torch.float64:
        return fused.product_topk(query_THQ, sub_keys_2HNC, topk)
    if form in ("torch", "fused"):
        return _by_torch(query_THQ, sub_keys_2HNC, topk)
    if topk > kernels.MAX_TOPK:
        raise ValueError(
            f"topk is {topk}, but the form two_looks supports at most {kernels.MAX_TOPK} rows per "
            f"head; drop product_topk=two_looks from {forms.ENVIRONMENT}."
        )
    return kernels.product_topk(query_THQ, sub_keys_2HNC, topk)


def _by_torch(query_THQ: Tensor, sub_keys_2HNC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Call the reference on as many tokens at a time as the kernel does, to keep scores small."""
    num_tokens, heads, _ = query_THQ.shape
    chunk = kernels.tokens_of_a_piece(sub_keys_2HNC.shape[2], heads)
    starts = range(0, max(1, num_tokens), chunk)
    parts = [reference(query_THQ[start : start + chunk], sub_keys_2HNC, topk) for start in starts]
    scores, row_ids = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(row_ids)


def product_topk(
    query_THQ: Tensor,
    sub_keys_2HNC: Tensor,
    topk: int,
    *,
    form: str | None = None,
    backward_form: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the best `topk` of the N*N product keys for every token and head.

    megamem.reference.product_topk defines the result. Wherever scores are exact, the ids and their
    order are those of the reference, ties included. Repeated runs agree bit for bit, forward and
    backward.

    Args:
        query_THQ: queries; Q = 2C, left half first.
        sub_keys_2HNC: the left and the right sub-keys.
        topk: K, at most N.
        form: takes precedence over the form that is selected or the default.
        backward_form: the same for the backward, which is product_topk_backward in the table of
            forms.

    Returns:
        scores_THK: fp32 (fp64 for fp64 queries), best first.
        row_ids_THK: int64, row = i * N + j.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or if topk is out of range.
    """
    _check_inputs(query_THQ, sub_keys_2HNC, topk)
    if not use_triton(query_THQ) or not use_triton(sub_keys_2HNC):
        return reference(query_THQ, sub_keys_2HNC, topk)
    dtype = torch.promote_types(query_THQ.dtype, sub_keys_2HNC.dtype)
    return _ProductTopk.apply(
        query_THQ.to(dtype).contiguous(),
        sub_keys_2HNC.to(dtype).contiguous(),
        topk,
        (form, backward_form),
    )


def _check_inputs(query_THQ: Tensor, sub_keys_2HNC: Tensor, topk: int) -> None:
    if query_THQ.dim() != 3 or sub_keys_2HNC.dim() != 4 or len(sub_keys_2HNC) != 2:
        raise ValueError(
            f"queries have shape {tuple(query_THQ.shape)} and sub-keys "
            f"{tuple(sub_keys_2HNC.shape)}, but they must be [tokens, heads, 2 * width] and "
            "[2, heads, keys, width]."
        )
    for name, x in (("queries", query_THQ), ("sub-keys", sub_keys_2HNC)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {x.dtype}.")
    _, heads, num_keys, key_dim = sub_keys_2HNC.shape
    if query_THQ.shape[1:] != (heads, 2 * key_dim):
        raise ValueError(
            f"queries have shape {tuple(query_THQ.shape)}, but sub-keys of shape "
            f"{tuple(sub_keys_2HNC.shape)} need {heads} heads of width {2 * key_dim}."
        )
    if not 1 <= topk <= num_keys:
        raise ValueError(f"topk is {topk}, but it must be between 1 and the {num_keys} sub-keys.")
    if num_keys**2 >= 2**31:
        raise ValueError(
            f"there are {num_keys} sub-keys per half, but row ids fit in 31 bits for at most 46340."
        )
    if query_THQ.device != sub_keys_2HNC.device:
        raise ValueError(
            f"queries are on {query_THQ.device}, but sub-keys are on {sub_keys_2HNC.device}; use "
            "one device."
        )
