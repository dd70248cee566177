"""What one kind of memory layer has that others have not.

MemoryLayer's forward is the data path of all of them: query, product keys, lookups to the rows'
owners, read-out there, output. A variant fills in two steps of it and says what they need:

    tables       what a pool holds: the rows that lookups name
    read_out     at the owner: rows -> a sum for every bag
    output       at home: read-out -> what the layer adds to the model

The planner, checkpoints, converters and reports ask the same object, so a new variant needs no
change in any of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from megamem.layers.init import WeightFactory
from megamem.layers.output import Output
from megamem.layers.value_table import Arrived, ValueTable
from megamem.spec import MemorySpec

VALUES = "v"
"""The table that every variant has; in checkpoints it bears the name of its pool."""


@dataclass(frozen=True)
class TableUse:
    """One table of a pool."""

    name: str = VALUES
    """Within the pool."""

    read: Literal["bag", "dot"] = "bag"
    """bag: rows are summed by weight. dot: rows are multiplied with the tokens of their bags."""


class Variant(ABC):
    """One kind of memory layer."""

    tables: ClassVar[tuple[TableUse, ...]] = (TableUse(),)
    """The values first."""

    cuts_rows: ClassVar[bool] = True
    """A rank can do with some columns of a row, so that modes column and 2d are possible."""

    projects: ClassVar[bool] = False
    """The output projects V-wide read-outs to the hidden size, so that the two may differ."""

    silent_output: ClassVar[tuple[str, ...]] = ()
    """Weights of the output that silence a new layer when they are zero. Without any, its values
    start at zero."""

    kept_widths: ClassVar[int] = 0
    """V-wide rows for each token that the output keeps from forward to backward."""

    gradient_widths: ClassVar[int] = 1
    """V-wide gradients for each token that exist at once in the output's backward."""

    kept_per_lookup: ClassVar[int] = 0
    """fp32 numbers for each lookup that the read-out keeps, beside row and weight."""

    @property
    def reads_tokens(self) -> bool:
        """The owners of rows need the tokens, which then travel with their lookups."""
        return any(use.read == "dot" for use in self.tables)

    def table_name(self, pool: str, use: TableUse) -> str:
        """The name of a table in the model, in checkpoints and reports."""
        return pool if use.name == VALUES else f"{pool}.{use.name}"

    def key_dim(self, value_dim: int) -> int:
        """Q, where --memory-key-dim is not given."""
        return 256

    def init_std(self, spec: MemorySpec, use: TableUse) -> float:
        """Standard deviation of a table's initial rows."""
        return spec.value_init_std

    @abstractmethod
    def read_out(self, tables: Mapping[str, ValueTable], arrived: Arrived) -> Tensor:
        """What the rows here contribute to each bag -> bags_Gv.

        Args:
            tables: of the pool, by their names within it.
            arrived: the lookups of this rank's rows.
        """

    @abstractmethod
    def output(self, spec: MemorySpec, make: WeightFactory) -> Output:
        """The module that turns a layer's read-outs into its output.

        Every rank holds its weights whole: they are linears of megamem.layers.linear, or are used
        through `reduce_gradient`, so that their gradients are those of all tokens.
        """
