"""Memory layers for Megatron: huge key-value tables read by product-key lookup."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamem.config import ConfigurationError, MemoryConfig
    from megamem.layers.memory import MemoryLayer
    from megamem.layers.memory_pool import MemoryPool
    from megamem.megatron.arguments import add_memory_flags, spec_from_args
    from megamem.megatron.bridge import add_memory_layers
    from megamem.megatron.model.builders import MemoryGPTModelConfig, MemoryHybridModelConfig
    from megamem.megatron.model.hybrid import memory_stack_spec
    from megamem.megatron.model.layer_specs import memory_layer_spec
    from megamem.megatron.model.memory_mlp import register_tables
    from megamem.megatron.optimizer.with_memory import with_memory
    from megamem.megatron.startup.checks import check
    from megamem.optimizer import StepOptions, TableOptimizer
    from megamem.parallel.memory_group import MemoryGroup
    from megamem.parallel.tuning import load_tuning
    from megamem.resolution import resolve
    from megamem.spec import MemorySpec

__version__ = "0.1.0"

_HOMES = {
    "ConfigurationError": "megamem.config",
    "MemoryConfig": "megamem.config",
    "MemoryGPTModelConfig": "megamem.megatron.model.builders",
    "MemoryGroup": "megamem.parallel.memory_group",
    "MemoryHybridModelConfig": "megamem.megatron.model.builders",
    "MemoryLayer": "megamem.layers.memory",
    "MemoryPool": "megamem.layers.memory_pool",
    "MemorySpec": "megamem.spec",
    "StepOptions": "megamem.optimizer",
    "TableOptimizer": "megamem.optimizer",
    "add_memory_flags": "megamem.megatron.arguments",
    "add_memory_layers": "megamem.megatron.bridge",
    "check": "megamem.megatron.startup.checks",
    "load_tuning": "megamem.parallel.tuning",
    "memory_layer_spec": "megamem.megatron.model.layer_specs",
    "memory_stack_spec": "megamem.megatron.model.hybrid",
    "register_tables": "megamem.megatron.model.memory_mlp",
    "resolve": "megamem.resolution",
    "spec_from_args": "megamem.megatron.arguments",
    "with_memory": "megamem.megatron.optimizer.with_memory",
}

__all__ = [
    "ConfigurationError",
    "MemoryConfig",
    "MemoryGPTModelConfig",
    "MemoryGroup",
    "MemoryHybridModelConfig",
    "MemoryLayer",
    "MemoryPool",
    "MemorySpec",
    "StepOptions",
    "TableOptimizer",
    "__version__",
    "add_memory_flags",
    "add_memory_layers",
    "check",
    "load_tuning",
    "memory_layer_spec",
    "memory_stack_spec",
    "register_tables",
    "resolve",
    "spec_from_args",
    "with_memory",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the CPU runtime must be in place before Megatron is."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
