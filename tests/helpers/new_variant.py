"""A kind of memory layer that megamem does not have: what adding one takes.

A row v of one table and a row s of another add weight * v + weight**2 * s, and the output has a
learned scale for each number. As a module, it runs a script as megamem.run does, with the variant.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor

from megamem.config import MemoryConfig
from megamem.layers.init import WeightFactory
from megamem.layers.linear import LateWeights
from megamem.layers.output import Output
from megamem.layers.value_table import ReceivedLookups, ValueTable
from megamem.layers.variants import VARIANTS
from megamem.layers.variants.variant import VALUES, TableUse, Variant
from megamem.parallel.collectives import reduce_gradient
from megamem.spec import MemorySpec


class Scaled(Output):
    """read-out * scale."""

    def __init__(self, spec: MemorySpec, make: WeightFactory) -> None:
        super().__init__()
        self.gradient_group = make.gradient_group
        self.scale = make.constant(spec.value_dim, value=1)

    def forward(
        self, out_TV: Tensor, gate_TV: Tensor | None, late: LateWeights | None = None
    ) -> Tensor:
        return out_TV * reduce_gradient(self.scale, self.gradient_group)


class Squared(Variant):
    """Two tables, the second read by the square of the weights."""

    tables = (TableUse(), TableUse("s"))
    silent_output = ("scale",)
    kept_widths = 1

    def read_out(self, tables: Mapping[str, ValueTable], received: ReceivedLookups) -> Tensor:
        plain = tables[VALUES].bag(received, received.weights_M)
        return plain + tables["s"].bag(received, received.weights_M.square())

    def output(self, spec: MemorySpec, make: WeightFactory) -> Output:
        return Scaled(spec, make)


def register() -> None:
    """The two lines that name a variant: in the table of variants, and in the flag's choices."""
    VARIANTS["squared"] = Squared()
    _choose_from(Literal["memory", "memory+", "peer", "squared"])


def _choose_from(choices: Any) -> None:
    """As if MemoryConfig had been written so."""
    MemoryConfig.__annotations__["memory_variant"] = choices
    MemoryConfig.__dataclass_fields__["memory_variant"].type = choices


@contextmanager
def registered() -> Iterator[None]:
    """register(), and forget it again."""
    before = MemoryConfig.__annotations__["memory_variant"]
    register()
    try:
        yield
    finally:
        _choose_from(before)
        del VARIANTS["squared"]


if __name__ == "__main__":
    # a rank imports Megatron only once --cpu has been read
    register()
    from megamem.megatron.launcher import main

    sys.exit(main())
