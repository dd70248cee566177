"""Exports a memory model's weights to safetensors and imports them again, bit for bit.

In an export, row i * N + j of a table is the value of the pair of sub-keys (i, j), whatever the
placement in the checkpoint is. Where several pairs of UltraMem's read a row, rows stay where they
are, and the placement seed is in the export. Everything else keeps Megatron's names and shapes.
"""

import math
from collections.abc import Mapping
from typing import Any

from megamem.checkpoint import layer_table, placement_key, sub_keys_key
from megamem.config import ConfigurationError
from megamem.tools.convert import layout
from megamem.tools.convert.lazy import LazyTensor, Tensors

FORMAT = "megamem"
REMARKS = {"format": "pt", "writer": FORMAT, "table_rows": "i * N + j"}

PLACED = "as placed by the seed or permutation in the checkpoint"
"""In place of the entry of REMARKS where rows stay as they are."""


def stay_placed(settings: Mapping[str, Any] | None) -> bool:
    """Whether the rows of a model's tables stay in the order of a checkpoint.

    A row has several pairs of sub-keys, or a permutation of the pairs is among the weights.

    Args:
        settings: the memory settings in a checkpoint; None if it has none.
    """
    said = settings or {}
    pairs_of_a_row = said.get("expansion", 1) * said.get("share_layers", 1)
    return pairs_of_a_row > 1 or said.get("placement", "seed") == "stored"


def export(source: Tensors, settings: Mapping[str, Any] | None = None) -> dict[str, LazyTensor]:
    """The tensors of an export by name: the weights, with the tables last.

    Args:
        source: key -> tensor of a checkpoint.
        settings: the memory settings in it; None if it has none.

    Raises:
        ConfigurationError: there is no table, or the rows of one are not a square number.
    """
    source = layout.weights_only(source)
    tables = layout.tables(source)
    if not tables:
        raise ConfigurationError(
            "the checkpoint has no memory layers; give megamem convert export one that has some."
        )
    if stay_placed(settings):
        last = [*tables.values()]
        return {key: x for key, x in source.items() if key not in last} | {
            key: source[key] for key in last
        }
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


def reimport(source: Tensors, seed: int) -> tuple[dict[str, LazyTensor], list[str]]:
    """Turn the tensors of an export into a Megatron checkpoint.

    Args:
        source: name -> tensor; those of tables are memory-mapped from files, or small.
        seed: `--memory-placement-seed` of the runs that will load the checkpoint.

    Returns:
        key -> tensor, and the keys of extra state.

    Raises:
        ConfigurationError: the tensors are not those of an export.
    """
    lazy = dict(source)
    tables = layout.tables(lazy)
    layers = {int(m["layer"]) for name in lazy if (m := layout.SINGLE.fullmatch(name))}
    if not tables or not layers or layout.EMBEDDING not in lazy:
        raise ConfigurationError(
            f"these {len(lazy)} tensors are not those of an export: {layout.EMBEDDING}, "
            f"{layout.LAYERS}0 or a value table is missing."
        )
    memories = sorted(layer for layer in layers if sub_keys_key(layer) in lazy)
    unread = {layer_table(layer) for layer in memories} & set(tables)
    placed = {name for name in tables if placement_key(name) in lazy}
    if not memories or (len(unread) not in (0, len(memories)) and not placed):
        raise ConfigurationError(
            f"the tables {', '.join(sorted(tables))} do not match the memory layers {memories}: "
            "there must be one table for all layers, or one per layer."
        )
    for name, key in tables.items():
        if name in placed:
            continue
        table = source[key].whole()
        lazy[key] = layout.placed(table, _num_keys(key, table.shape[0]), seed)
        lazy |= layout.placement_of(name, seed)
    keep = any(f".{layout.KEPT_FFN}" in name for name in lazy)
    states = layout.extra_states(max(layers) + 1, memories, keep) + layout.expert_states(lazy)
    return lazy, states


def _num_keys(key: str, rows: int) -> int:
    num_keys = math.isqrt(rows)
    if num_keys**2 != rows:
        raise ConfigurationError(
            f"{key} has {rows:,} rows, which is not a square number, so it is not a value table."
        )
    return num_keys
