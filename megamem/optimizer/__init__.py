"""The value table's own optimizer: what it keeps per row, and how it steps."""

from megamem.optimizer.table_optimizer import StepOptions, TableOptimizer

__all__ = ["StepOptions", "TableOptimizer"]
