"""A memory model's weights as plain safetensors, and back, bit for bit.

In the export row i * N + j of a table is the value of the pair of sub-keys (i, j), whatever the
placement in the checkpoint was; everything else keeps Megatron's names and shapes.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from megamem.checkpoint import layer_table, placement_key, sub_keys_key
from megamem.config import ConfigurationError
from megamem.tools.convert import layout
from megamem.tools.convert.lazy import LazyTensor, Tensors, of_tensor

FORMAT = "megamem"
REMARKS = {"format": "pt", "writer": FORMAT, "table_rows": "i * N + j"}


def export(source: Tensors) -> dict[str, LazyTensor]:
    """What to write: the weights, the tables last.

    Raises:
        ConfigurationError: there is no table, or one has no N * N rows.
    """
    source = layout.weights_only(source)
    tables = layout.tables(source)
    if not tables:
        raise ConfigurationError("the checkpoint has no memory layers; export takes one that has.")
    placements = {placement_key(name) for name in tables}
    found = {
        key: tensor
        for key, tensor in source.items()
        if key not in tables.values() and key not in placements
    }
    for name, key in tables.items():
        seed = int(source[placement_key(name)].whole()) if placement_key(name) in source else None
        table = source[key]
        if seed is not None:
            table = layout.unplaced(table, _num_keys(key, table.shape[0]), seed)
        found[key] = table
    return found


def reimport(source: Mapping[str, Tensor], seed: int) -> tuple[dict[str, LazyTensor], list[str]]:
    """The checkpoint of an export, and the keys of its extra state.

    Args:
        source: name -> tensor, mapped from files.
        seed: `--memory-placement-seed` of the runs to come.

    Raises:
        ConfigurationError: it is not what export writes.
    """
    lazy = {name: of_tensor(tensor) for name, tensor in source.items()}
    tables = layout.tables(lazy)
    layers = {int(m["layer"]) for name in lazy if (m := layout.SINGLE.fullmatch(name))}
    if not tables or not layers or layout.EMBEDDING not in lazy:
        raise ConfigurationError(
            f"these are {len(lazy)} tensors, but not those of an export: there is no "
            f"{layout.EMBEDDING}, no {layout.LAYERS}0 or no value table among them."
        )
    memories = sorted(layer for layer in layers if sub_keys_key(layer) in lazy)
    unread = {layer_table(layer) for layer in memories} & set(tables)
    if not memories or (len(unread) not in (0, len(memories))):
        raise ConfigurationError(
            f"tables {', '.join(sorted(tables))} do not fit memory layers {memories}: an export "
            "has one for all of them, or one for each."
        )
    for name, key in tables.items():
        table = source[key]
        lazy[key] = layout.placed(table, _num_keys(key, table.shape[0]), seed)
        lazy |= layout.placement_of(name, seed)
    keep = any(f".{layout.KEPT_FFN}" in name for name in lazy)
    return lazy, layout.extra_states(max(layers) + 1, memories, keep)


def _num_keys(key: str, rows: int) -> int:
    num_keys = math.isqrt(rows)
    if num_keys**2 != rows:
        raise ConfigurationError(f"{key} has {rows:,} rows, which is no square: it is no table.")
    return num_keys
