"""Puts memory layers into the layer specs of a GPT, whichever spec builder made them."""

import copy
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megamem.checkpoint import SHARED, layer_table
from megamem.config import MemoryConfig
from megamem.layers.value_table import ValueTable
from megamem.megatron import compat
from megamem.megatron.model.groups import memory_group
from megamem.megatron.model.memory_mlp import MemoryMLP, build_table


@dataclass(frozen=True)
class MemorySettings:
    """What a TransformerConfig carries to the place where the model is built."""

    memory: MemoryConfig
    """Resolved."""

    seed: int
    """Of the run."""

    tokens_vary: bool = False
    """Sequences of different lengths may reach the ranks that share a table."""

    timeout: timedelta | None = None
    """Of the collectives between the ranks that share a table; None is that of the backend."""


def memory_layer_spec(
    config: TransformerConfig,
    spec: ModuleSpec | TransformerBlockSubmodules,
    settings: MemorySettings,
    *,
    pg_collection: ProcessGroupCollection,
    vp_stage: int | None = None,
) -> tuple[TransformerBlockSubmodules, dict[str, ValueTable]]:
    """A block's layer specs with memories in them, and the tables that these read, to register.

    Args:
        config: Megatron's.
        spec: one layer for all, or one for each layer of this stage.
        settings: which layers, and how.
        pg_collection: of the model.
        vp_stage: this chunk's virtual stage, where there are several.
    """
    pp_rank = pg_collection.pp.rank()
    block = compat.block_submodules(config, spec, vp_stage, pp_rank)
    layers = compat.stage_layers(config, vp_stage, pp_rank)
    assert len(layers) == len(block.layer_specs), (layers, len(block.layer_specs))
    tables = stage_tables(config, settings, layers, pg_collection)
    specs = [
        with_memory(config, spec, layer, settings, tables)
        if layer in settings.memory.memory_layers
        else spec
        for layer, spec in zip(layers, block.layer_specs, strict=True)
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=block.layer_norm), tables


def stage_tables(
    config: TransformerConfig,
    settings: MemorySettings,
    layers: list[int],
    pg_collection: ProcessGroupCollection,
) -> dict[str, ValueTable]:
    """The tables, by name, that the memories among these layers of one stage read; maybe none.

    All ranks must call it: it makes process groups.
    """
    memory = settings.memory
    group = memory_group(memory, pg_collection, settings.timeout)
    names = {_table_of(layer, memory) for layer in layers if layer in memory.memory_layers}
    return {name: build_table(config, memory, name, settings.seed, group) for name in sorted(names)}


def with_memory(
    config: TransformerConfig,
    spec: ModuleSpec,
    layer: int,
    settings: MemorySettings,
    tables: dict[str, ValueTable],
) -> ModuleSpec:
    """The spec of one layer, its MLP slot filled with a memory. The given spec stays as it is."""
    submodules = copy.copy(spec.submodules)
    ffn = submodules.mlp
    if submodules.pre_mlp_layernorm is IdentityOp:
        # Transformer Engine's dense layer has the norm inside linear_fc1; a memory has no such
        # linear, so the norm gets a place of its own, and a feed-forward that stays goes without
        submodules.pre_mlp_layernorm = compat.TransformerEngineNorm
        ffn = compat.without_fused_norm(ffn)
    params: dict[str, Any] = {
        "memory": settings.memory,
        "values": tables[_table_of(layer, settings.memory)],
        "layer": layer,
        "seed": settings.seed,
        "tokens_vary": settings.tokens_vary,
    }
    if settings.memory.memory_keep_ffn:
        params["ffn"] = compat.mlp_builder(ffn)
    submodules.mlp = ModuleSpec(module=MemoryMLP, params=params)
    # the local spec saves the norm before the MLP under the name of the fused one
    submodules.sharded_state_dict_keys_map = {
        saved: name
        for saved, name in submodules.sharded_state_dict_keys_map.items()
        if not name.startswith("mlp.")
    }
    changed = copy.copy(spec)
    changed.submodules = submodules
    return changed


def _table_of(layer: int, memory: MemoryConfig) -> str:
    """The name of the table that a layer reads."""
    return SHARED if memory.memory_pool == "shared" else layer_table(layer)
