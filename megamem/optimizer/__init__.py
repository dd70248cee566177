"""The optimizer of the value tables: its state, its step, and sparse finetuning."""

from megamem.optimizer.table_optimizer import StepOptions, TableOptimizer

__all__ = ["StepOptions", "TableOptimizer"]
