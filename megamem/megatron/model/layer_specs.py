"""Puts memory layers into the layer specs of a GPT, whichever function made these."""

import copy
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megamem.config import ConfigurationError
from megamem.layers.memory_pool import MemoryPool
from megamem.layers.variants import pool_of
from megamem.megatron import compat
from megamem.megatron.model.carried_spec import carry_spec
from megamem.megatron.model.groups import memory_group
from megamem.megatron.model.memory_mlp import MemoryMLP, build_pool
from megamem.megatron.model.placement import (
    placement_of,
    share_problem,
    skip_problem,
)
from megamem.megatron.model.skip import Flight, MLPWithMemory
from megamem.planner.sizes import Placement
from megamem.spec import MemorySpec


def memory_layer_spec(
    config: TransformerConfig,
    layer_spec: ModuleSpec | TransformerBlockSubmodules,
    spec: MemorySpec,
    *,
    pg_collection: ProcessGroupCollection,
    vp_stage: int | None = None,
) -> tuple[TransformerBlockSubmodules, dict[str, MemoryPool]]:
    """The layer specs of a block with memory layers, and the pools that these read, by name.

    The caller passes the pools to register_tables() once the model is built.

    Args:
        config: Megatron's config of the model; the spec is attached to it.
        layer_spec: one spec for all layers, or one for each layer of this stage.
        spec: the memory layers.
        pg_collection: the process groups of the model.
        vp_stage: the virtual stage of this chunk, if there are several.
    """
    carry_spec(config, spec)
    pp_rank = pg_collection.pp.rank()
    block = compat.block_submodules(config, layer_spec, vp_stage, pp_rank)
    placement = placement_of(config, pg_collection.pp.size())
    refuse_split(spec, placement, config)
    of_stage = placement[pp_rank]
    layers = of_stage[vp_stage or 0]
    assert len(layers) == len(block.layer_specs), (layers, len(block.layer_specs))
    pools = stage_pools(config, spec, layers, of_stage, pg_collection, vp_stage)
    flights = {layer: Flight() for layer in layers if layer in spec.layers and spec.skip}
    layer_specs = []
    for layer, own in zip(layers, block.layer_specs, strict=True):
        if layer in spec.layers:
            own = with_memory(own, layer, spec, pools, flights.get(layer))
        elif layer - spec.skip in flights:
            own = behind_memory(own, flights[layer - spec.skip])
        layer_specs.append(own)
    return TransformerBlockSubmodules(layer_specs=layer_specs, layer_norm=block.layer_norm), pools


def has_memories(layer_spec: ModuleSpec | TransformerBlockSubmodules) -> bool:
    """Whether memory_layer_spec() made this spec."""
    own = getattr(layer_spec, "layer_specs", [])
    return any(getattr(one.submodules.mlp, "module", None) is MemoryMLP for one in own)


def refuse_split(spec: MemorySpec, placement: Placement, config: TransformerConfig) -> None:
    """Raise a ConfigurationError if stages separate what memories need together."""
    problems = skip_problem(spec, placement, config), share_problem(spec, placement)
    ConfigurationError.collect([said for said in problems if said])


_latest: WeakValueDictionary[tuple[int, str], MemoryPool] = WeakValueDictionary()
"""(identity of a spec, name) -> the pool of the model that was built last with this spec."""


def stage_pools(
    config: TransformerConfig,
    spec: MemorySpec,
    layers: Sequence[int],
    of_stage: Sequence[Sequence[int]],
    pg_collection: ProcessGroupCollection,
    vp_stage: int | None = None,
) -> dict[str, MemoryPool]:
    """The pools that the memory layers among these layers of a chunk read, by name; may be empty.

    All ranks must call it, because it makes process groups. The chunks of a model on one rank share
    the pools that they have in common: a chunk takes those of the chunks before it, and the first
    chunk of every model makes its own.

    Args:
        config: Megatron's config of the model.
        spec: the memory layers.
        layers: the layers of the chunk.
        of_stage: the layers of each chunk of this rank.
        pg_collection: the process groups of the model.
        vp_stage: the virtual stage of the chunk, if there are several.
    """
    holds = any(layer in spec.layers for chunk in of_stage for layer in chunk)
    group = memory_group(spec, pg_collection, holds)
    if not vp_stage:
        for key in [key for key in _latest if key[0] == id(spec)]:
            del _latest[key]
    pools = {}
    for name in sorted({pool_of(layer, spec) for layer in layers if layer in spec.layers}):
        pools[name] = _latest.get((id(spec), name)) or build_pool(config, spec, name, group)
        _latest[id(spec), name] = pools[name]
    return pools


def with_memory(
    layer_spec: ModuleSpec,
    layer: int,
    spec: MemorySpec,
    pools: dict[str, MemoryPool],
    flight: Flight | None = None,
) -> ModuleSpec:
    """The spec of a layer with a memory in its MLP slot; the given spec stays as it is.

    Args:
        layer_spec: the spec of the layer without a memory.
        layer: number of the layer, from 0.
        spec: the memory layers.
        pools: the pools of this chunk.
        flight: takes the lookups to a later layer, which adds the memory; by default this one does.
    """
    submodules = copy.copy(layer_spec.submodules)
    ffn = submodules.mlp
    if submodules.pre_mlp_layernorm is IdentityOp:
        # Transformer Engine's dense layer applies the norm inside linear_fc1. A memory has no such
        # linear layer, so the norm becomes a module, and a feed-forward that stays must skip it
        submodules.pre_mlp_layernorm = compat.TransformerEngineNorm
        ffn = compat.without_fused_norm(ffn)
    params: dict[str, Any] = {"spec": spec, "pool": pools[pool_of(layer, spec)], "layer": layer}
    if spec.keep_ffn:
        params["ffn"] = compat.mlp_builder(ffn)
    if flight is not None:
        params["flight"] = flight
    submodules.mlp = ModuleSpec(module=MemoryMLP, params=params)
    # drop the entry by which the local spec saves this norm under the name of the fused one
    submodules.sharded_state_dict_keys_map = {
        saved: name
        for saved, name in submodules.sharded_state_dict_keys_map.items()
        if not name.startswith("mlp.")
    }
    changed = copy.copy(layer_spec)
    changed.submodules = submodules
    return changed


def behind_memory(layer_spec: ModuleSpec, flight: Flight) -> ModuleSpec:
    """The spec of a layer behind which the memory of an earlier layer is added; the given spec
    stays as it is."""
    changed = copy.copy(layer_spec)
    changed.submodules = copy.copy(layer_spec.submodules)
    ffn = compat.mlp_builder(layer_spec.submodules.mlp)
    changed.submodules.mlp = ModuleSpec(module=MLPWithMemory, params={"ffn": ffn, "flight": flight})
    return changed
