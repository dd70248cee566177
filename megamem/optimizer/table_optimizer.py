"""Updates value tables where they lie, from gradient buffers of their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megamem.config import MemoryConfig
from megamem.ops import adamw_, rowwise_adamw_, sgd_, touched_adamw_
from megamem.optimizer.state import MASTER, Slot, allocate, slots, wide
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

    Only 2 to 4 do work proportional to R, once per batch.
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
            self.state[weight_rv] = allocate(weight_rv, self.slots_of(table))

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
            touched_r.zero_()
            table.grad_factor = 1.0

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients of replicas, which saw other tokens."""
        for table in self.tables.values():
            if table.group.replicas is not None:
                buffer_rv, touched_r = _gradient(table)
                dist.all_reduce(buffer_rv, group=table.group.replicas)
                seen = touched_r.to(torch.uint8)
                dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=table.group.replicas)
                touched_r.copy_(seen)

    @torch.no_grad()
    def squared_norm(self) -> dict[str, Tensor]:
        """Table -> sum of its squared gradients, in fp64, with replicas counted once.

        Not finite where a gradient is not.
        """
        return {
            name: _squares(_gradient(table)[0])
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
            self._update(table, weight_rv.data if master_rv is None else master_rv, state, options)

    def _update(
        self, table: Table, weights_rv: Tensor, state: dict[str, Tensor], options: dict[str, Any]
    ) -> None:
        buffer_rv, touched_r = _gradient(table)
        touched = touched_r[:-1]
        moments: Any
        if self.kind != "sgd":
            options |= {"betas": self.options.betas, "eps": self.options.eps}
        if self.kind == "lazy_adamw":
            # in blocks, so that the gradients of all touched rows are never copied at once
            for rows_E in touched.nonzero().squeeze(1).split(_block_rows(buffer_rv)):
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
            touched_r.zero_()
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
        touched_r.zero_()

    def _rounds(self, weight_rv: Tensor) -> bool:
        return self.rounds_randomly and weight_rv.dtype == torch.bfloat16

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Take the weights as they are now for the master copies."""
        for table in self.tables.values():
            if (master_rv := self.state[table.weight].get(MASTER)) is not None:
                master_rv.copy_(table.weight)


def _squares(buffer_rv: Tensor) -> Tensor:
    """Sum of squares in fp64: in blocks, as torch makes an fp64 copy of what it is given."""
    total = torch.zeros((), dtype=torch.float64, device=buffer_rv.device)
    for part in buffer_rv.split(_block_rows(buffer_rv)):
        total += torch.linalg.vector_norm(part, dtype=torch.float64).square()
    return total


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
