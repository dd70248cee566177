"""The table of values that memory layers read, sharded by rows over a group of ranks."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megamem.config import MemoryConfig
from megamem.layers.init import WeightFactory
from megamem.ops import embedding_bag
from megamem.parallel.collectives import group_rank, group_size
from megamem.parallel.routing import choose_wire, combine, dispatch, plan_routing
from megamem.parallel.row_shard import RowShard


class ValueTable(nn.Module):
    """R rows of width V, of which this rank holds r, initialised N(0, V**-0.5).

    One table may serve several layers (`--memory-pool shared`). Its gradient then has several
    sources, and they are joined here: every layer but the one whose backward runs last parks its
    share, and that last one hands the sum to the parameter. So a parameter's gradient arrives once
    per backward pass even where each layer is recomputed by a backward pass of its own, which is
    what overlapped gradient reduction counts on.
    """

    def __init__(
        self, config: MemoryConfig, make: WeightFactory, group: ProcessGroup | None
    ) -> None:
        super().__init__()
        self.group = group
        self.shard = RowShard(config.num_rows, group_rank(group), group_size(group))
        self.wire = choose_wire(config.memory_wire, self.shard.world_size)
        std = config.memory_value_init_std
        self.weight = make.normal(
            "values",
            self.shard.num_local,
            config.value_dim,
            std=config.value_dim**-0.5 if std is None else std,
            first_row=self.shard.start,
        )
        self._parked: list[Tensor] = []

    def forward(
        self, row_ids_TL: Tensor, weights_TL: Tensor, token_counts: list[int], parks: bool = False
    ) -> Tensor:
        """Sum every token's rows by weight, whichever ranks hold them -> out_TV.

        Args:
            row_ids_TL: rows of the whole table.
            weights_TL: how much of each.
            token_counts: T of every rank of the group.
            parks: another layer that shares this table comes later in this backward pass.
        """
        if parks:
            # detached: even an absent gradient would tell the parameter that its turn has come
            values_rV, weights_TL = _ParkGradient.apply(
                self.weight.detach(), weights_TL, self._parked
            )
        else:
            values_rV = _JoinGradients.apply(self.weight, self._parked)
        plan = plan_routing(row_ids_TL, self.shard, self.group, token_counts, self.wire)
        weights_M = dispatch(plan, weights_TL)
        bags_GV = embedding_bag(values_rV, plan.row_ids_M, weights_M, plan.offsets)
        return combine(plan, bags_GV)

    def extra_repr(self) -> str:
        shard = self.shard
        return (
            f"rows={shard.num_rows}, width={self.weight.shape[1]}, "
            f"rank {shard.rank} of {shard.world_size} holds {shard.num_local}, wire={self.wire}"
        )


class _ParkGradient(torch.autograd.Function):
    """Forward: both inputs as they are. Backward: the table's gradient waits in `parked`.

    The weights come along to keep the graph alive, as the detached table would not.
    """

    @staticmethod
    def forward(ctx, values_rV, weights_TL, parked):  # type: ignore[no-untyped-def]
        ctx.parked = parked
        return values_rV.view_as(values_rV), weights_TL.view_as(weights_TL)

    @staticmethod
    def backward(ctx, grad_rV, grad_TL):  # type: ignore[no-untyped-def]
        if ctx.parked:
            ctx.parked[0] += grad_rV
        else:
            ctx.parked.append(grad_rV.clone())
        return None, grad_TL, None


class _JoinGradients(torch.autograd.Function):
    """Forward: the table as it is. Backward: its gradient and the parked ones."""

    @staticmethod
    def forward(ctx, weight, parked):  # type: ignore[no-untyped-def]
        ctx.parked = parked
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad_rV):  # type: ignore[no-untyped-def]
        return (grad_rV + ctx.parked.pop() if ctx.parked else grad_rV), None
