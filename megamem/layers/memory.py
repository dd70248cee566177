"""The memory layer: read this file first; its forward is the whole data path.

Shape key, for the package:

    S, B sequence, batch            T tokens on this rank           D hidden size
    H heads                         Q = 2C query width of a head    C half-query = sub-key width
    N sub-keys per half             K top-k                         L = H * K lookups per token
    J = T * L local lookups         M lookups received here         R = N * N rows, r on this rank
    V row width                     W ranks of the memory group     G bags: the tokens of all ranks

A lower-case letter is this rank's part of the upper-case one.
"""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megamem.layers.init import WeightFactory
from megamem.layers.memory_pool import MemoryPool
from megamem.layers.product_keys import ProductKeys
from megamem.layers.query import Query
from megamem.layers.variants import variant_of
from megamem.metrics import LayerMetrics
from megamem.parallel.collectives import gather_tokens, group_size, share_counts, split_tokens
from megamem.parallel.row_shard import even_counts
from megamem.spec import MemorySpec


class MemoryLayer(nn.Module):
    """hidden states -> query -> product-key top-k -> read-out of the pool's tables -> output.

    The layer is token-parallel: no two ranks look up the same token. Where hidden states are
    replicated over `group` (`tokens_sharded=False`, plain tensor parallelism) each rank takes its
    share first and gathers the output last; where they are sharded (sequence parallelism, or ranks
    with data of their own) it works on what it gets.

    The pool is used, not owned: it may serve several layers, so whoever builds it registers its
    tables once in the model. The ranks that it is spread over are its own affair: they may be fewer
    or many more than `group`.
    """

    def __init__(
        self,
        spec: MemorySpec,
        pool: MemoryPool,
        *,
        layer: int = 0,
        group: ProcessGroup | None = None,
        tokens_sharded: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the layer's own weights.

        Args:
            spec: of the run.
            pool: the tables that this layer reads.
            layer: its number in the model, from 0; the initial weights depend on it.
            group: ranks that hold the same hidden states, or shards of one sequence.
            tokens_sharded: hidden states differ from rank to rank of the group.
            device, dtype: of the layer's own weights.
        """
        super().__init__()
        assert pool.spec.variant == spec.variant, (pool.spec.variant, spec.variant)
        self.layer, self.pool, self.group = layer, pool, group
        self.tokens_sharded, self.tokens_vary = tokens_sharded, spec.tokens_vary
        make = WeightFactory(
            seed=spec.seed,
            name=f"layer_{layer}",
            # sharded tokens come with sharded gradients, which the caller's framework sums, as it
            # does for norms under sequence parallelism; of replicated ones it knows nothing
            gradient_group=None if tokens_sharded else group,
            device=device,
            dtype=dtype,
        )
        self.query = Query(spec, make)
        self.keys = ProductKeys(spec, make)
        self.output = variant_of(spec).output(spec, make)
        self.metrics: LayerMetrics | None = None

    def forward(self, hidden_SBD: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """Replace each token by what the memory holds for it.

        Args:
            hidden_SBD: after the block's norm.
            token_counts: tokens of every rank that shares the table, where the caller knows them.
        """
        x_TD = hidden_SBD.flatten(0, 1)
        split = even_counts(len(x_TD), group_size(self.group))
        if not self.tokens_sharded:
            x_TD = split_tokens(x_TD, split, self.group)

        query_THQ = self.query(x_TD)
        row_ids_TL, weights_TL = self.keys(query_THQ)
        counts = token_counts or self._token_counts(len(x_TD), split)
        lookups = self.pool.launch(row_ids_TL, weights_TL, counts, x_TD)
        # the gate needs only the token: it is computed while the lookups travel
        gate_TV = self.output.gate_of(x_TD)
        if self.metrics is not None and torch.is_grad_enabled():
            self.metrics.record(row_ids_TL, weights_TL, gate_TV)
        out_TV = self.pool.collect(lookups)
        y_TD = self.output(out_TV, gate_TV)

        if not self.tokens_sharded:
            y_TD = gather_tokens(y_TD, split, self.group)
        return y_TD.view_as(hidden_SBD)

    def _token_counts(self, tokens: int, split: list[int]) -> list[int]:
        """Tokens of every rank that shares the tables."""
        group = self.pool.group
        if self.tokens_vary:
            return share_counts(tokens, group.members, self.pool.device)
        if self.tokens_sharded:
            return [tokens] * group.world_size
        return group.split_counts(split)
