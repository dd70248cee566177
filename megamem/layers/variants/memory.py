"""The memory layer of Lample et al. 2019: the weighted sum of rows is the output."""

from collections.abc import Mapping

from torch import Tensor

from megamem.layers.init import WeightFactory
from megamem.layers.output import Output
from megamem.layers.value_table import Arrived, ValueTable
from megamem.layers.variants.variant import VALUES, Variant
from megamem.spec import MemorySpec


class Memory(Variant):
    """sum of weight * row."""

    def read_out(self, tables: Mapping[str, ValueTable], arrived: Arrived) -> Tensor:
        """The weighted sums."""
        return tables[VALUES].bag(arrived, arrived.weights_M)

    def output(self, spec: MemorySpec, make: WeightFactory) -> Output:
        """The read-out itself."""
        return Output()
