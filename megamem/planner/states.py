"""Bytes that an optimizer stores and moves for each parameter of the value table.

megamem.optimizer.state names the tensors; the optimizer's tests compare what it allocates with
these numbers.
"""

from dataclasses import dataclass
from typing import get_args

import torch

from megamem.optimizer.state import MASTER, slots
from megamem.read_counter import COUNT_DTYPE
from megamem.spec import Optimizer

FP32_BYTES = 4
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)


@dataclass(frozen=True)
class TableState:
    """Bytes that training stores for the table."""

    weights: int
    """Bytes per parameter of the weights that lookups read."""
    master: int
    """Bytes per parameter of the fp32 copy that is updated; 0 where there is none."""
    gradient: int
    """Bytes per parameter of the gradient, summed over microbatches."""
    moments: int
    """Bytes per parameter of fp32 exp_avg and exp_avg_sq."""
    per_row: int
    """Bytes per row: optimizer state that a row shares, and the count of batches that read it."""
    touched_only: bool
    """Only touched rows are updated."""

    @property
    def optimizer(self) -> int:
        """Bytes per parameter of the optimizer state."""
        return self.master + self.moments

    @property
    def total(self) -> int:
        """Bytes per parameter of weights, gradient and optimizer state."""
        return self.weights + self.gradient + self.optimizer

    @property
    def moved_by_step(self) -> int:
        """Bytes that a fused update reads and writes per updated parameter.

        The gradient is read; moments and master are read and written. Weights are read and written
        where there is no master; otherwise only their rounded copy is written.
        """
        weights = self.weights if self.master else 2 * self.weights
        return self.gradient + 2 * self.optimizer + weights


def table_state(
    optimizer: Optimizer,
    *,
    half_precision: bool = True,
    stochastic_rounding: bool = False,
    gradient_bytes: int = FP32_BYTES,
) -> TableState:
    """Bytes that `--memory-optimizer` stores.

    Args:
        optimizer: the value of the flag.
        half_precision: the model is bf16 or fp16.
        stochastic_rounding: half-precision weights are rounded stochastically and have no master.
        gradient_bytes: bytes per parameter of the gradient.
    """
    weights = torch.bfloat16 if half_precision else torch.float32
    kept = slots(optimizer, weights, stochastic_rounding)
    master = kept.pop(MASTER, None)
    per_row = [slot.dtype.itemsize for slot in kept.values() if slot.per_row]
    return TableState(
        weights=weights.itemsize,
        master=master.dtype.itemsize if master else 0,
        gradient=gradient_bytes,
        moments=sum(slot.dtype.itemsize for slot in kept.values() if not slot.per_row),
        per_row=COUNT_DTYPE.itemsize + sum(per_row),
        touched_only=optimizer == "lazy_adamw",
    )
