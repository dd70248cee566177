"""The tables that memory layers read, and the exchange of lookups between ranks.

launch     row_ids_TL, weights_TL   are sent to the ranks that hold the rows
collect    bags_Gv                  are summed there (megamem.layers.variants)
           out_TV                   is sent back to the rank of each token and summed

With --memory-pieces, the tokens pass in pieces, whose exchanges overlap.

Letters: T tokens on this rank, t of one piece, L lookups per token, O cores, D hidden size, M
lookups received here, G bags (the tokens of all ranks), Y bags of a token, V row width, v on this
rank.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megamem.layers.init import WeightFactory
from megamem.layers.value_table import ReceivedLookups, ValueTable
from megamem.layers.variants import variant_of
from megamem.metrics import untimed
from megamem.ops import Known, place_rows
from megamem.parallel.homeward import send_home
from megamem.parallel.memory_group import MemoryGroup
from megamem.parallel.pieces import Pieces, together
from megamem.parallel.routing import (
    RoutingPlan,
    SentBytes,
    cut,
    plan_routing,
    send_lookups,
    send_tokens,
)
from megamem.parallel.row_shard import id_dtype
from megamem.spec import MemorySpec


@dataclass(frozen=True)
class Lookups:
    """Lookups that launch() has sent and collect() has yet to wait for."""

    pieces: Pieces[Tensor]
    """The pieces of the tokens, each of which returns its part of out_TV."""
    sent: SentBytes
    """Bytes of lookups and sums."""
    sent_tokens: SentBytes
    """Bytes of tokens."""
    clock: "_Clock"


class _Clock:
    """Times the parts of a pass from collect() on."""

    end_of: Callable[[str], None] = staticmethod(untimed)


class _RoundWeights(torch.autograd.Function):
    """Forward: round to bf16. Backward: the gradient of what was rounded is that of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _sort_by_block(rows_TL: Tensor, weights: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Sort the lookups of each token by their virtual block; those of a block keep their order."""
    order_TL = (rows_TL // num_rows).argsort(dim=1, stable=True)
    by_lookup = order_TL if weights.dim() == 2 else order_TL.unsqueeze(-1).expand_as(weights)
    return rows_TL.gather(1, order_TL), weights.gather(1, by_lookup)


def permutation_of(
    spec: MemorySpec, seed: int, device: torch.device | str | int | None = None
) -> Tensor:
    """Return the row that each pair of sub-keys reads, as block * R + row, by a placement seed."""
    num_ids = spec.keys_per_side**2
    if torch.device("cpu" if device is None else device).type == "meta":
        return torch.empty(num_ids, dtype=id_dtype(num_ids), device=device)
    pairs = torch.arange(num_ids, device=device)
    return place_rows(pairs, spec.keys_per_side, seed, id_dtype(num_ids))


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
        assert self.group.grid == spec.layout.grid, (self.group.grid, spec.layout)
        self.tables = nn.ModuleDict()
        for use in self.variant.tables:
            table = self.variant.table_name(name, use)
            make = WeightFactory(seed=spec.seed, name=table, device=device, dtype=dtype)
            width, std = self.variant.table_width(spec, use), self.variant.init_std(spec, use)
            self.tables[use.name] = ValueTable(spec, table, width, std, make, self.group)

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
        self,
        row_ids_TL: Tensor,
        weights_TL: Tensor,
        token_counts: list[int],
        x_TD: Tensor,
        placement: int | Tensor | None = None,
    ) -> Lookups:
        """Start sending lookups to the ranks that hold their rows, and return without waiting.

        Args:
            row_ids_TL: pairs of sub-keys, i * N + j.
            weights_TL: weight of each lookup; weights_TLO where each core has one.
            token_counts: T of every member of the group.
            x_TD: what the owners of rows get of the tokens, if the variant reads them.
            placement: says which row a pair reads: a seed, by default that of the pool, or the
                permutation itself.
        """
        spec, clock = self.spec, _Clock()
        num_ids = spec.keys_per_side**2
        if isinstance(placement, Tensor):
            rows_TL = placement[row_ids_TL]
        else:
            seed = spec.placement_seed if placement is None else placement
            rows_TL = place_rows(row_ids_TL, spec.keys_per_side, seed, id_dtype(num_ids))
        blocks = spec.bags_per_token
        if blocks > 1:
            rows_TL, weights_TL = _sort_by_block(rows_TL, weights_TL, spec.num_rows)
        elif num_ids > spec.num_rows:
            # the virtual blocks of a row are one
            rows_TL = (rows_TL % spec.num_rows).to(id_dtype(spec.num_rows))
        wire = None
        if spec.lookup_weights == "bf16":
            # rounded before use, so that the result does not depend on where a row is
            weights_TL, wire = _RoundWeights.apply(weights_TL), torch.bfloat16
        routing = plan_routing(
            rows_TL,
            self.values.shard.rows,
            self.group,
            token_counts,
            spec.wire,
            spec.pieces,
            blocks,
        )
        weights, tokens = routing.cut(weights_TL), cut(x_TD, routing.tokens)
        sent_tokens = SentBytes()
        readers = [
            self._read_piece(*parts, wire, clock, sent_tokens)
            for parts in zip(routing.plans, weights, tokens, strict=True)
        ]
        return Lookups(Pieces(readers), routing.sent, sent_tokens, clock)

    def _read_piece(
        self,
        plan: RoutingPlan,
        weights: Tensor,
        x_tD: Tensor,
        wire: torch.dtype | None,
        clock: _Clock,
        sent_tokens: SentBytes,
    ) -> Generator[None, None, Tensor]:
        """Return the read-out of the tokens of one piece, [t, Y * V]; yield while something is
        sent."""
        exchange = send_lookups(plan, weights, wire)
        if self.variant.reads_tokens:
            (rows_M, weights_M), x_GD = yield from together(
                exchange, send_tokens(plan, self.group, x_tD, sent_tokens)
            )
        else:
            (rows_M, weights_M), x_GD = (yield from exchange), None
        if not plan.hops:
            yield  # nothing is sent, but the rows are read by collect()
        clock.end_of("exchange")
        known = Known(not plan.all_present, plan.equal_bags, plan.expected(len(rows_M)))
        blocks = self.spec.bags_per_token
        received = ReceivedLookups(rows_M, weights_M, plan.offsets(), x_GD, known, blocks)
        bags_Gv = self.variant.read_out(self._by_name(), received)
        clock.end_of("lookup")
        out_tV = yield from send_home(plan, bags_Gv, self.group, self.values.shard.widths)
        clock.end_of("exchange")
        return out_tV.view(len(x_tD), blocks * out_tV.shape[1]) if blocks > 1 else out_tV

    def collect(self, lookups: Lookups) -> Tensor:
        """Wait for the lookups, read this rank's rows and exchange the partial sums.

        Returns:
            out_TV: the read-out of this rank's tokens; the bags of a token are side by side, so
                that it has Y * V columns.
        """
        metrics = self.values.metrics if torch.is_grad_enabled() else None
        if metrics:
            lookups.clock.end_of = metrics.start()
        parts = lookups.pieces.finish()
        if metrics:
            metrics.bytes_sent += lookups.sent.total
            for table, use in zip(self, self.variant.tables, strict=True):
                if use.read == "dot" and table.metrics:
                    table.metrics.bytes_sent += lookups.sent_tokens.total
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read(
        self, row_ids_TL: Tensor, weights_TL: Tensor, token_counts: list[int], x_TD: Tensor
    ) -> Tensor:
        """Do launch() and collect() in one call, and return out_TV."""
        return self.collect(self.launch(row_ids_TL, weights_TL, token_counts, x_TD))

    def _by_name(self) -> dict[str, ValueTable]:
        return dict(zip(self.tables, self, strict=True))
