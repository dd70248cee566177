"""The memory layer of Lample et al. 2019, "Large Memory Layers with Product Keys".

The output is the weighted sum of the rows. Letters: M lookups received here.
"""

from collections.abc import Mapping

from torch import Tensor

from megamem.layers.init import WeightFactory
from megamem.layers.output import Output
from megamem.layers.value_table import ReceivedLookups, ValueTable
from megamem.layers.variants.variant import VALUES, Variant
from megamem.spec import MemorySpec


class Memory(Variant):
    """The output is the sum of weight * row over the lookups of a token."""

    def read_out(self, tables: Mapping[str, ValueTable], received: ReceivedLookups) -> Tensor:
        """Return the weighted sum of the rows of each bag."""
        return tables[VALUES].bag(received, received.weights_M)

    def output(self, spec: MemorySpec, make: WeightFactory) -> Output:
        """Return a module that outputs the read-out itself."""
        return Output()
