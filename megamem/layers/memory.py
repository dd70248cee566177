"""The memory layer. Read this file first: its forward is the complete data path.

Tensor names end in one letter per axis. Letters, for all files of the package:

    S, B sequence, batch            T tokens on this rank           D hidden size
    H heads                         Q = 2C query width of a head    C sub-key width, half a query
    N sub-keys per half             K top-k                         L = H * K lookups per token
    J = T * L local lookups         M lookups received here         R = N * N rows, r on this rank
    V row width, v on this rank     W ranks of the memory group     G bags: the tokens of all ranks
    E entries of a list             U distinct rows                 X tokens of all column ranks

and for the Tucker scores of UltraMem

    A Tucker rank                   F rows read by a head           O cores
    Y bags (blocks) of a token

A lower-case letter is this rank's part of the upper-case one, and a digit is an axis of that size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megamem.layers.init import WeightFactory
from megamem.layers.losses import ScoreLosses
from megamem.layers.memory_pool import Lookups, MemoryPool, permutation_of
from megamem.layers.query_conv import QueryConv
from megamem.layers.variants import placement_seed_of, variant_of
from megamem.metrics import LayerMetrics
from megamem.parallel.collectives import (
    GradientGroup,
    gather_counts,
    gather_tokens,
    group_size,
    split_tokens,
)
from megamem.parallel.row_shard import even_counts
from megamem.spec import MemorySpec


@dataclass(frozen=True)
class SentLookups:
    """What launch() hands to collect()."""

    lookups: Lookups
    gate_TV: Tensor | None
    split: list[int]
    """Number of tokens of each rank that computes a share of them."""
    shape: torch.Size
    """S, B and D."""


class MemoryLayer(nn.Module):
    """hidden states -> query -> product-key top-k -> read-out of the pool's tables -> output.

    The layer is token-parallel: each token is looked up by one rank. Where hidden states are
    replicated over `group` (`tokens_sharded=False`, tensor parallelism without sequence
    parallelism), each rank computes its share of the tokens and the outputs are gathered. Where
    they are sharded (sequence parallelism, or data parallelism), each rank computes its own tokens.

    The pool is not a submodule, as it may serve several layers: the code that builds the model
    registers the pool's tables once. The memory group of the pool may be smaller or larger than
    `group`.
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
        """Allocate and initialize the layer's own weights: query, sub-keys and output.

        Args:
            spec: the memory layers of the run.
            pool: the tables that this layer reads.
            layer: number of the layer in the model, from 0; the initial weights depend on it.
            group: ranks that hold the same hidden states, or shards of one sequence.
            tokens_sharded: whether each rank of the group holds different tokens.
            device: device of the layer's own weights.
            dtype: dtype of the layer's own weights.
        """
        super().__init__()
        assert pool.spec.variant == spec.variant, (pool.spec.variant, spec.variant)
        self.layer, self.pool, self.group = layer, pool, group
        self.tokens_sharded, self.tokens_vary = tokens_sharded, spec.tokens_vary
        # where tokens are sharded, the caller's framework sums the gradients, as it does for norms
        # under sequence parallelism; where they are replicated, it does not
        self.gradient_group = None if tokens_sharded or group is None else GradientGroup(group)
        make = WeightFactory(
            seed=spec.seed,
            name=f"layer_{layer}",
            gradient_group=self.gradient_group,
            device=device,
            dtype=dtype,
        )
        variant = variant_of(spec)
        self.query_conv = QueryConv(spec, make, group) if spec.query_conv else None
        self.query = variant.query(spec, make)
        self.keys = variant.keys(spec, make)
        self.losses = self.keys.losses = ScoreLosses.of(spec, group)
        self.token = variant.token(spec, make)
        self.output = variant.output(spec, make)
        self.dropout = spec.dropout
        self.placement_seed = placement_seed_of(layer, spec)
        stored = spec.placement == "stored"
        permutation = permutation_of(spec, self.placement_seed, device) if stored else None
        self.register_buffer("permutation", permutation)
        self.permutation: Tensor | None
        self.metrics: LayerMetrics | None = None
        for table in pool:
            table.readers += 1

    def forward(
        self,
        hidden_SBD: Tensor,
        token_counts: list[int] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        """Return the memory's output for each token, [S, B, D].

        Args:
            hidden_SBD: hidden states after the norm of the transformer block.
            token_counts: number of tokens of every rank that shares the tables, where the caller
                knows it; by default it is derived or exchanged.
            meanwhile: called while the lookups are sent.
        """
        sent = self.launch(hidden_SBD, token_counts)
        if meanwhile is not None:
            meanwhile()
        return self.collect(sent)

    def launch(self, hidden_SBD: Tensor, token_counts: list[int] | None = None) -> "SentLookups":
        """Choose the rows that each token reads, and start sending the lookups to their owners.

        The arguments are those of forward().
        """
        x_TD = hidden_SBD.flatten(0, 1)
        ranks = group_size(self.group)
        split = [len(x_TD)] * ranks if self.tokens_sharded else even_counts(len(x_TD), ranks)
        if not self.tokens_sharded:
            x_TD = split_tokens(x_TD, split, self.group)

        seen_TD = x_TD
        if self.query_conv is not None:
            seen_TD = self.query_conv(x_TD, hidden_SBD.shape[1], split)
        row_ids_TL, weights_TL = self.keys(self.query(seen_TD), sum(split))
        counts = token_counts or self._token_counts(len(x_TD), split)
        lookups = self.pool.launch(
            row_ids_TL,
            weights_TL,
            counts,
            self.token(x_TD),
            self.placement_seed if self.permutation is None else self.permutation,
        )
        # the gate depends on the token alone, so it is computed while the lookups are sent
        gate_TV = self.output.compute_gate(x_TD)
        if self.metrics is not None and torch.is_grad_enabled():
            self.metrics.record(row_ids_TL, weights_TL, gate_TV)
        return SentLookups(lookups, gate_TV, split, hidden_SBD.shape)

    def collect(self, sent: "SentLookups") -> Tensor:
        """Wait for the lookups of launch(), and return the memory's output, [S, B, D]."""
        # weights whose gradients are computed after the gradients of read-outs have left
        late = self.output.late_weights() if self.pool.group.world_size > 1 else None
        out_TV = self.pool.collect(sent.lookups)
        y_TD = self.output(out_TV, sent.gate_TV, late)

        if not self.tokens_sharded:
            y_TD = gather_tokens(y_TD, sent.split, self.group)
        if self.dropout:
            # after the gather, so that ranks with equal tokens drop the same numbers of them
            # wherever their random states are equal, as Megatron keeps those outside its tracker
            y_TD = F.dropout(y_TD, self.dropout, self.training)
        return y_TD.view(sent.shape)

    def join(self) -> bool:
        """Take part in one forward of the other ranks that share the tables, without tokens.

        The ranks must exchange their numbers of tokens (`tokens_vary`).

        Returns:
            whether there was such a forward; if not, the other ranks have called join(), too.
        """
        assert self.tokens_vary
        counts = self._token_counts(0, [])
        if not any(counts):
            return False
        self(next(self.query.parameters()).new_empty(0, 1, self.pool.spec.hidden_size), counts)
        return True

    def _token_counts(self, tokens: int, split: list[int]) -> list[int]:
        """Return the number of tokens of every rank that shares the tables."""
        group = self.pool.group
        if self.tokens_vary:
            return gather_counts(tokens, group.members, self.pool.device)
        if self.tokens_sharded:
            return [tokens] * group.world_size
        return group.split_counts(split)
