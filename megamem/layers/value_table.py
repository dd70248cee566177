"""The table of values that memory layers read, spread over the ranks of a memory group."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megamem.config import MemoryConfig
from megamem.layers.init import WeightFactory
from megamem.metrics import TableMetrics, sent_bytes, untimed
from megamem.ops import embedding_bag, place_rows, unplace_rows
from megamem.parallel.collectives import group_rank, join_columns
from megamem.parallel.columns import gather_lookups
from megamem.parallel.memory_group import MemoryGroup
from megamem.parallel.routing import (
    RoutingPlan,
    arrive,
    choose_wire,
    combine,
    dispatch,
    plan_routing,
)
from megamem.parallel.row_shard import TableShard
from megamem.read_counter import ReadCounter
from megamem.row_gradient import RowGradient


@dataclass(frozen=True)
class Lookups:
    """What a table was asked, on its way to the rows."""

    plan: RoutingPlan
    weights_M: Tensor
    column_counts: list[int]
    """T of every column rank."""
    gathered: Tensor | None = None
    """The tokens, on their way to all owners, where these look at them."""


class ValueTable(nn.Module):
    """R rows of width V, initialised N(0, V**-0.5), of which this rank holds [r, v].

    One table may serve several layers (`--memory-pool shared`).

    By default autograd makes a dense gradient. An optimizer hands the table a RowGradient, to which
    the gradients of touched rows are added, so that nothing per backward is as large as the table,
    and a ReadCounter, which is a part of the model's state.
    """

    def __init__(self, config: MemoryConfig, make: WeightFactory, group: MemoryGroup) -> None:
        super().__init__()
        self.group = group
        self.shard = TableShard.cut(
            (config.num_rows, config.value_dim),
            row=(group_rank(group.rows), group.row_ranks),
            column=(group_rank(group.columns), group.column_ranks),
        )
        self.wire = choose_wire(config.memory_wire, group.row_ranks)
        self.num_keys, self.placement_seed = config.memory_num_keys, config.memory_placement_seed
        self.check_row_ids = config.memory_check_row_ids
        self.lookups_per_token = config.lookups_per_token
        std = config.memory_value_init_std
        self.weight = make.normal(
            "values",
            *self.shard.shape,
            std=config.value_dim**-0.5 if std is None else std,
            piece=self.shard,
            # a pair of sub-keys starts with the same row, wherever that row is placed
            name_rows=lambda rows: unplace_rows(rows, self.num_keys, self.placement_seed),
        )
        self.register_buffer("placement", torch.tensor([self.placement_seed], device=make.device))
        self.placement: Tensor
        self.gradient: RowGradient | None = None
        self.reads: ReadCounter | None = None
        self.metrics: TableMetrics | None = None

    def learn_with(self, gradient: RowGradient, reads: ReadCounter | None = None) -> None:
        """Add gradients to one that an optimizer owns, from now on, and count what is read."""
        self.gradient, self.reads = gradient, reads
        for name, count in reads.state.items() if reads else ():
            self.register_buffer(name, count)

    def launch(
        self,
        row_ids_TL: Tensor,
        weights_TL: Tensor,
        token_counts: list[int],
        x_TD: Tensor | None = None,
    ) -> Lookups:
        """Send lookups to the ranks that hold their rows; returns while they travel.

        Args:
            row_ids_TL: pairs of sub-keys, i * N + j.
            weights_TL: how much of each.
            token_counts: T of every member of the group.
            x_TD: the tokens, at which this table does not look.
        """
        group = self.group
        rows_TL = place_rows(row_ids_TL, self.num_keys, self.placement_seed)
        by_row_rank = torch.tensor(token_counts).view(group.row_ranks, group.column_ranks)
        column_counts = by_row_rank[group_rank(group.rows)].tolist()
        rows_XL, weights_XL = gather_lookups(
            rows_TL, weights_TL, self.shard.rows.num_rows, column_counts, group.columns
        )
        plan = plan_routing(
            rows_XL, self.shard.rows, group.rows, by_row_rank.sum(1).tolist(), self.wire
        )
        return Lookups(plan, dispatch(plan, weights_XL), column_counts)

    def collect(self, lookups: Lookups) -> Tensor:
        """Wait for the lookups, sum every token's rows by weight, send them home -> out_TV."""
        plan, metrics = lookups.plan, self.metrics if torch.is_grad_enabled() else None
        end_of = metrics.start() if metrics else untimed
        rows_M = arrive(plan)
        end_of("exchange")
        self._record(rows_M)
        bags_Gv = embedding_bag(
            self.weight,
            rows_M,
            self._weights(rows_M, lookups),
            plan.offsets,
            check_row_ids=self.check_row_ids or None,
            add_value_grad_to=self._buffer(),
        )
        end_of("lookup")
        sums_Xv = combine(plan, bags_Gv)
        out_TV = join_columns(sums_Xv, lookups.column_counts, self.shard.widths, self.group.columns)
        end_of("exchange")
        if metrics:
            metrics.bytes_sent += sent_bytes(
                plan,
                lookups.weights_M,
                bags_Gv,
                lookups=self.lookups_per_token,
                column_counts=lookups.column_counts,
                width=self.shard.global_shape[1],
                column_rank=group_rank(self.group.columns),
            )
        return out_TV

    def forward(
        self,
        row_ids_TL: Tensor,
        weights_TL: Tensor,
        token_counts: list[int],
        x_TD: Tensor | None = None,
    ) -> Tensor:
        """launch() and collect() -> out_TV."""
        return self.collect(self.launch(row_ids_TL, weights_TL, token_counts, x_TD))

    def _weights(self, rows_M: Tensor, lookups: Lookups) -> Tensor:
        """How much of each row its bag gets, once the lookups have arrived -> weights_M."""
        return lookups.weights_M

    def _buffer(self) -> Tensor | None:
        """What the backward of this pass adds to, where there is a backward."""
        if self.gradient is None or not torch.is_grad_enabled():
            return None
        return self.gradient.buffer

    def _record(self, rows_M: Tensor) -> None:
        """Note what was read, where somebody asked for it, in passes that will be learnt from."""
        if not torch.is_grad_enabled():
            return
        for watcher in (self.gradient, self.reads, self.metrics):
            if watcher is not None:
                watcher.mark(rows_M)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **more: Any
    ) -> None:
        """As of any module; a state without counts leaves them as they are."""
        for name, count in self.reads.state.items() if self.reads else ():
            state_dict.setdefault(prefix + name, count)
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)
        if self.reads:
            self.reads.in_checkpoint = True

    def extra_repr(self) -> str:
        (num_rows, width), (local_rows, local_width) = self.shard.global_shape, self.shard.shape
        return (
            f"rows={num_rows}, width={width}, on {self.group.row_ranks} x "
            f"{self.group.column_ranks} ranks, here {local_rows} x {local_width}, wire={self.wire}"
        )
