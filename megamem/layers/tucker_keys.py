"""Tucker-decomposed query-key retrieval of UltraMem: which rows each token reads (section 3.2 of
"Ultra-Sparse Memory Network", Huang et al. 2024, arXiv 2411.12364).

A sub-key and a query have A scores, and the score of a pair of sub-keys is row_A C column_A, where
the core C is the sum of O cores. The singular vectors of its largest singular value choose K rows
and K columns; of their pairs, the F with the best scores are read. Each core's own score of a pair
weights its part of the columns of the values; there is no softmax.

Letters: T tokens on this rank, D hidden size, H heads, A Tucker rank, C width of a query and of a
sub-key, N sub-keys per side, K sub-keys of a side in the first stage, F rows read per head,
L = H * F lookups per token, O cores; 2 sides.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from megamem.layers.init import WeightFactory
from megamem.layers.keys import Keys
from megamem.layers.linear import ReplicatedLinear, ReplicatedRMSNorm
from megamem.ops import leading_directions, tucker_topk
from megamem.parallel.collectives import reduce_gradient
from megamem.spec import MemorySpec

EPS = 1e-5


class TuckerQuery(nn.Module):
    """A row query and a column query of a token, which all heads share, RMS-normalized.

    The Tucker ranks share them as well, unless each has its own (UltraMemV2, arXiv 2508.18756,
    section 4.2.2). The norm has one gain for all of them.
    """

    def __init__(self, spec: MemorySpec, make: WeightFactory, std: float) -> None:
        super().__init__()
        width, self.ranks = spec.key_dim // 2, spec.tucker_rank if spec.rank_queries else 1
        weight = make.normal("query", 2 * self.ranks * width, spec.hidden_size, std=std)
        self.linear = ReplicatedLinear(weight, make, bias=False)
        self.norm = ReplicatedRMSNorm(width, make, gain=spec.query_gain, eps=EPS)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return query_T2AC; the axis A is 1 where all ranks share the queries."""
        return self.norm(self.linear(x_TD).unflatten(-1, (2, self.ranks, -1)))


class TuckerKeys(Keys):
    """The sub-keys and cores of a layer, and the rows that they choose.

    `directions` is the first pair of singular vectors (u, t) of each head's core. Both signs of it
    are singular vectors, but choose different rows; of the two, the one is taken that is nearer to
    the pair before. It is therefore state, which checkpoints hold, in fp32 whatever the dtype of
    the model. It follows from the cores and from what it was, so that a forward that is recomputed
    has the same.
    """

    directions: Tensor
    watched = False
    """Whether somebody sets `stale` after each change of the cores."""
    stale = True
    """Whether the directions may not be those of the cores."""

    def __init__(self, spec: MemorySpec, make: WeightFactory, std: float) -> None:
        super().__init__()
        self.topk, self.final_topk = spec.topk, spec.final_topk
        self.gradient_group = make.gradient_group
        heads, ranks, width = spec.heads, spec.tucker_rank, spec.key_dim // 2
        shape = (2, heads, spec.keys_per_side, ranks, width)
        self.sub_keys = make.normal("sub_keys", *shape, std=std)
        self.norm = ReplicatedRMSNorm(width, make, gain=spec.key_gain, eps=EPS)
        self.cores = make.uniform("cores", spec.cores, heads, ranks, ranks, bound=0.5, center=0.5)
        directions = torch.zeros(2, heads, ranks, dtype=torch.float32, device=make.device)
        self.register_buffer("directions", directions)

    def forward(self, query: Tensor, tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the rows that each token reads and their weights.

        Args:
            query: query_T2AC.
            tokens: number of tokens of all ranks that share the hidden states; by default T.

        Returns:
            row_ids_TL: int64 pairs of sub-keys, i * N + j.
            weights: fp32 (fp64 for fp64 queries), weights_TLO, or weights_TL for one core.
        """
        self._refresh()
        sub_keys_2HNAC = self.norm(reduce_gradient(self.sub_keys, self.gradient_group))
        cores_OHAA = reduce_gradient(self.cores, self.gradient_group)
        weights_THFO, row_ids_THF = tucker_topk(
            query, sub_keys_2HNAC, cores_OHAA, self.directions, self.topk, self.final_topk
        )
        weights_TLO = weights_THFO.flatten(1, 2)
        if self.losses is not None and self.training and torch.is_grad_enabled():
            tokens = len(query) if tokens is None else tokens
            weights_TLO = self.losses.join(
                weights_TLO, query, sub_keys_2HNAC, cores_OHAA, self.directions, tokens
            )
        one = weights_TLO.shape[-1] == 1
        return row_ids_THF.flatten(1), weights_TLO.squeeze(-1) if one else weights_TLO

    @torch.no_grad()
    def _refresh(self) -> None:
        """Make the directions those of the cores."""
        if self.watched and not self.stale:
            return
        core_HAA = self.cores.double().sum(0)
        self.directions.copy_(leading_directions(core_HAA, self.directions.double()))
        self.stale = False

    def _load_from_state_dict(self, *state: Any, **more: Any) -> None:
        """Load as any module does; the directions are then those before the cores that are
        loaded."""
        super()._load_from_state_dict(*state, **more)
        self.stale = True

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or convert the module as any other, but leave the directions in fp32."""
        before = self.directions
        super()._apply(fn, recurse)
        if self.directions.dtype != before.dtype:
            self.directions = before.to(self.directions.device)
        return self

    def extra_repr(self) -> str:
        _, heads, num_keys, ranks, width = self.sub_keys.shape
        return (
            f"heads={heads}, num_keys={num_keys}, ranks={ranks}, width={width}, "
            f"cores={len(self.cores)}, topk={self.topk}, final_topk={self.final_topk}"
        )
