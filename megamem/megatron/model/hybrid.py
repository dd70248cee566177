"""Memory layers in hybrid models, where each attention and each feed-forward is a layer.

The pattern `*-*-M-` has six layers, of which 1, 3 and 5 are feed-forwards; --memory-layers names
those to replace by these numbers. "E", a mixture of experts, is a feed-forward, too.

Megatron's stack has one spec for each symbol. Its place is taken by LayerByNumber, which chooses
between this spec and a memory by layer number, so that the stack needs no change.
"""

import copy
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megamem.config import ConfigurationError
from megamem.layers.memory_pool import MemoryPool
from megamem.megatron.model.carried_spec import carry_spec
from megamem.megatron.model.layer_specs import refuse_split, stage_pools, with_memory
from megamem.megatron.model.placement import placement_of
from megamem.spec import MemorySpec


class LayerByNumber:
    """Builds a layer of a stack: a memory layer or the original layer, by the layer's number."""

    def __new__(
        cls,
        *,
        layer_number: int,
        memories: dict[int, ModuleSpec],
        otherwise: ModuleSpec,
        **slot: Any,
    ) -> Any:
        """Build the layer.

        Args:
            layer_number: number of the layer in the model, from 1, as Megatron counts.
            memories: number of a memory layer, from 0, as --memory-layers counts -> its spec.
            otherwise: the spec of all other layers.
            slot: all other keywords that this release passes to a layer.
        """
        if layer_number - 1 not in memories or slot.get("is_mtp_layer"):
            return build_module(otherwise, layer_number=layer_number, **slot)
        # since 0.20 stacks pass this to experts, but not to dense layers, which a memory layer is
        slot.pop("is_mtp_layer", None)
        return build_module(memories[layer_number - 1], layer_number=layer_number, **slot)


class PredictionLayer:
    """Builds a layer for multi-token prediction, whose feed-forwards are never memory layers.

    Megatron builds it from the spec of the stack and numbers the layers in it from 1 again.
    """

    def __new__(cls, *, plain: ModuleSpec, without_memories: Any, **slot: Any) -> Any:
        """Build the layer.

        Args:
            plain: Megatron's spec of the layer.
            without_memories: the specs of the stack as they were.
            slot: all other keywords that this release passes to such a layer.
        """
        if "hybrid_submodules" in slot:
            slot["hybrid_submodules"] = without_memories
        return build_module(plain, **slot)


def has_memories(stack_spec: ModuleSpec) -> bool:
    """Whether memory_stack_spec() made this spec."""
    return stack_spec.submodules.mlp_layer.module is LayerByNumber


def memory_stack_spec(
    config: TransformerConfig,
    stack_spec: ModuleSpec,
    spec: MemorySpec,
    pattern: str,
    *,
    pg_collection: ProcessGroupCollection,
    vp_stage: int | None = None,
) -> tuple[ModuleSpec, dict[str, MemoryPool]]:
    """The spec of a stack with memory layers, and the pools that these read, by name.

    The caller passes the pools to register_tables() once the model is built.

    Args:
        config: Megatron's config of the model; the spec is attached to it.
        stack_spec: Megatron's spec of the stack, which stays as it is.
        spec: the memory layers.
        pattern: the pattern of the complete model.
        pg_collection: the process groups of the model.
        vp_stage: the virtual stage of this chunk, if there are several.
    """
    carry_spec(config, spec)
    if spec.skip:
        raise ConfigurationError(
            f"--memory-skip {spec.skip} does not work in a hybrid model, whose attentions and "
            "feed-forwards are layers of their own; drop --memory-skip."
        )
    placement = placement_of(config, pg_collection.pp.size(), pattern)
    refuse_split(spec, placement, config)
    of_stage = placement[pg_collection.pp.rank()]
    layers = of_stage[vp_stage or 0]
    pools = stage_pools(config, spec, layers, of_stage, pg_collection, vp_stage)
    changed = copy.copy(stack_spec)
    changed.submodules = copy.copy(stack_spec.submodules)
    dense = stack_spec.submodules.mlp_layer
    for slot in ("mlp_layer", "moe_layer"):
        otherwise = getattr(stack_spec.submodules, slot)
        # whichever feed-forward was in its place, a memory is in a dense layer: Megatron's layer of
        # experts takes its module apart
        own = copy.copy(dense)
        if spec.keep_ffn:
            own.submodules = otherwise.submodules
        memories = {
            layer: with_memory(own, layer, spec, pools) for layer in layers if layer in spec.layers
        }
        choice = {"memories": memories, "otherwise": otherwise}
        setattr(changed.submodules, slot, ModuleSpec(module=LayerByNumber, params=choice))
    if stack_spec.submodules.mtp_block_spec is not None:
        changed.submodules.mtp_block_spec = _prediction_spec(stack_spec.submodules)
    return changed, pools


def _prediction_spec(stack: Any) -> ModuleSpec:
    """The spec of multi-token prediction by the layers of this stack, without memories."""
    changed = copy.copy(stack.mtp_block_spec)
    changed.submodules = copy.copy(changed.submodules)
    changed.submodules.layer_specs = [
        ModuleSpec(module=PredictionLayer, params={"plain": layer, "without_memories": stack})
        for layer in changed.submodules.layer_specs
    ]
    return changed
