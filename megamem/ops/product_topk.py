"""Exact product-key top-k, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from megamem.kernels import product_topk as kernels
from megamem.kernels.embedding_bag import sum_bags
from megamem.kernels.row_gradient import row_gradient, sort_lookups
from megamem.ops import forms
from megamem.ops.backend import use_triton
from megamem.reference.product_topk import product_topk as reference


class _ProductTopk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_THQ, sub_keys_2HNC, topk):  # type: ignore[no-untyped-def]
        scores_THK, row_ids_THK = _forward(query_THQ, sub_keys_2HNC, topk)
        ctx.save_for_backward(query_THQ, sub_keys_2HNC, row_ids_THK)
        ctx.mark_non_differentiable(row_ids_THK)
        return scores_THK, row_ids_THK

    @staticmethod
    def backward(ctx: Any, grad_THK, _):  # type: ignore[no-untyped-def]
        query_THQ, sub_keys_2HNC, row_ids_THK = ctx.saved_tensors
        (num_tokens, heads, topk), num_keys = row_ids_THK.shape, sub_keys_2HNC.shape[2]
        # bag (half, token, head) reads the sub-keys of its half and head
        table_EC = sub_keys_2HNC.flatten(0, 2)
        halves_2THK = torch.stack((row_ids_THK // num_keys, row_ids_THK % num_keys))
        sets_2H = torch.arange(2 * heads, device=row_ids_THK.device).view(2, heads)
        row_ids_M = (halves_2THK + sets_2H.view(2, 1, heads, 1) * num_keys).flatten()
        weights_M = grad_THK.expand(2, -1, -1, -1).reshape(-1)
        offsets = torch.arange(0, len(row_ids_M) + 1, topk, device=row_ids_M.device)
        grad_query = grad_keys = None
        if ctx.needs_input_grad[0]:
            bags_GC = sum_bags(table_EC, row_ids_M, weights_M, offsets, may_skip=False)
            grad_query = torch.cat(bags_GC.view(2, num_tokens, heads, -1).unbind(), dim=-1)
        if ctx.needs_input_grad[1]:
            halves_GC = torch.stack(query_THQ.chunk(2, dim=-1)).flatten(0, 2)
            lookups = sort_lookups(row_ids_M, weights_M, offsets, len(table_EC))
            grad_EC = torch.zeros_like(table_EC)
            row_gradient(lookups, halves_GC, None, grad_EC)
            grad_keys = grad_EC.view_as(sub_keys_2HNC)
        return grad_query, grad_keys, None


def _forward(query_THQ: Tensor, sub_keys_2HNC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    # on a GPU two_looks has been tried with bf16 and at most 64 rows a head
    tried = topk <= (64 if query_THQ.is_cuda else kernels.MAX_TOPK)
    tried &= query_THQ.dtype == torch.bfloat16 or not query_THQ.is_cuda
    form = forms.pick("product_topk", otherwise=None if tried else "torch")
    if form == "torch":
        return _by_torch(query_THQ, sub_keys_2HNC, topk)
    if topk > kernels.MAX_TOPK:
        raise ValueError(
            f"topk {topk}: two_looks keeps at most {kernels.MAX_TOPK} rows a head; drop "
            f"product_topk=two_looks from {forms.ENVIRONMENT}."
        )
    return kernels.product_topk(query_THQ, sub_keys_2HNC, topk)


def _by_torch(query_THQ: Tensor, sub_keys_2HNC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The reference, in the pieces of tokens of the kernel, so that scores stay as small."""
    num_tokens, heads, _ = query_THQ.shape
    piece = kernels.tokens_of_a_piece(sub_keys_2HNC.shape[2], heads)
    starts = range(0, max(1, num_tokens), piece)
    parts = [reference(query_THQ[start : start + piece], sub_keys_2HNC, topk) for start in starts]
    scores, row_ids = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(row_ids)


def product_topk(query_THQ: Tensor, sub_keys_2HNC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The best `topk` of the N*N product keys for every token and head; see the reference.

    Ids and their order are the reference's wherever scores are exact, ties included. Repeated runs
    agree bit for bit, forward and backward.

    Args:
        query_THQ: queries; Q = 2C, left half first.
        sub_keys_2HNC: the left and the right sub-keys.
        topk: K, at most N.

    Returns:
        scores_THK: fp32 (fp64 for fp64 queries), best first.
        row_ids_THK: int64, row = i * N + j.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a topk out of range.
    """
    _check_inputs(query_THQ, sub_keys_2HNC, topk)
    if not use_triton(query_THQ) or not use_triton(sub_keys_2HNC):
        return reference(query_THQ, sub_keys_2HNC, topk)
    dtype = torch.promote_types(query_THQ.dtype, sub_keys_2HNC.dtype)
    return _ProductTopk.apply(
        query_THQ.to(dtype).contiguous(), sub_keys_2HNC.to(dtype).contiguous(), topk
    )


def _check_inputs(query_THQ: Tensor, sub_keys_2HNC: Tensor, topk: int) -> None:
    if query_THQ.dim() != 3 or sub_keys_2HNC.dim() != 4 or len(sub_keys_2HNC) != 2:
        raise ValueError(
            f"queries of shape {tuple(query_THQ.shape)} and sub-keys of shape "
            f"{tuple(sub_keys_2HNC.shape)}: [tokens, heads, 2 * width] and "
            "[2, heads, keys, width] are needed."
        )
    for name, x in (("queries", query_THQ), ("sub-keys", sub_keys_2HNC)):
        if not x.is_floating_point():
            raise ValueError(f"{name} of {x.dtype}: they must be floating point.")
    _, heads, num_keys, key_dim = sub_keys_2HNC.shape
    if query_THQ.shape[1:] != (heads, 2 * key_dim):
        raise ValueError(
            f"queries of shape {tuple(query_THQ.shape)} do not fit sub-keys of shape "
            f"{tuple(sub_keys_2HNC.shape)}: {heads} heads of width {2 * key_dim} are needed."
        )
    if not 1 <= topk <= num_keys:
        raise ValueError(f"topk {topk} of {num_keys} sub-keys: it must be between 1 and these.")
    if num_keys**2 >= 2**31:
        raise ValueError(f"{num_keys} sub-keys per half: at most 46340 leave room for row ids.")
    if query_THQ.device != sub_keys_2HNC.device:
        raise ValueError(
            f"queries on {query_THQ.device} and sub-keys on {sub_keys_2HNC.device}: use one device."
        )
