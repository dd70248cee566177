"""Puts memory layers into the layer specs of a GPT, whichever spec builder made them."""

import copy
from dataclasses import dataclass, field
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megamem.checkpoint import SHARED, layer_table
from megamem.config import MemoryConfig
from megamem.integration import compat
from megamem.integration.groups import memory_group
from megamem.integration.memory_mlp import MemoryMLP, build_table
from megamem.layers.value_table import ValueTable


@dataclass(frozen=True)
class MemorySettings:
    """What a TransformerConfig carries to the place where the model is built."""

    memory: MemoryConfig
    """Resolved."""

    seed: int
    """Of the run."""

    tokens_vary: bool = False
    """Sequences of different lengths may reach the ranks that share a table."""


@dataclass
class MemoryLayerSpec:
    """A block's layer specs with memories in them, and the tables that these read."""

    block: TransformerBlockSubmodules
    tables: dict[str, ValueTable] = field(default_factory=dict)


def memory_layer_spec(
    config: TransformerConfig,
    spec: ModuleSpec | TransformerBlockSubmodules,
    settings: MemorySettings,
    *,
    pg_collection: ProcessGroupCollection,
    vp_stage: int | None = None,
) -> MemoryLayerSpec:
    """Replace the MLPs of this stage's memory layers; the caller registers the tables.

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
    memory = settings.memory
    # before any stage turns back: making process groups takes all ranks
    group = memory_group(memory, pg_collection)
    here = [layer for layer in layers if layer in memory.memory_layers]
    if not here:
        return MemoryLayerSpec(block)

    shared = memory.memory_pool == "shared"
    names = [SHARED] if shared else [layer_table(layer) for layer in here]
    tables = {name: build_table(config, memory, name, settings.seed, group) for name in names}
    specs = list(block.layer_specs)
    for layer in here:
        place = layers.index(layer)
        specs[place] = _with_memory(
            config,
            specs[place],
            memory=memory,
            values=tables[SHARED if shared else layer_table(layer)],
            layer=layer,
            seed=settings.seed,
            tokens_vary=settings.tokens_vary,
        )
    return MemoryLayerSpec(
        TransformerBlockSubmodules(layer_specs=specs, layer_norm=block.layer_norm), tables
    )


def _with_memory(config: TransformerConfig, spec: ModuleSpec, **params: Any) -> ModuleSpec:
    """The spec of one layer, its MLP slot filled with a memory. The given spec stays as it is."""
    submodules = copy.copy(spec.submodules)
    ffn = submodules.mlp
    if submodules.pre_mlp_layernorm is IdentityOp:
        # Transformer Engine's dense layer has the norm inside linear_fc1; a memory has no such
        # linear, so the norm gets a place of its own, and a feed-forward that stays goes without
        submodules.pre_mlp_layernorm = compat.transformer_engine_norm()
        ffn = compat.without_fused_norm(ffn)
    if params["memory"].memory_keep_ffn:
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
