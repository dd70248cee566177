"""What an optimizer keeps and moves for each parameter of the value table.

One place for these figures: the optimizer's own tests compare themselves with it.
"""

from dataclasses import dataclass

from megamem.spec import Optimizer

OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "lazy_adamw", "rowwise_adamw", "sgd")

HITS = 4
"""Bytes per row, whatever the optimizer: the batches of training that read it."""


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
    return TableState(
        weights=2 if half_precision else 4,
        master=4 if half_precision and not stochastic_rounding else 0,
        gradient=4,
        moments={"adamw": 8, "lazy_adamw": 8, "rowwise_adamw": 4, "sgd": 0}[optimizer],
        # the second moment of rowwise_adamw; how often and when last a row was touched
        per_row=HITS + {"adamw": 0, "lazy_adamw": 8, "rowwise_adamw": 4, "sgd": 0}[optimizer],
        touched_only=optimizer == "lazy_adamw",
    )
