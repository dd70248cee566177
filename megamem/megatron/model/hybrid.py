"""Memory layers in hybrid models, where a pattern gives every attention and feed-forward a layer.

`*-*-M-` is six layers, of which 1, 3 and 5 are feed-forwards; a memory takes the place of one, by
the number that the pattern counts. "E", a mixture of experts, is a feed-forward as well.

A stack of Megatron's has one spec for each symbol. What is put there chooses by layer number, so
that the stack itself needs no change.
"""

import copy
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megamem.hybrid_pattern import stage_layers
from megamem.layers.memory_pool import MemoryPool
from megamem.megatron.model.carried_spec import carry_spec
from megamem.megatron.model.layer_specs import stage_pools, with_memory
from megamem.spec import MemorySpec


class LayerByNumber:
    """Builds a layer of a stack: a memory at some numbers, at others what the stack had."""

    def __new__(
        cls,
        *,
        layer_number: int,
        memories: dict[int, ModuleSpec],
        otherwise: ModuleSpec,
        **slot: Any,
    ) -> Any:
        """The layer.

        Args:
            layer_number: in the model, from 1, as Megatron counts.
            memories: specs by number, from 0, as our flags count.
            otherwise: the spec of all other layers.
            slot: whatever else this release passes to a layer.
        """
        spec = memories.get(layer_number - 1, otherwise)
        return build_module(spec, layer_number=layer_number, **slot)


def has_memories(stack_spec: ModuleSpec) -> bool:
    """Whether memory_stack_spec() made it."""
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
    """A stack's spec with memories in it, and the pools that these read, to register.

    Args:
        config: Megatron's.
        stack_spec: Megatron's, of the stack.
        spec: which layers, and how.
        pattern: of the whole model.
        pg_collection: of the model.
        vp_stage: this chunk's virtual stage, where there are several.
    """
    carry_spec(config, spec)
    layers = stage_layers(
        pattern,
        pg_collection.pp.size(),
        pg_collection.pp.rank(),
        vp_stage,
        first=config.num_layers_in_first_pipeline_stage,
        last=config.num_layers_in_last_pipeline_stage,
    )
    pools = stage_pools(config, spec, layers, pg_collection)
    changed = copy.copy(stack_spec)
    changed.submodules = copy.copy(stack_spec.submodules)
    # whatever was there, a memory is a layer with a norm and one thing after it: the dense layer
    dense = stack_spec.submodules.mlp_layer
    memories = {
        layer: with_memory(dense, layer, spec, pools) for layer in layers if layer in spec.layers
    }
    for slot in ("mlp_layer", "moe_layer"):
        otherwise = getattr(stack_spec.submodules, slot)
        choice = {"memories": memories, "otherwise": otherwise}
        setattr(changed.submodules, slot, ModuleSpec(module=LayerByNumber, params=choice))
    return changed, pools
