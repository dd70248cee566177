"""One table of rows, of which this rank holds some rows or columns."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megamem.layers.init import WeightFactory
from megamem.metrics import TableMetrics, there_and_back
from megamem.ops import embedding_bag, row_dot, unplace_rows
from megamem.parallel.collectives import group_rank
from megamem.parallel.memory_group import MemoryGroup
from megamem.parallel.routing import RoutingPlan
from megamem.parallel.row_shard import TableShard
from megamem.read_counter import ReadCounter
from megamem.row_gradient import RowGradient
from megamem.spec import MemorySpec


@dataclass(frozen=True)
class Arrived:
    """Lookups at the rank that holds their rows."""

    plan: RoutingPlan
    rows_M: Tensor
    """Of this rank's piece; -1 reads nothing."""
    weights_M: Tensor
    x_GD: Tensor | None
    """The token of every bag, where the variant looks at them."""


def initial_rows(
    spec: MemorySpec, std: float, make: WeightFactory, shard: TableShard
) -> nn.Parameter:
    """A piece of a table before training, N(0, std).

    A pair of sub-keys starts with the same row, wherever that row is placed.
    """
    return make.normal(
        "values",
        *shard.shape,
        std=std,
        piece=shard,
        name_rows=lambda rows: unplace_rows(rows, spec.num_keys, spec.placement_seed),
    )


class ValueTable(nn.Module):
    """R rows of width V, initialised N(0, std), of which this rank holds [r, v].

    By default autograd makes a dense gradient. An optimizer hands the table a RowGradient, to which
    the gradients of touched rows are added, so that nothing per backward is as large as the table,
    and a ReadCounter, which is a part of the model's state.
    """

    def __init__(
        self, spec: MemorySpec, name: str, std: float, make: WeightFactory, group: MemoryGroup
    ) -> None:
        """Draw this rank's piece.

        Args:
            spec: of the run.
            name: of the table in the model and in checkpoints.
            std: standard deviation of the initial rows.
            make: draws them.
            group: the ranks that hold the other pieces.
        """
        super().__init__()
        self.name, self.group = name, group
        self.shard = TableShard.cut(
            (spec.num_rows, spec.value_dim),
            row=(group_rank(group.rows), group.row_ranks),
            column=(group_rank(group.columns), group.column_ranks),
        )
        self.check_row_ids = spec.check_row_ids or None
        self.weight = initial_rows(spec, std, make, self.shard)
        self.register_buffer("placement", torch.tensor([spec.placement_seed], device=make.device))
        self.placement: Tensor
        self.gradient: RowGradient | None = None
        self.reads: ReadCounter | None = None
        self.metrics: TableMetrics | None = None

    def learn_with(self, gradient: RowGradient, reads: ReadCounter | None = None) -> None:
        """Add gradients to one that an optimizer owns, from now on, and count what is read.

        Autograd makes none any longer.
        """
        self.weight.requires_grad_(False)
        self.gradient, self.reads = gradient, reads
        for name, count in reads.state.items() if reads else ():
            self.register_buffer(name, count)

    def bag(self, arrived: Arrived, weights_M: Tensor) -> Tensor:
        """The sum of each bag's rows by weight -> bags_Gv."""
        self._mark(arrived.rows_M)
        return embedding_bag(
            self.weight,
            arrived.rows_M,
            weights_M,
            arrived.plan.offsets,
            check_row_ids=self.check_row_ids,
            add_value_grad_to=self._buffer(),
        )

    def dot(self, arrived: Arrived) -> Tensor:
        """The product of each lookup's row with the token of its bag -> dots_M."""
        assert arrived.x_GD is not None
        self._mark(arrived.rows_M)
        dots_M = row_dot(
            self.weight,
            arrived.x_GD,
            arrived.rows_M,
            arrived.plan.offsets,
            check_row_ids=self.check_row_ids,
            add_value_grad_to=self._buffer(),
        )
        if self.metrics is not None and torch.is_grad_enabled():
            token_bytes = arrived.x_GD.shape[1] * arrived.x_GD.element_size()
            self.metrics.bytes_sent += there_and_back(arrived.plan, token_bytes)
        return dots_M

    def _buffer(self) -> Tensor | None:
        """What the backward of this pass adds to, where there is a backward."""
        if self.gradient is None or not torch.is_grad_enabled():
            return None
        return self.gradient.buffer

    def _mark(self, rows_M: Tensor) -> None:
        """Note what is read, where somebody asked for it, in passes that will be learnt from."""
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
            f"{self.name}: rows={num_rows}, width={width}, on {self.group.row_ranks} x "
            f"{self.group.column_ranks} ranks, here {local_rows} x {local_width}"
        )
