"""Memory layers for Megatron: huge key-value tables read by product-key lookup."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamem.config import MemoryConfig
    from megamem.layers.memory import MemoryLayer
    from megamem.layers.value_table import ValueTable
    from megamem.megatron.model.layer_specs import memory_layer_spec

__version__ = "0.1.0"

__all__ = ["MemoryConfig", "MemoryLayer", "ValueTable", "__version__", "memory_layer_spec"]

_HOMES = {
    "MemoryConfig": "megamem.config",
    "MemoryLayer": "megamem.layers.memory",
    "ValueTable": "megamem.layers.value_table",
    "memory_layer_spec": "megamem.megatron.model.layer_specs",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the CPU runtime must be in place before Megatron is."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
