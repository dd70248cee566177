"""The variants of memory layers, one file each.

A new variant takes a file in this package, an entry in VARIANTS, and its name in
MemoryConfig.memory_variant, from which the choices of the flag are generated.
"""

from megamem.checkpoint import SHARED, layer_table
from megamem.layers.variants.memory import Memory
from megamem.layers.variants.memory_plus import MemoryPlus
from megamem.layers.variants.peer import Peer
from megamem.layers.variants.ultramem import UltraMem
from megamem.layers.variants.ultramem_v2 import UltraMemV2
from megamem.layers.variants.variant import Variant
from megamem.spec import MemorySpec

VARIANTS: dict[str, Variant] = {
    "memory": Memory(),
    "memory+": MemoryPlus(),
    "peer": Peer(),
    "ultramem": UltraMem(),
    "ultramem-v2": UltraMemV2(),
}
"""Value of --memory-variant -> the variant."""


def variant_of(spec: MemorySpec) -> Variant:
    """Return the variant of the memory layers of a run."""
    return VARIANTS[spec.variant]


def pool_of(layer: int, spec: MemorySpec) -> str:
    """Return the name of the pool that a layer reads."""
    if spec.pool == "shared":
        return SHARED
    if spec.share_layers == 1:
        return layer_table(layer)
    # neighbours share the pool of the first of them
    place = spec.layers.index(layer)
    return layer_table(spec.layers[place - place % spec.share_layers])


def placement_seed_of(layer: int, spec: MemorySpec) -> int:
    """Return the seed of the placement of a layer's rows.

    Layers that share a table with sub-keys for the rows of all of them have one each.
    """
    if spec.share_layers == 1:
        return spec.placement_seed
    return spec.placement_seed + spec.layers.index(layer) % spec.share_layers


def pool_names(spec: MemorySpec) -> list[str]:
    """Return the names of all pools of a model."""
    return list(dict.fromkeys(pool_of(layer, spec) for layer in spec.layers))


def table_names(spec: MemorySpec) -> list[str]:
    """Return the names of all tables of a model, pool by pool."""
    variant = variant_of(spec)
    return [variant.table_name(pool, use) for pool in pool_names(spec) for use in variant.tables]


def table_shapes(spec: MemorySpec) -> dict[str, tuple[int, int]]:
    """Return the rows and the width of every table of a model, by name."""
    variant = variant_of(spec)
    return {
        variant.table_name(pool, use): (spec.num_rows, variant.table_width(spec, use))
        for pool in pool_names(spec)
        for use in variant.tables
    }
