"""Updates value tables where they lie, from gradient buffers of their own."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megamem.config import MemoryConfig
from megamem.ops import adamw_, rowwise_adamw_, sgd_, touched_adamw_, touched_sgd_
from megamem.optimizer.sparse_rows import choose_rows, rarity
from megamem.optimizer.state import MASTER, Slot, allocate, slots, wide
from megamem.parallel.collectives import group_rank
from megamem.parallel.memory_group import MemoryGroup
from megamem.parallel.row_shard import TableShard

# numbers: 256 MB in fp64
BLOCK = 2**25


class Table(Protocol):
    """What the optimizer needs of a layers.ValueTable."""

    weight: Any
    shard: TableShard
    group: MemoryGroup
    grad_buffer: Tensor | None
    grad_factor: float | Tensor
    touched_r: Tensor | None
    lookups_r: Tensor | None
    hits: Tensor | None
    batches: Tensor | None

    def count_reads(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What does not change during a run."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    buffer_dtype: torch.dtype | None = None
    """Of the gradient buffers; by default fp32."""

    seed: int = 0
    """Of stochastic rounding."""


class TableOptimizer(torch.optim.Optimizer):
    """One step per batch for every table that this rank holds a piece of.

    State, per table of [r, v]: see state.py. All of it is cut as the table is; nothing is gathered.

    A step has these phases:

    1. backward passes add the gradients of touched rows to `grad_buffer`
    2. `reduce()` sums the buffers of replicas
    3. `squared_norm()` of what this rank answers for, which the caller sums over all ranks
    4. `step(scale)` updates rows by scale * buffer, and leaves the buffers empty

    Only 2 to 4 do work proportional to R, once per batch. A step also counts the batch in `batches`
    of its tables, and in `hits` of the rows that it read.

    Where `finetunes` is true (`--memory-finetune-rows`), `choose()` stands between 2 and 3, or
    between 3 and 4: it empties the buffers but for the rows that are trained, and the step leaves
    all other rows and their state as they are. `hits` and `batches` are then the background: what
    they were at the start is what is used, and saved.
    """

    def __init__(
        self, tables: Mapping[str, Table], config: MemoryConfig, options: StepOptions, **group: Any
    ) -> None:
        """Allocate buffers and state.

        Args:
            tables: by name; there may be none, as on a pipeline stage without memory layers.
            config: which optimizer.
            options: of the run.
            group: what the parameter group holds beside the weights: lr, weight_decay, ...
        """
        self.tables, self.options = tables, options
        self.kind = config.memory_optimizer
        self.rounds_randomly = config.memory_stochastic_rounding
        self.table_steps = 0
        self.limit = config.memory_finetune_rows
        self.rarity: dict[str, Tensor] = {}
        self.chosen: dict[str, Tensor] = {}
        self.has_chosen = False
        weights = [table.weight for table in tables.values()]
        super().__init__([{"params": weights, **group}], defaults={"lr": 0.0, "weight_decay": 0.0})
        for table in tables.values():
            weight_rv = table.weight
            dtype = options.buffer_dtype or torch.float32
            if weight_rv.dtype == torch.float64:
                dtype = torch.float64
            table.grad_buffer = torch.zeros_like(weight_rv, dtype=dtype)
            # the last place is for row -1, which stands for none
            table.touched_r = torch.zeros(
                len(weight_rv) + 1, dtype=torch.bool, device=weight_rv.device
            )
            if self.finetunes:
                table.lookups_r = torch.zeros_like(table.touched_r, dtype=torch.int64)
            table.count_reads()
            self.state[weight_rv] = allocate(weight_rv, self.slots_of(table))

    @property
    def finetunes(self) -> bool:
        """Only chosen rows are trained."""
        return self.limit is not None

    def slots_of(self, table: Table) -> dict[str, Slot]:
        """Name -> slot of a table's state."""
        return slots(self.kind, table.weight.dtype, self.rounds_randomly)

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Empty the buffers: touched rows only, as the others are empty."""
        for table in self.tables.values():
            buffer_rv, touched_r = _gradient(table)
            rows_E = touched_r[:-1].nonzero().squeeze(1)
            buffer_rv[rows_E] = 0
            table.grad_factor = 1.0
            self._forget_reads(table)

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients and the lookups of replicas, which saw other tokens."""
        for table in self.tables.values():
            if table.group.replicas is not None:
                buffer_rv, touched_r = _gradient(table)
                dist.all_reduce(buffer_rv, group=table.group.replicas)
                seen = touched_r.to(torch.uint8)
                dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=table.group.replicas)
                touched_r.copy_(seen)
                if table.lookups_r is not None:
                    dist.all_reduce(table.lookups_r, group=table.group.replicas)

    @torch.no_grad()
    def choose(self) -> None:
        """Where `finetunes`: drop the gradients of all rows but those that are trained.

        `chosen` then adds up, for each table, how many those were, their lookups and all lookups,
        of which the ranks of a memory group hold parts; replicas and columns count once.
        """
        if self.limit is None:
            return
        self.has_chosen = True
        for name, table in self.tables.items():
            group, (buffer_rv, touched_r) = table.group, _gradient(table)
            assert table.lookups_r is not None
            if name not in self.rarity:
                assert table.hits is not None and table.batches is not None
                self.rarity[name] = rarity(table.hits, int(table.batches))
            lookups_r, rows = table.lookups_r[:-1], table.shard.rows
            choice = choose_rows(lookups_r, self.rarity[name], self.limit, rows, group.rows)
            dropped_r = touched_r.clone()
            dropped_r[choice.rows_E] = False
            buffer_rv[dropped_r[:-1].nonzero().squeeze(1)] = 0
            touched_r ^= dropped_r
            first = group.replica == 0 and group_rank(group.columns) == 0
            before_3 = self.chosen.get(name, torch.zeros_like(choice.counts_3))
            self.chosen[name] = before_3 + choice.counts_3 * first

    @torch.no_grad()
    def squared_norm(self) -> dict[str, Tensor]:
        """Table -> sum of its squared gradients, in fp64, with replicas counted once.

        Not finite where a gradient is not.
        """
        return {
            name: self._squares(table)
            * torch.as_tensor(table.grad_factor, device=table.weight.device).double().square()
            * (table.group.replica == 0)
            for name, table in self.tables.items()
        }

    @torch.no_grad()
    def count_zeros(self) -> Tensor:
        """Elements whose gradient is zero, with replicas counted once."""
        counts = [
            ((_gradient(table)[0] == 0).sum() * (table.group.replica == 0)).float()
            for table in self.tables.values()
        ]
        return torch.stack(counts).sum() if counts else torch.zeros(())

    @torch.no_grad()
    def step(self, scale: float | Tensor = 1.0) -> None:  # type: ignore[override]
        """One step of every table, by `scale` times its gradient; the buffers are empty after it.

        Args:
            scale: a number, or one on the device, which is not waited for.
        """
        assert self.has_chosen or not self.finetunes, "choose() first"
        self.table_steps += 1
        (group,) = self.param_groups
        for table in self.tables.values():
            weight_rv, state = table.weight, self.state[table.weight]
            factor = torch.as_tensor(scale, device=weight_rv.device) * table.grad_factor
            master_rv = state.get(MASTER)
            options: dict[str, Any] = {
                "step": self.table_steps,
                "lr": float(group["lr"]),
                "weight_decay": float(group["weight_decay"]),
                "grad_scale": factor.reshape(1).to(wide(weight_rv.dtype)),
                "copy_rV": None if master_rv is None else weight_rv.data,
                "seed": self.options.seed if self._rounds(weight_rv) else None,
                "row_offset": table.shard.offset[0],
                "column_offset": table.shard.offset[1],
            }
            if not self.finetunes:
                _count_batch(table)
            self._update(table, weight_rv.data if master_rv is None else master_rv, state, options)
            self._forget_reads(table)

    def _update(
        self, table: Table, weights_rv: Tensor, state: dict[str, Tensor], options: dict[str, Any]
    ) -> None:
        buffer_rv, touched_r = _gradient(table)
        touched = touched_r[:-1]
        moments: Any
        if self.kind != "sgd":
            options |= {"betas": self.options.betas, "eps": self.options.eps}
        if self.kind == "lazy_adamw" or self.finetunes:
            # in blocks, so that the gradients of all touched rows are never copied at once
            for rows_E in _touched_blocks(table):
                if self.kind == "sgd":
                    touched_sgd_(weights_rv, rows_E, buffer_rv[rows_E], **options)
                else:
                    if self.finetunes:
                        # a row that was not chosen lately was frozen: it has no decay to catch up
                        state["last_steps"][rows_E] = self.table_steps - 1
                    touched_adamw_(
                        weights_rv,
                        rows_E,
                        buffer_rv[rows_E],
                        state["exp_avg"],
                        state["exp_avg_sq"],
                        state["touches"],
                        state["last_steps"],
                        **options,
                    )
                buffer_rv[rows_E] = 0
            return
        options |= {"touched_r": touched, "clear_grads": True}
        if self.kind == "sgd":
            sgd_(weights_rv, buffer_rv, **options)
        elif self.kind == "rowwise_adamw":
            moments = state["exp_avg"], state["exp_avg_sq"]
            options["row_squares_r"] = _row_squares(table)
            rowwise_adamw_(weights_rv, buffer_rv, *moments, **options)
        else:
            moments = state["exp_avg"], state["exp_avg_sq"]
            adamw_(weights_rv, buffer_rv, *moments, **options)

    def _squares(self, table: Table) -> Tensor:
        """Sum of squares in fp64: in blocks, as torch makes an fp64 copy of what it is given."""
        buffer_rv, _ = _gradient(table)
        parts: Iterable[Tensor] = buffer_rv.split(_block_rows(buffer_rv))
        if self.finetunes:
            parts = (buffer_rv[rows_E] for rows_E in _touched_blocks(table))
        total = torch.zeros((), dtype=torch.float64, device=buffer_rv.device)
        for part in parts:
            total += torch.linalg.vector_norm(part, dtype=torch.float64).square()
        return total

    def _forget_reads(self, table: Table) -> None:
        """The batch is over, for this table."""
        _gradient(table)[1].zero_()
        if table.lookups_r is not None:
            table.lookups_r.zero_()
        self.has_chosen = False

    def _rounds(self, weight_rv: Tensor) -> bool:
        return self.rounds_randomly and weight_rv.dtype == torch.bfloat16

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Take the weights as they are now for the master copies."""
        for table in self.tables.values():
            if (master_rv := self.state[table.weight].get(MASTER)) is not None:
                master_rv.copy_(table.weight)


def _count_batch(table: Table) -> None:
    """One more batch, and one more hit for each of its rows."""
    assert table.hits is not None and table.batches is not None
    table.hits += _gradient(table)[1][:-1]
    table.batches += 1


def _touched_blocks(table: Table) -> Sequence[Tensor]:
    """The rows that have a gradient, some at a time."""
    buffer_rv, touched_r = _gradient(table)
    return touched_r[:-1].nonzero().squeeze(1).split(_block_rows(buffer_rv))


def _block_rows(buffer_rv: Tensor) -> int:
    """Rows of which a copy is small beside the table, and large enough to fill a GPU."""
    rows, width = buffer_rv.shape
    return max(1, min(-(-rows // 64), BLOCK // width))


def _row_squares(table: Table) -> Tensor | None:
    """[r] mean squares of the gradients of whole rows, where this rank has only some columns."""
    if table.group.columns is None:
        return None
    buffer_rv, _ = _gradient(table)
    # one row at a time in the reduction, so that no copy of the buffer is made
    norms_r = torch.linalg.vector_norm(buffer_rv, dim=1, dtype=wide(buffer_rv.dtype))
    squares_r = norms_r.square_()
    dist.all_reduce(squares_r, group=table.group.columns)
    return squares_r / table.shard.global_shape[1]


def _gradient(table: Table) -> tuple[Tensor, Tensor]:
    assert table.grad_buffer is not None and table.touched_r is not None
    return table.grad_buffer, table.touched_r
