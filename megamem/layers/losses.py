"""Losses of Tucker scores beside the loss of the model, and how they join its gradient.

    core       keeps a head's core close to rank 1, so that the rank-1 scores of the first stage
               keep the pairs that the whole core would choose (UltraMem, arXiv 2411.12364)
    balance    makes all sub-keys chosen alike (UltraMemV2, arXiv 2508.18756, section 4.2)

Neither is added to the loss of the model. They join the gradient where the weights of lookups pass:
the backward of these starts that of the losses, as Megatron does for losses of experts.

Letters: T tokens on this rank, t of one piece, H heads, N sub-keys per side, A Tucker rank, C width
of a query and of a sub-key, W = C, or A * C where each rank has a query, O cores, K sub-keys of a
side in the first stage, X sub-keys of all heads, or choices of all tokens; 2 sides.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megamem.metrics import LayerMetrics
from megamem.ops import leading_directions
from megamem.parallel.collectives import group_size
from megamem.spec import MemorySpec

PIECE = 2**24
"""Scores of sub-keys that exist at the same time."""


@dataclass
class LossScale:
    """What the gradient of the model's loss is multiplied by, in the backward of a microbatch."""

    value: Tensor | float = 1.0
    """The loss scale; divided by the number of microbatches, unless `by_tokens`."""
    by_tokens: bool = False
    """Whether the loss of a microbatch is a sum over its tokens, and the gradient of a batch is
    divided by the number of its tokens."""

    def of(self, tokens: int) -> Tensor | float:
        """Return the factor for a loss that is a mean over a microbatch of so many tokens."""
        return self.value * tokens if self.by_tokens else self.value


