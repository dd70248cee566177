"""What an optimizer keeps and moves for each parameter of the value table.

The optimizer says which tensors these are; its tests compare what it allocates with this.
"""

from dataclasses import dataclass
from typing import get_args

import torch

from megamem.optimizer.state import MASTER, slots, wide
from megamem.read_counter import COUNT_DTYPE
from megamem.spec import Optimizer

OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)


@dataclass(frozen=True)
class TableState:
    """Bytes that training keeps for the table."""

    weights: int
    """Per parameter: what a lookup reads."""
    master: int
    """Per parameter: the fp32 copy that is stepped, where there is one."""
    gradient: int
    """Per parameter: fp32, summed over microbatches."""
    moments: int
    """Per parameter: fp32 exp_avg and exp_avg_sq."""
    per_row: int
    """Per row: what a whole row shares, and the count of batches that read it."""
    touched_only: bool
    """Only touched rows are stepped."""

    @property
    def optimizer(self) -> int:
        """Bytes per parameter beside weights and gradient."""
        return self.master + self.moments

    @property
    def total(self) -> int:
        """Bytes per parameter of a row that was touched."""
        return self.weights + self.gradient + self.optimizer

    @property
    def moved_by_step(self) -> int:
        """Bytes per stepped parameter that a fused step reads and writes.

        The gradient is read, moments and master are read and written; of weights with a master
        only the rounded copy is written.
        """
        weights = self.weights if self.master else 2 * self.weights
        return self.gradient + 2 * self.optimizer + weights


def table_state(
    optimizer: Optimizer, *, half_precision: bool = True, stochastic_rounding: bool = False
) -> TableState:
    """What `--memory-optimizer` keeps.

    Args:
        optimizer: its name.
        half_precision: the model is bf16 or fp16.
        stochastic_rounding: weights of half precision are rounded at random and have no master.
    """
    weights = torch.bfloat16 if half_precision else torch.float32
    kept = slots(optimizer, weights, stochastic_rounding)
    master = kept.pop(MASTER, None)
    per_row = [slot.dtype.itemsize for slot in kept.values() if slot.per_row]
    return TableState(
        weights=weights.itemsize,
        master=master.dtype.itemsize if master else 0,
        gradient=wide(weights).itemsize,
        moments=sum(slot.dtype.itemsize for slot in kept.values() if not slot.per_row),
        per_row=COUNT_DTYPE.itemsize + sum(per_row),
        touched_only=optimizer == "lazy_adamw",
    )
