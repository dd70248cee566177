"""Kinds of memory layers, one small file each. A new one is a file and a line here.

And a line in MemoryConfig.memory_variant, from which the flag's choices are made.
"""

from megamem.checkpoint import SHARED, layer_table
from megamem.layers.variants.memory import Memory
from megamem.layers.variants.memory_plus import MemoryPlus
from megamem.layers.variants.peer import Peer
from megamem.layers.variants.variant import Variant
from megamem.spec import MemorySpec

VARIANTS: dict[str, Variant] = {
    "memory": Memory(),
    "memory+": MemoryPlus(),
    "peer": Peer(),
}
"""Name, as of --memory-variant, -> what it does."""


def variant_of(spec: MemorySpec) -> Variant:
    """What the memory layers of a run do."""
    return VARIANTS[spec.variant]


def pool_of(layer: int, spec: MemorySpec) -> str:
    """The name of the pool that a layer reads."""
    return SHARED if spec.pool == "shared" else layer_table(layer)


def pool_names(spec: MemorySpec) -> list[str]:
    """Every pool of a model."""
    return list(dict.fromkeys(pool_of(layer, spec) for layer in spec.layers))


def table_names(spec: MemorySpec) -> list[str]:
    """Every table of a model, pool by pool."""
    variant = variant_of(spec)
    return [variant.table_name(pool, use) for pool in pool_names(spec) for use in variant.tables]