class _StartLoss(torch.autograd.Function):
    """Forward: x. Backward: the backward of a loss begins as well, with the scale of that time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: LossScale, tokens: int) -> Tensor:
        ctx.scale, ctx.tokens, ctx.kind = scale, tokens, (loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dtype, device = ctx.kind
        scale = ctx.scale.of(ctx.tokens)
        if isinstance(scale, Tensor):
            return grad, scale.to(device, dtype).reshape(()), None, None
        # a number is filled in on the device, not copied to it
        return grad, torch.full((), scale, dtype=dtype, device=device), None, None


def start_loss(x: Tensor, loss: Tensor, scale: LossScale, tokens: int) -> Tensor:
    """Return x, whose backward also adds the gradient of a loss, times the scale.

    A forward without gradient, as in recomputation, adds nothing.

    Args:
        x: any tensor from which the loss of the model follows.
        loss: [], a mean over the tokens of a microbatch, or independent of them.
        scale: read in the backward.
        tokens: number of tokens of the microbatch.
    """
    return _StartLoss.apply(x, loss, scale, tokens)


def core_loss(cores_OHAA: Tensor, margin: float) -> Tensor:
    """Return the mean over heads of 1 / (A - 1) * sum over k >= 2 of max(0, lambda_k - margin)**2.

    lambda_k are the singular values of the sum of the cores, in descending order. The gradient of
    lambda_k by the core is u_k t_k^T. Where several of them are equal, their vectors are any basis
    of one space, and the gradient of the sum is the same for every basis. It is zero for rank 1.

    Args:
        cores_OHAA: the cores.
        margin: singular values up to this one add nothing.

    Returns:
        [], fp64.
    """
    core_HAA = cores_OHAA.double().sum(0)
    ranks = core_HAA.shape[-1]
    if ranks == 1:
        return core_HAA.sum() * 0
    left_HAA, right_HAA = _singular_vectors(core_HAA.detach())
    values_HA = torch.einsum("hak,hab,hbk->hk", left_HAA, core_HAA, right_HAA)
    excess = (values_HA[:, 1:] - margin).clamp(min=0)
    return excess.square().sum(1).mean() / (ranks - 1)


def _singular_vectors(core_HAA: Tensor) -> tuple[Tensor, Tensor]:
    """Return left and right singular vectors as columns; the host does not wait for rank 2."""
    # LAPACK raises an error for what is not finite
    core_HAA = core_HAA.nan_to_num(posinf=0, neginf=0)
    if core_HAA.shape[-1] > 2:
        left_HAA, _, right_HAA = torch.linalg.svd(core_HAA)
        return left_HAA, right_HAA.mT
    first_2HA = leading_directions(core_HAA, core_HAA.new_zeros(2, len(core_HAA), 2))
    # the other pair is at right angles; its sign is the one with a value that is not negative
    second_2HA = torch.stack((-first_2HA[..., 1], first_2HA[..., 0]), -1)
    value_H = torch.einsum("ha,hab,hb->h", second_2HA[0], core_HAA, second_2HA[1])
    second_2HA[1].mul_(torch.where(value_H < 0, -1.0, 1.0).unsqueeze(-1))
    left_HAA, right_HAA = torch.stack((first_2HA, second_2HA), -1)
    return left_HAA, right_HAA


class _Balance(torch.autograd.Function):
    """Forward: this rank's part of the loss and its gradient, by pieces. Backward: their product.

    Everything is computed in fp32, or in fp64 for fp64, so that small gradients stay in fp16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_T2W: Tensor,
        keys_2HNW: Tensor,
        topk: int,
        tokens: int,
        group: ProcessGroup | None,
    ) -> Tensor:
        ctx.dtypes = query_T2W.dtype, keys_2HNW.dtype
        wide = torch.promote_types(query_T2W.dtype, torch.float32)
        queries_2TW, keys_2HNW = query_T2W.to(wide).transpose(0, 1), keys_2HNW.to(wide)
        _, heads, num_keys, width = keys_2HNW.shape
        keys_2XW = keys_2HNW.flatten(1, 2)
        pieces = queries_2TW.split(max(1, PIECE // (2 * heads * num_keys)), dim=1)
        chosen_2HN = torch.zeros(2, heads, num_keys, dtype=torch.int64, device=keys_2HNW.device)
        for piece_2tW in pieces:
            scores_2tHN = (piece_2tW @ keys_2XW.mT).unflatten(-1, (heads, num_keys))
            ids_2HX = scores_2tHN.topk(topk).indices.transpose(1, 2).flatten(2)
            chosen_2HN.scatter_add_(2, ids_2HX, torch.ones_like(ids_2HX))
        if group is not None:
            dist.all_reduce(chosen_2HN, group=group)
        # selections per token, and the factor of the mean over tokens and heads
        factor = num_keys / (max(1, tokens) * heads)
        selected_21HN = (chosen_2HN.to(wide) / max(1, tokens)).unsqueeze(1)
        total, of_queries, of_keys = queries_2TW.new_zeros(()), [], torch.zeros_like(keys_2XW)
        for piece_2tW in pieces:
            scores_2tHN = (piece_2tW @ keys_2XW.mT).unflatten(-1, (heads, num_keys))
            shares_2tHN = scores_2tHN.softmax(-1)
            means_2tH1 = (shares_2tHN * selected_21HN).sum(-1, keepdim=True)
            grad_2tX = (shares_2tHN * (selected_21HN - means_2tH1) * factor).flatten(2)
            total += means_2tH1.sum() * factor
            of_queries.append(grad_2tX @ keys_2XW)
            of_keys += grad_2tX.mT @ piece_2tW
        of_query_T2W = torch.cat(of_queries, 1).transpose(0, 1)
        ctx.save_for_backward(of_query_T2W, of_keys.view_as(keys_2HNW))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        of_query, of_keys = ctx.saved_tensors
        of_query_dtype, of_keys_dtype = ctx.dtypes
        queries = (of_query * grad).to(of_query_dtype)
        return queries, (of_keys * grad).to(of_keys_dtype), None, None, None


def balance_loss(
    query_T2AC: Tensor,
    sub_keys_2HNAC: Tensor,
    directions_2HA: Tensor,
    topk: int,
    *,
    tokens: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Return this rank's part of N * sum over n of f_n p_n over rows, plus the same over columns.

    p_n is the mean over tokens of the softmax of the rank-1 scores, and f_n the number of times
    that the first stage chose sub-key n, per token. They are those of one head, and the loss is the
    mean over heads. f is summed over the ranks of `group`; the sum over these of the returned parts
    is the loss of all of their tokens. The gradient flows through p alone, to queries and sub-keys.

    Args:
        query_T2AC: queries; the axis A is 1 where all ranks share them.
        sub_keys_2HNAC: sub-keys.
        directions_2HA: (u, t), without gradient.
        topk: K.
        tokens: number of tokens of all ranks of the group; by default T.
        group: ranks with other tokens of the same microbatch; None for this rank alone.
    """
    weighted_2HNAC = sub_keys_2HNAC * directions_2HA.to(sub_keys_2HNAC.dtype)[:, :, None, :, None]
    shared = query_T2AC.shape[2] == 1
    keys_2HNW = weighted_2HNAC.sum(3) if shared else weighted_2HNAC.flatten(3)
    tokens = len(query_T2AC) if tokens is None else tokens
    return _Balance.apply(query_T2AC.flatten(2), keys_2HNW, topk, tokens, group)


@dataclass
class ScoreLosses:
    """The losses of one layer that have a weight."""

    spec: MemorySpec
    group: ProcessGroup | None
    """Ranks that hold the same hidden states, or shards of one sequence. The gradients of the
    layer's weights are summed over them."""
    scale: LossScale = field(default_factory=LossScale)
    metrics: LayerMetrics | None = None
    """Gets the losses of each forward, without their weights."""

    @classmethod
    def of(cls, spec: MemorySpec, group: ProcessGroup | None) -> "ScoreLosses | None":
        """Return the losses of a layer; None if none has a weight."""
        return cls(spec, group) if spec.core_aux_weight or spec.balance_weight else None

    def join(
        self,
        weights: Tensor,
        query_T2AC: Tensor,
        sub_keys_2HNAC: Tensor,
        cores_OHAA: Tensor,
        directions_2HA: Tensor,
        tokens: int,
    ) -> Tensor:
        """Return the weights of lookups, whose backward adds the gradients of the losses.

        Args:
            weights: of the lookups of this rank's tokens.
            query_T2AC, sub_keys_2HNAC, cores_OHAA, directions_2HA: what they were made of.
            tokens: number of tokens of all ranks of the group.
        """
        spec, ranks = self.spec, group_size(self.group)
        metrics = self.metrics
        if spec.core_aux_weight:
            # it depends on no token, so each rank has all of the gradient, of which the sum over
            # the ranks shall be one
            core = core_loss(cores_OHAA, spec.core_aux_margin)
            loss = core * (spec.core_aux_weight / ranks)
            weights = start_loss(weights, loss, self.scale, tokens)
            if metrics is not None:
                metrics.record_loss("core_loss", core.detach())
        if spec.balance_weight:
            part = balance_loss(
                query_T2AC,
                sub_keys_2HNAC,
                directions_2HA,
                spec.topk,
                tokens=tokens,
                group=self.group,
            )
            weights = start_loss(weights, part * spec.balance_weight, self.scale, tokens)
            if metrics is not None:
                # the mean over ranks of these is the mean of the losses of all tokens
                metrics.record_loss("balance_loss", part.detach() * ranks)
        return weights
