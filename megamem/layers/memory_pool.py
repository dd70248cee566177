"""The tables that memory layers read, and the exchange of lookups between ranks.

launch     row_ids_TL, weights_TL   are sent to the ranks that hold the rows
collect    bags_Gv                  are summed there (megamem.layers.variants)
           out_TV                   is sent back to the rank of each token and summed

Letters: T tokens on this rank, L lookups per token, D hidden size, M lookups received here, X the
tokens of all column ranks, G bags (the tokens of all ranks), V row width, v on this rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import batched

import torch
from torch import Tensor, nn

from megamem.layers.init import WeightFactory
from megamem.layers.value_table import ReceivedLookups, ValueTable
from megamem.layers.variants import variant_of
from megamem.metrics import sent_bytes, untimed
from megamem.ops import place_rows
from megamem.parallel.collectives import group_rank, join_columns
from megamem.parallel.columns import gather_lookups
from megamem.parallel.memory_group import MemoryGroup
from megamem.parallel.routing import (
    RoutingPlan,
    all_gather_tokens,
    combine,
    dispatch,
    plan_routing,
    receive,
    tokens_of_bags,
)
from megamem.parallel.row_shard import id_dtype
from megamem.spec import MemorySpec


@dataclass(frozen=True)
class Lookups:
    """Lookups that launch() has sent and collect() has yet to wait for."""

    plan: RoutingPlan
    """Which rank reads which rows for which."""
    weights_M: Tensor
    """Weights of the lookups; readable once the exchange is complete."""
    column_counts: list[int]
    """T of every column rank."""
    tokens: Tensor | None
    """The tokens, sent to all owners of rows, where the variant reads them; otherwise None."""


class MemoryPool:
    """The tables of one pool, sharded over the ranks of a memory group.

    A pool is not a module: it may serve several layers (`--memory-pool shared`), so the code that
    builds the model registers `tables` as a submodule once.
    """

    tables: nn.ModuleDict
    """Name within the pool -> ValueTable; the values come first."""
    registered = False
    """Whether the tables are a submodule of a model."""

    def __init__(
        self,
        spec: MemorySpec,
        name: str = "shared",
        group: MemoryGroup | None = None,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate and initialize this rank's shard of every table.

        Args:
            spec: the memory layers of the run; its seed and layout are used.
            name: name of the pool; the initial rows depend on it.
            group: the ranks over which the tables are sharded; by default this rank alone.
            device: device of the tables.
            dtype: dtype of the tables.
        """
        self.spec, self.name, self.group = spec, name, group or MemoryGroup()
        self.variant = variant_of(spec)
        shape = (self.group.world_size, self.group.column_ranks)
        assert shape == (spec.layout.group_size, spec.layout.column_ranks), (shape, spec.layout)
        self.tables = nn.ModuleDict()
        for use in self.variant.tables:
            table = self.variant.table_name(name, use)
            make = WeightFactory(seed=spec.seed, name=table, device=device, dtype=dtype)
            std = self.variant.init_std(spec, use)
            self.tables[use.name] = ValueTable(spec, table, std, make, self.group)

    def __iter__(self) -> Iterator[ValueTable]:
        """Yield the tables; the values come first."""
        for table in self.tables.values():
            assert isinstance(table, ValueTable)
            yield table

    @property
    def values(self) -> ValueTable:
        """The table that every variant has."""
        return next(iter(self))

    @property
    def device(self) -> torch.device:
        """The device of the tables."""
        return self.values.weight.device

    def launch(
        self, row_ids_TL: Tensor, weights_TL: Tensor, token_counts: list[int], x_TD: Tensor
    ) -> Lookups:
        """Start sending lookups to the ranks that hold their rows, and return without waiting.

        Args:
            row_ids_TL: pairs of sub-keys, i * N + j.
            weights_TL: weight of each lookup.
            token_counts: T of every member of the group.
            x_TD: the tokens; they are sent to the owners of rows if the variant reads them.
        """
        spec, group, rows = self.spec, self.group, self.values.shard.rows
        rows_TL = place_rows(
            row_ids_TL, spec.num_keys, spec.placement_seed, id_dtype(spec.num_rows)
        )
        # column ranks vary fastest
        by_row_rank = list(batched(token_counts, group.column_ranks))
        column_counts = list(by_row_rank[group_rank(group.rows)])
        rows_XL, weights_XL = gather_lookups(rows_TL, weights_TL, column_counts, group.columns)
        plan = plan_routing(rows_XL, rows, group.rows, [*map(sum, by_row_rank)], spec.wire)
        weights_M = dispatch(plan, weights_XL)
        tokens = all_gather_tokens(plan, x_TD) if self.variant.reads_tokens else None
        return Lookups(plan, weights_M, column_counts, tokens)

    def collect(self, lookups: Lookups) -> Tensor:
        """Wait for the lookups, read this rank's rows and exchange the partial sums.

        Returns:
            out_TV: the read-out of this rank's tokens.
        """
        plan, values = lookups.plan, self.values
        metrics = values.metrics if torch.is_grad_enabled() else None
        end_of = metrics.start() if metrics else untimed
        rows_M = receive(plan)
        end_of("exchange")
        x_GD = None if lookups.tokens is None else tokens_of_bags(plan, lookups.tokens)
        received = ReceivedLookups(plan, rows_M, lookups.weights_M, x_GD)
        bags_Gv = self.variant.read_out(self._by_name(), received)
        end_of("lookup")
        sums_Xv = combine(plan, bags_Gv)
        out_TV = join_columns(
            sums_Xv, lookups.column_counts, values.shard.widths, self.group.columns
        )
        end_of("exchange")
        if metrics:
            metrics.bytes_sent += sent_bytes(
                plan,
                lookups.weights_M,
                bags_Gv,
                lookups=self.spec.lookups_per_token,
                column_counts=lookups.column_counts,
                width=self.spec.value_dim,
                column_rank=group_rank(self.group.columns),
            )
        return out_TV

    def read(
        self, row_ids_TL: Tensor, weights_TL: Tensor, token_counts: list[int], x_TD: Tensor
    ) -> Tensor:
        """Do launch() and collect() in one call, and return out_TV."""
        return self.collect(self.launch(row_ids_TL, weights_TL, token_counts, x_TD))

    def _by_name(self) -> dict[str, ValueTable]:
        return dict(zip(self.tables, self, strict=True))
