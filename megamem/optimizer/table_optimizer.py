"""Updates value tables where they lie, from gradient buffers of their own."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megamem.ops import (
    AdamOptions,
    adamw_,
    rowwise_adamw_,
    sgd_,
    touched_adamw_,
    touched_sgd_,
)
from megamem.optimizer.sparse_rows import choose_rows, rarity
from megamem.optimizer.state import MASTER, Slot, allocate, slots, wide
from megamem.parallel.collectives import group_rank
from megamem.parallel.memory_group import MemoryGroup
from megamem.parallel.row_shard import TableShard
from megamem.read_counter import ReadCounter
from megamem.row_gradient import RowGradient
from megamem.spec import MemorySpec


class Table(Protocol):
    """What the optimizer needs of a layers.ValueTable."""

    name: str
    weight: Any
    shard: TableShard
    group: MemoryGroup

    def learn_with(self, gradient: RowGradient, reads: ReadCounter) -> None: ...


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What does not change during a run."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    buffer_dtype: torch.dtype | None = None
    """Of the gradient buffers; by default fp32."""

    seed: int = 0
    """Of stochastic rounding."""


DEFAULTS = StepOptions()


class TableOptimizer(torch.optim.Optimizer):
    """One step per batch for every table that this rank holds a piece of.

    State, per table of [r, v]: see state.py. All of it is cut as the table is; nothing is gathered.

    A step has these phases:

    1. backward passes add the gradients of touched rows to the table's RowGradient
    2. `reduce()` sums these over replicas
    3. `squared_norm()` of what this rank answers for, which the caller sums over all ranks
    4. `step(scale)` updates rows by scale * gradient, and leaves the gradients empty

    Only 2 to 4 do work proportional to R, once per batch. A step also counts the batch, and for
    each row that it was read, in the table's ReadCounter.

    Where `finetunes` is true (`--memory-finetune-rows`), `choose()` stands between 2 and 3, or
    between 3 and 4: it drops the gradients of all rows but those that are trained, and the step
    leaves all other rows and their state as they are. The counts are then the background: what they
    were at the start is what is used, and saved.
    """

    def __init__(
        self,
        tables: Iterable[Table],
        spec: MemorySpec,
        options: StepOptions = DEFAULTS,
        **group: Any,
    ) -> None:
        """Allocate gradients, counts and state, and hand the tables what is theirs to fill.

        Args:
            tables: of this rank; there may be none, as on a pipeline stage without memory layers.
            spec: which optimizer.
            options: of the run.
            group: what the parameter group holds beside the weights: lr, weight_decay, ...
        """
        self.tables, self.options = {table.name: table for table in tables}, options
        self.kind = spec.optimizer
        self.rounds_randomly = spec.stochastic_rounding
        self.table_steps = 0
        self.limit = spec.finetune_rows
        self.rarity: dict[str, Tensor] = {}
        self.chosen: dict[str, Tensor] = {}
        self.has_chosen = False
        self.gradients: dict[str, RowGradient] = {}
        self.reads: dict[str, ReadCounter] = {}
        weights = [table.weight for table in self.tables.values()]
        super().__init__([{"params": weights, **group}], defaults={"lr": 0.0, "weight_decay": 0.0})
        for name, table in self.tables.items():
            weight_rv = table.weight
            dtype = options.buffer_dtype or torch.float32
            if weight_rv.dtype == torch.float64:
                dtype = torch.float64
            self.gradients[name] = RowGradient(weight_rv, dtype)
            self.reads[name] = ReadCounter(weight_rv, per_batch=self.finetunes)
            table.learn_with(self.gradients[name], self.reads[name])
            self.state[weight_rv] = allocate(weight_rv, self.slots_of(table))

    @property
    def finetunes(self) -> bool:
        """Only chosen rows are trained."""
        return self.limit > 0

    def slots_of(self, table: Table) -> dict[str, Slot]:
        """Name -> slot of a table's state."""
        return slots(self.kind, table.weight.dtype, self.rounds_randomly)

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Empty the gradients."""
        for name, gradient in self.gradients.items():
            gradient.zero()
            self.reads[name].forget_batch()
        self.has_chosen = False

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients and the lookups of replicas, which saw other tokens."""
        for name, table in self.tables.items():
            self.gradients[name].reduce(table.group.replicas)
            self.reads[name].reduce(table.group.replicas)

    @torch.no_grad()
    def choose(self) -> None:
        """Where `finetunes`: drop the gradients of all rows but those that are trained.

        `chosen` then adds up, for each table, how many those were, their lookups and all lookups,
        of which the ranks of a memory group hold parts; replicas and columns count once.
        """
        if not self.finetunes:
            return
        self.has_chosen = True
        for name, table in self.tables.items():
            group, rows, reads = table.group, table.shard.rows, self.reads[name]
            if name not in self.rarity:
                self.rarity[name] = rarity(reads.counts, int(reads.batches))
            choice = choose_rows(reads.lookups_r, self.rarity[name], self.limit, rows, group.rows)
            self.gradients[name].keep(choice.rows_E)
            first = group.replica == 0 and group_rank(group.columns) == 0
            before_3 = self.chosen.get(name, torch.zeros_like(choice.counts_3))
            self.chosen[name] = before_3 + choice.counts_3 * first

    @torch.no_grad()
    def squared_norm(self) -> dict[str, Tensor]:
        """Table -> sum of its squared gradients, in fp64, with replicas counted once.

        Not finite where a gradient is not.
        """
        return {
            name: self.gradients[name].squared_norm(by_row=self.finetunes)
            * (table.group.replica == 0)
            for name, table in self.tables.items()
        }

    @torch.no_grad()
    def count_zeros(self) -> Tensor:
        """Elements whose gradient is zero, with replicas counted once."""
        counts = [
            (self.gradients[name].count_zeros() * (table.group.replica == 0)).float()
            for name, table in self.tables.items()
        ]
        return torch.stack(counts).sum() if counts else torch.zeros(())

    @torch.no_grad()
    def step(self, scale: float | Tensor = 1.0) -> None:  # type: ignore[override]
        """One step of every table, by `scale` times its gradient, which is empty after it.

        Args:
            scale: a number, or one on the device, which is not waited for.
        """
        assert self.has_chosen or not self.finetunes, "choose() first"
        self.table_steps += 1
        (group,) = self.param_groups
        for name, table in self.tables.items():
            weight_rv, state = table.weight, self.state[table.weight]
            gradient, reads = self.gradients[name], self.reads[name]
            factor = torch.as_tensor(scale, device=weight_rv.device) * gradient.factor
            master_rv = state.get(MASTER)
            options = AdamOptions(
                step=self.table_steps,
                lr=float(group["lr"]),
                weight_decay=float(group["weight_decay"]),
                betas=self.options.betas,
                eps=self.options.eps,
                grad_scale=factor.reshape(1).to(wide(weight_rv.dtype)),
                copy_rV=None if master_rv is None else weight_rv.data,
                seed=self.options.seed if self._rounds(weight_rv) else None,
                row_offset=table.shard.offset[0],
                column_offset=table.shard.offset[1],
            )
            if not self.finetunes:
                reads.count_batch(gradient.touched_r)
            weights_rv = weight_rv.data if master_rv is None else master_rv
            self._update(table, gradient, weights_rv, state, options)
            gradient.forget()
            reads.forget_batch()
        self.has_chosen = False

    def _update(
        self,
        table: Table,
        gradient: RowGradient,
        weights_rv: Tensor,
        state: dict[str, Tensor],
        options: AdamOptions,
    ) -> None:
        if self.kind == "lazy_adamw" or self.finetunes:
            for rows_E in gradient.touched_blocks():
                grads_EV = gradient.take(rows_E)
                if self.kind == "sgd":
                    touched_sgd_(weights_rv, rows_E, grads_EV, options)
                else:
                    if self.finetunes:
                        # a row that was not chosen lately was frozen: it has no decay to catch up
                        state["last_steps"][rows_E] = self.table_steps - 1
                    touched_adamw_(
                        weights_rv,
                        rows_E,
                        grads_EV,
                        state["exp_avg"],
                        state["exp_avg_sq"],
                        state["touches"],
                        state["last_steps"],
                        options,
                    )
            return
        buffer_rv = gradient.buffer
        options = replace(options, touched_r=gradient.touched_r, clear_grads=True)
        if self.kind == "sgd":
            sgd_(weights_rv, buffer_rv, options)
        elif self.kind == "rowwise_adamw":
            moments = state["exp_avg"], state["exp_avg_sq"]
            width, columns = table.shard.global_shape[1], table.group.columns
            options = replace(options, row_squares_r=gradient.mean_squares(width, columns))
            rowwise_adamw_(weights_rv, buffer_rv, *moments, options)
        else:
            moments = state["exp_avg"], state["exp_avg_sq"]
            adamw_(weights_rv, buffer_rv, *moments, options)

    def _rounds(self, weight_rv: Tensor) -> bool:
        return self.rounds_randomly and weight_rv.dtype == torch.bfloat16

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Take the weights as they are now for the master copies."""
        for table in self.tables.values():
            if (master_rv := self.state[table.weight].get(MASTER)) is not None:
                master_rv.copy_(table.weight)
