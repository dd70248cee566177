"""Attaches the MemorySpec of a model to its TransformerConfig, where all code can find it."""

from collections.abc import Callable, Iterable

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megamem.spec import MemorySpec

ATTRIBUTE = "megamem"
"""Attribute of the config that holds the spec, or a function that makes it; a config without memory
layers lacks it."""


def carry_spec(config: TransformerConfig, spec: MemorySpec) -> None:
    """Attach a spec to the config of a model."""
    setattr(config, ATTRIBUTE, spec)
    # the layers differ, so a checkpoint must not stack them along one axis
    config.hetereogenous_dist_checkpoint = True


def carry_later(config: TransformerConfig, make: Callable[[], MemorySpec]) -> None:
    """Attach a function that makes the spec when the model is built, and is called once."""
    setattr(config, ATTRIBUTE, make)


def carried_spec(config: TransformerConfig) -> MemorySpec | None:
    """The spec attached to a config, or None without memory layers."""
    found = getattr(config, ATTRIBUTE, None)
    if callable(found):
        found = found()
        carry_spec(config, found)
    return found


def spec_of_model(chunks: Iterable[nn.Module]) -> MemorySpec | None:
    """The spec that the chunks of a model were built with, or None without memory layers."""
    for chunk in chunks:
        config = getattr(chunk, "config", None)
        if isinstance(config, TransformerConfig) and (spec := carried_spec(config)) is not None:
            return spec
    return None
