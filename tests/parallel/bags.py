"""Reads bags of virtual blocks over ranks, with a weight per core, and by a plain formula.

Letters: T tokens on this rank, L lookups per token, O cores, V row width, D width of a token, R
rows, Y blocks, M lookups received here, G bags, E tokens of all ranks; v columns on this rank.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from megamem.parallel.homeward import send_home
from megamem.parallel.memory_group import MemoryGroup
from megamem.parallel.pieces import Pieces, together
from megamem.parallel.routing import RoutingPlan, SentBytes, cut, plan_routing, send_lookups
from megamem.parallel.routing import send_tokens as send_tokens_to_owners
from megamem.parallel.row_shard import TableShard
from megamem.reference.embedding_bag import embedding_bag
from megamem.spec import Wire


def by_block(ids_TL: Tensor, num_rows: int) -> Tensor:
    """The ids of each token in the order of their blocks."""
    order_TL = (ids_TL // num_rows).argsort(stable=True)
    return ids_TL.gather(1, order_TL)


@dataclass(frozen=True)
class BlockReads:
    """How tokens read a table of `num_rows` rows."""

    num_rows: int
    width: int
    blocks: int
    wire: Wire
    pieces: int = 1
    weight_wire: torch.dtype | None = None

    def shard_of(self, group: MemoryGroup) -> TableShard:
        """This rank's shard of the table."""
        node_row, node_column, local_row, local_column = group.coordinates
        grid = group.grid
        return TableShard.cut(
            (self.num_rows, self.width),
            row=(node_row * grid.local_rows + local_row, group.row_ranks),
            column=(node_column * grid.local_columns + local_column, group.column_ranks),
        )

    def over_ranks(
        self,
        values_rv: Tensor,
        ids_TL: Tensor,
        weights: Tensor,
        x_TD: Tensor,
        group: MemoryGroup,
        counts: list[int],
    ) -> tuple[Tensor, int]:
        """[T, Y, V], every lookup weighted by the mean of its token as well, and bytes sent."""
        shard, sent_tokens = self.shard_of(group), SentBytes()
        routing = plan_routing(
            ids_TL, shard.rows, group, counts, self.wire, self.pieces, blocks=self.blocks
        )

        def piece(plan: RoutingPlan, weights: Tensor, x: Tensor) -> Generator[None, None, Tensor]:
            (rows_M, weights_M), x_ED = yield from together(
                send_lookups(plan, weights, self.weight_wire),
                send_tokens_to_owners(plan, group, x, sent_tokens),
            )
            offsets = plan.offsets()
            assert len(offsets) == len(x_ED) * self.blocks + 1 == plan.bags.total + 1
            x_M = x_ED.mean(1).repeat_interleave(offsets[:: self.blocks].diff())
            weights_M = weights_M * (x_M if weights.dim() == plan.ids.dim() else x_M.unsqueeze(1))
            bags_Gv = self._bags(values_rv, rows_M, weights_M, offsets, shard.columns.start)
            return (yield from send_home(plan, bags_Gv, group, shard.widths))

        parts = zip(routing.plans, routing.cut(weights), cut(x_TD, routing.tokens), strict=True)
        outputs = Pieces([piece(*part) for part in parts]).finish()
        out = torch.cat(outputs).view(len(ids_TL), self.blocks, self.width)
        return out, routing.sent.total + sent_tokens.total

    def _bags(
        self, values_rv: Tensor, rows_M: Tensor, weights_M: Tensor, offsets: Tensor, start: int
    ) -> Tensor:
        """One weight for the columns of each core."""
        if weights_M.dim() == 1:
            return embedding_bag(values_rv, rows_M, weights_M, offsets)
        cores = weights_M.shape[1]
        columns = torch.arange(start, start + values_rv.shape[1]) // (self.width // cores)
        parts = [
            embedding_bag(values_rv[:, columns == core], rows_M, weights_M[:, core], offsets)
            for core in columns.unique().tolist()
        ]
        return torch.cat(parts, 1)

    def by_formula(
        self, values_RV: Tensor, ids_TL: Tensor, weights: Tensor, x_TD: Tensor
    ) -> Tensor:
        """What over_ranks() returns, of the complete table, without bags."""
        weights_TLO = weights if weights.dim() == 3 else weights.unsqueeze(2)
        weights_TLV = weights_TLO.repeat_interleave(self.width // weights_TLO.shape[2], 2)
        read_TLV = values_RV[(ids_TL % self.num_rows).long()] * weights_TLV
        in_block_TLY = (ids_TL // self.num_rows).unsqueeze(2) == torch.arange(self.blocks)
        sums_TYV = torch.einsum("tlv,tly->tyv", read_TLV, in_block_TLY.to(read_TLV.dtype))
        return sums_TYV * x_TD.mean(1)[:, None, None]
