"""The optimizer of the value tables, which updates each shard in place from its RowGradient."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megamem.ops import (
    AdamOptions,
    adamw_,
    forms,
    rowwise_adamw_,
    sgd_,
    touched_adamw_,
    touched_sgd_,
)
from megamem.optimizer.sparse_rows import choose_rows, inverse_frequency
from megamem.optimizer.state import MASTER, Slot, allocate, slots, wide
from megamem.parallel.collectives import group_rank
from megamem.parallel.memory_group import MemoryGroup
from megamem.parallel.row_shard import TableShard
from megamem.read_counter import ReadCounter
from megamem.row_gradient import RowGradient
from megamem.spec import MemorySpec


class Table(Protocol):
    """The part of layers.ValueTable that the optimizer uses."""

    name: str
    weight: Any
    shard: TableShard
    group: MemoryGroup
    readers: int

    @property
    def frozen(self) -> bool: ...

    def accumulate_into(self, gradient: RowGradient, reads: ReadCounter) -> None: ...


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Options of the step that stay the same for the run."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and of the second moment."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    buffer_dtype: torch.dtype | None = None
    """Dtype of the gradient buffers; by default fp32, and always fp64 for tables in fp64."""

    seed: int = 0
    """Seed of stochastic rounding."""


DEFAULTS = StepOptions()


def _product(scale: float | Tensor, factor: float | Tensor, weight: Tensor) -> Tensor:
    """Return scale * factor, [1] on the device of a weight; nothing is copied from the host."""
    product, dtype = scale * factor, wide(weight.dtype)
    if isinstance(product, Tensor):
        return product.reshape(1).to(weight.device, dtype)
    return torch.full((1,), product, dtype=dtype, device=weight.device)


class TableOptimizer(torch.optim.Optimizer):
    """Updates this rank's shard of every table, once per batch.

    megamem.optimizer.state lists the state. It is sharded as the tables are, and never gathered.

    An update has these phases:

    1. Backward passes add the gradients of touched rows to the RowGradient of each table.
    2. `reduce()` starts to sum them over the replicas.
    3. `squared_norm()` returns this rank's part of the squared norm, for the caller to sum over all
       ranks. It takes each block of rows as its sum arrives; the step has to wait for the norm of
       all gradients, on which clipping and skipping depend.
    4. `step(scale)` updates the rows by scale * gradient, and sets the gradients to zero.

    Only phases 2 to 4 take time proportional to the size of the table, once per batch. A step also
    counts the batch and the rows that it read in the ReadCounter of each table.

    For sparse finetuning (`finetunes`, `--memory-finetune-rows`), `choose()` is called between 2
    and 3, or between 3 and 4. It sets the gradients of all rows that are not trained to zero, and
    the step leaves these rows and their state unchanged. The read counts are then the background:
    they do not change, and are saved as they were loaded.
    """

    def __init__(
        self,
        tables: Iterable[Table],
        spec: MemorySpec,
        options: StepOptions = DEFAULTS,
        **group: Any,
    ) -> None:
        """Allocate gradients, read counts and state, and pass the first two to the tables.

        Args:
            tables: the tables of this rank; a pipeline stage without memory layers has none.
            spec: the memory layers of the run; its optimizer settings are used.
            options: options of the step.
            group: entries of the parameter group beside the weights: lr, weight_decay, ...

        Raises:
            ValueError: a table is frozen, but there is a learning rate.
        """
        self.tables, self.options = {table.name: table for table in tables}, options
        frozen = [name for name, table in self.tables.items() if table.frozen]
        if frozen and group.get("lr"):
            raise ValueError(
                f"requires_grad is False for value table {', '.join(frozen)}, but lr {group['lr']} "
                "would train it; make the optimizer with lr=0, or call requires_grad_() before"
            )
        self.kind = spec.optimizer
        self.rounds_randomly = spec.stochastic_rounding
        self.only_touched = spec.reduce_rows == "touched"
        self.table_steps = 0
        self.limit = spec.finetune_rows
        self.inverse_frequencies: dict[str, Tensor] = {}
        self.chosen: dict[str, Tensor] = {}
        self.has_chosen = False
        self.gradients: dict[str, RowGradient] = {}
        self.reads: dict[str, ReadCounter] = {}
        weights = [table.weight for table in self.tables.values()]
        super().__init__([{"params": weights, **group}], defaults={"lr": 0.0, "weight_decay": 0.0})
        for name, table in self.tables.items():
            weight = table.weight
            dtype = options.buffer_dtype or torch.float32
            if weight.dtype == torch.float64:
                dtype = torch.float64
            # each piece of each layer is a pass of its own; one layer alone has nothing to wait for
            passes = table.readers * spec.pieces if table.readers > 1 else 1
            self.gradients[name] = RowGradient(weight, dtype, passes=passes)
            self.reads[name] = ReadCounter(weight, per_batch=self.finetunes)
            table.accumulate_into(self.gradients[name], self.reads[name])
            self.state[weight] = allocate(weight, self.slots_of(table))

    @property
    def finetunes(self) -> bool:
        """Whether only chosen rows are trained: sparse finetuning."""
        return self.limit > 0

    def slots_of(self, table: Table) -> dict[str, Slot]:
        """Return name -> slot of the state of a table."""
        return slots(self.kind, table.weight.dtype, self.rounds_randomly)

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients and the lookups of the batch to zero."""
        for name, gradient in self.gradients.items():
            gradient.zero()
            self.reads[name].forget_batch()
        self.has_chosen = False

    @torch.no_grad()
    def reduce(self) -> None:
        """Start to sum gradients and lookups of the batch over the replicas."""
        for name, table in self.tables.items():
            group = table.group
            self.gradients[name].reduce(
                group.replicas, group.replica_nodes, only_touched=self.only_touched
            )
            self.reads[name].reduce(group.replicas)

    @torch.no_grad()
    def choose(self) -> None:
        """In sparse finetuning, set the gradients of all rows that are not trained to zero.

        Adds the Choice.counts of each table to `chosen`. The sum of `chosen` over all ranks is that
        of the table, as replicas and column ranks are counted once.
        """
        if not self.finetunes:
            return
        self.has_chosen = True
        for name, table in self.tables.items():
            group, rows, reads = table.group, table.shard.rows, self.reads[name]
            if name not in self.inverse_frequencies:
                frequencies = inverse_frequency(reads.counts, int(reads.batches))
                self.inverse_frequencies[name] = frequencies
            choice = choose_rows(
                reads.lookups, self.inverse_frequencies[name], self.limit, rows, group.rows
            )
            self.gradients[name].keep(choice.rows)
            is_first = group.replica == 0 and group_rank(group.columns) == 0
            before = self.chosen.get(name, torch.zeros_like(choice.counts))
            self.chosen[name] = before + choice.counts * is_first

    @torch.no_grad()
    def squared_norm(self) -> dict[str, Tensor]:
        """Return, for each table, this rank's sum of squared gradients in fp64.

        It is zero on all but one of the replicas, and not finite where a gradient is not.
        """
        return {
            name: self.gradients[name].squared_norm(by_row=self.finetunes)
            * (table.group.replica == 0)
            for name, table in self.tables.items()
        }

    @torch.no_grad()
    def count_zeros(self) -> Tensor:
        """Return the number of zero gradients of this rank, 0 on all but one of the replicas."""
        counts = [
            (self.gradients[name].count_zeros() * (table.group.replica == 0)).float()
            for name, table in self.tables.items()
        ]
        return torch.stack(counts).sum() if counts else torch.zeros(())

    @torch.no_grad()
    def step(self, scale: float | Tensor = 1.0) -> None:  # type: ignore[override]
        """Update every table by `scale` times its gradient, and set the gradients to zero.

        Args:
            scale: a number, or a tensor on the device, for which the host does not wait.
        """
        assert self.has_chosen or not self.finetunes, "call choose() before step()"
        self.table_steps += 1
        (group,) = self.param_groups
        for name, table in self.tables.items():
            weight, state = table.weight, self.state[table.weight]
            gradient, reads = self.gradients[name], self.reads[name]
            master = state.get(MASTER)
            options = AdamOptions(
                step=self.table_steps,
                lr=float(group["lr"]),
                weight_decay=float(group["weight_decay"]),
                betas=self.options.betas,
                eps=self.options.eps,
                grad_scale=_product(scale, gradient.factor, weight),
                copy_rV=None if master is None else weight.data,
                seed=self.options.seed if self._rounds(weight) else None,
                row_offset=table.shard.offset[0],
                column_offset=table.shard.offset[1],
            )
            if not self.finetunes:
                reads.count_batch(gradient.touched)
            weights = weight.data if master is None else master
            self._update(table, gradient, weights, state, options)
            gradient.forget()
            reads.forget_batch()
        self.has_chosen = False

    def _update(
        self,
        table: Table,
        gradient: RowGradient,
        weights: Tensor,
        state: dict[str, Tensor],
        options: AdamOptions,
    ) -> None:
        buffer, listed = gradient.buffer, options
        clears = gradient.needs_clearing
        options = replace(options, touched_r=gradient.touched, clear_grads=clears)
        if self.kind == "lazy_adamw" or self.finetunes:
            if self.finetunes and self.kind != "sgd":
                # a row that was not chosen was frozen, and has no decay to catch up on
                state["last_steps"].masked_fill_(gradient.touched, self.table_steps - 1)
            if forms.pick("row_adam") == "flags":
                self._update_touched(weights, None, buffer, state, options)
            else:
                for rows in gradient.touched_blocks():
                    self._update_touched(weights, rows, gradient.take(rows), state, listed)
        elif self.kind == "sgd":
            sgd_(weights, buffer, options)
        elif self.kind == "rowwise_adamw":
            moments = state["exp_avg"], state["exp_avg_sq"]
            width, columns = table.shard.global_shape[1], table.group.columns
            options = replace(options, row_squares_r=gradient.mean_squares(width, columns))
            rowwise_adamw_(weights, buffer, *moments, options)
        else:
            moments = state["exp_avg"], state["exp_avg_sq"]
            adamw_(weights, buffer, *moments, options)

    def _update_touched(
        self,
        weights: Tensor,
        rows: Tensor | None,
        grads: Tensor,
        state: dict[str, Tensor],
        options: AdamOptions,
    ) -> None:
        """Update these rows, or those that the options mark."""
        if self.kind == "sgd":
            touched_sgd_(weights, rows, grads, options)
        else:
            moments = state["exp_avg"], state["exp_avg_sq"]
            counters = state["touches"], state["last_steps"]
            touched_adamw_(weights, rows, grads, *moments, *counters, options)

    def _rounds(self, weight: Tensor) -> bool:
        return self.rounds_randomly and weight.dtype == torch.bfloat16

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Copy the weights to the master copies, after the weights were loaded or changed."""
        for table in self.tables.values():
            if (master := self.state[table.weight].get(MASTER)) is not None:
                master.copy_(table.weight)
