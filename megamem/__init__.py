"""Memory layers for Megatron: huge key-value tables read by product-key lookup."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamem.config import ConfigurationError, MemoryConfig
    from megamem.layers.memory import MemoryLayer
    from megamem.layers.memory_pool import MemoryPool
    from megamem.megatron.arguments import add_memory_flags, spec_from_args
    from megamem.megatron.model.layer_specs import memory_layer_spec
    from megamem.optimizer import StepOptions, TableOptimizer
    from megamem.parallel.memory_group import MemoryGroup
    from megamem.resolution import resolve
    from megamem.spec import MemorySpec

__version__ = "0.1.0"

_HOMES = {
    "ConfigurationError": "megamem.config",
    "MemoryConfig": "megamem.config",
    "MemoryGroup": "megamem.parallel.memory_group",
    "MemoryLayer": "megamem.layers.memory",
    "MemoryPool": "megamem.layers.memory_pool",
    "MemorySpec": "megamem.spec",
    "StepOptions": "megamem.optimizer",
    "TableOptimizer": "megamem.optimizer",
    "add_memory_flags": "megamem.megatron.arguments",
    "memory_layer_spec": "megamem.megatron.model.layer_specs",
    "resolve": "megamem.resolution",
    "spec_from_args": "megamem.megatron.arguments",
}

__all__ = [
    "ConfigurationError",
    "MemoryConfig",
    "MemoryGroup",
    "MemoryLayer",
    "MemoryPool",
    "MemorySpec",
    "StepOptions",
    "TableOptimizer",
    "__version__",
    "add_memory_flags",
    "memory_layer_spec",
    "resolve",
    "spec_from_args",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the CPU runtime must be in place before Megatron is."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
