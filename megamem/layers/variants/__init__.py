"""The variants of memory layers, one file each.

A new variant takes a file in this package, an entry in VARIANTS, and its name in
MemoryConfig.memory_variant, from which the choices of the flag are generated.
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
"""Value of --memory-variant -> the variant."""


def variant_of(spec: MemorySpec) -> Variant:
    """Return the variant of the memory layers of a run."""
    return VARIANTS[spec.variant]


def pool_of(layer: int, spec: MemorySpec) -> str:
    """Return the name of the pool that a layer reads."""
    return SHARED if spec.pool == "shared" else layer_table(layer)


def pool_names(spec: MemorySpec) -> list[str]:
    """Return the names of all pools of a model."""
    return list(dict.fromkeys(pool_of(layer, spec) for layer in spec.layers))


def table_names(spec: MemorySpec) -> list[str]:
    """Return the names of all tables of a model, pool by pool."""
    variant = variant_of(spec)
    return [variant.table_name(pool, use) for pool in pool_names(spec) for use in variant.tables]
