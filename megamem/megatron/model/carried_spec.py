"""The MemorySpec of a model, which its TransformerConfig carries to all who are given the model."""

from collections.abc import Iterable

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megamem.spec import MemorySpec

ATTRIBUTE = "megamem"
"""Of the config; it has none where memory is off."""


def carry_spec(config: TransformerConfig, spec: MemorySpec) -> None:
    """Give the config of a model its spec."""
    setattr(config, ATTRIBUTE, spec)
    # layers differ, so a checkpoint must not stack them on one axis
    config.hetereogenous_dist_checkpoint = True


def carried_spec(config: TransformerConfig) -> MemorySpec | None:
    """The spec that a config carries, or None without memories."""
    return getattr(config, ATTRIBUTE, None)


def spec_of_model(chunks: Iterable[nn.Module]) -> MemorySpec | None:
    """The spec that the chunks of a model were built with, or None without memories."""
    for chunk in chunks:
        config = getattr(chunk, "config", None)
        if isinstance(config, TransformerConfig) and (spec := carried_spec(config)) is not None:
            return spec
    return None
