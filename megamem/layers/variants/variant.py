"""The interface of a variant of memory layers.

All variants share the data path of MemoryLayer.forward: query, product keys, lookups sent to the
owners of rows, read-out there, output. A variant defines two of these steps and what they need:

    tables       the tables of a pool, all indexed by the same row ids
    read_out     on the owner of the rows: rows -> a sum for every bag
    output       on the rank of the token: read-out -> the output of the layer

The planner, checkpoints, converters and reports use the same object, so a new variant changes none
of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from megamem.layers.init import WeightFactory
from megamem.layers.output import Output
from megamem.layers.value_table import ReceivedLookups, ValueTable
from megamem.spec import MemorySpec

VALUES = "v"
"""The table that every variant has; in checkpoints it has the name of its pool."""


@dataclass(frozen=True)
class TableUse:
    """One table of a pool."""

    name: str = VALUES
    """Name within the pool."""

    read: Literal["bag", "dot"] = "bag"
    """bag: the weighted sum of the rows of each bag. dot: the dot product of each row with the
    token of its bag, which the owner of the row therefore needs."""


class Variant(ABC):
    """One variant of memory layers."""

    tables: ClassVar[tuple[TableUse, ...]] = (TableUse(),)
    """The tables of a pool; the values come first."""

    cuts_rows: ClassVar[bool] = True
    """Whether a rank can work with some of the columns of a row, so that `--memory-mode column` and
    `2d` are possible."""

    projects: ClassVar[bool] = False
    """Whether the output projects read-outs of width V to the hidden size, so that the two may
    differ."""

    silent_output: ClassVar[tuple[str, ...]] = ()
    """Weights of the output that make the output of a new layer zero when they are zero. If there
    are none, the values are set to zero instead."""

    kept_widths: ClassVar[int] = 0
    """Number of [T, V] tensors that the output keeps from the forward to the backward."""

    gradient_widths: ClassVar[int] = 1
    """Number of [T, V] gradients that exist at the same time in the backward of the output."""

    kept_per_lookup: ClassVar[int] = 0
    """fp32 numbers per lookup that the read-out keeps for the backward, beside id and weight."""

    @property
    def reads_tokens(self) -> bool:
        """Whether the owners of rows need the tokens, which are then sent with the lookups."""
        return any(use.read == "dot" for use in self.tables)

    def table_name(self, pool: str, use: TableUse) -> str:
        """Return the name of a table in the model, in checkpoints and in reports."""
        return pool if use.name == VALUES else f"{pool}.{use.name}"

    def key_dim(self, value_dim: int) -> int:
        """Return Q for a model that does not set --memory-key-dim."""
        return 256

    def init_std(self, spec: MemorySpec, use: TableUse) -> float:
        """Return the standard deviation of a table's initial rows."""
        return spec.value_init_std

    @abstractmethod
    def read_out(self, tables: Mapping[str, ValueTable], received: ReceivedLookups) -> Tensor:
        """Return what the rows of this rank contribute to each bag, [G, v].

        Args:
            tables: the tables of the pool, by their names within it.
            received: the lookups of this rank's rows.
        """

    @abstractmethod
    def output(self, spec: MemorySpec, make: WeightFactory) -> Output:
        """Return the module that turns a layer's read-outs into its output.

        Its weights are replicated. They are linears of megamem.layers.linear, or are used through
        `reduce_gradient`, so that their gradients are summed over the tokens of all ranks.
        """
