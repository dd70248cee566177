"""Lets Megatron's models put memories into their layer specs, if their config carries a spec."""

import inspect
from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megamem.layers.memory_pool import MemoryPool
from megamem.megatron import compat
from megamem.megatron.model import hybrid, layer_specs
from megamem.megatron.model.carried_spec import carried_spec
from megamem.megatron.model.memory_mlp import register_tables
from megamem.patching import replace
from megamem.spec import MemorySpec


def install_memories() -> None:
    """Replace GPTModel.__init__ and HybridModel.__init__; a second call changes nothing.

    Whoever builds a model, and in whatever way it makes the layer specs: a config without a spec,
    and layer specs that already have memories, get the model that they got before.
    """
    replace(GPTModel, "__init__", _build_memories)
    if compat.HybridModel is not None:
        replace(compat.HybridModel, "__init__", _build_memories)


def _build_memories(original: Callable[..., Any]) -> Callable[..., Any]:
    """__init__ of GPTModel or HybridModel that puts memories into the layer specs it is given."""
    signature = inspect.signature(original)

    def __init__(self: MegatronModule, *rest: Any, **more: Any) -> None:
        bound = signature.bind(self, *rest, **more)
        bound.apply_defaults()
        given = bound.arguments
        spec, pools = carried_spec(given["config"]), {}
        if spec is not None:
            groups = given["pg_collection"] or ProcessGroupCollection.use_mpu_process_groups()
            where = {"pg_collection": groups, "vp_stage": given["vp_stage"]}
            pools = _put_memories(given, spec, where)
        original(*bound.args, **bound.kwargs)
        register_tables(self, pools)

    return __init__


def _put_memories(
    given: dict[str, Any], spec: MemorySpec, where: dict[str, Any]
) -> dict[str, MemoryPool]:
    """Change the layer specs among the arguments of a model; return the pools to register.

    Layer specs that already have memories, as in examples/own_script.py, stay as they are.
    """
    config = given["config"]
    if "hybrid_stack_spec" in given:
        stack, pattern = given["hybrid_stack_spec"], given["hybrid_layer_pattern"]
        if hybrid.has_memories(stack):
            return {}
        made = hybrid.memory_stack_spec(config, stack, spec, pattern, **where)
        given["hybrid_stack_spec"], pools = made
    else:
        layers = given["transformer_layer_spec"]
        if layer_specs.has_memories(layers):
            return {}
        made = layer_specs.memory_layer_spec(config, layers, spec, **where)
        given["transformer_layer_spec"], pools = made
    return pools
