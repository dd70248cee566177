"""The --memory-* flags, generated from MemoryConfig, and the way from a command line to a model."""

import argparse
import dataclasses

from megatron.training.argument_utils import ArgumentGroupFactory

from megamem.config import MemoryConfig, flag
from megamem.integration.layer_specs import MemorySettings

ATTRIBUTE = "megamem"
"""Where a TransformerConfig carries MemorySettings, and nothing where memory is off."""


def add_memory_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """One flag for each field of MemoryConfig, its docstring as help."""
    ArgumentGroupFactory(MemoryConfig).build_group(parser, "memory")
    return parser


def settings_from_args(args: argparse.Namespace) -> MemorySettings | None:
    """What the command line asks for, or None where memory is off.

    Raises:
        ConfigurationError: the flags cannot work with each other or with the hidden size.
    """
    memory = MemoryConfig.from_args(args)
    if not memory.enabled:
        return None
    return MemorySettings(memory=memory.resolve(args.hidden_size), seed=args.seed)


def idle_flags(memory: MemoryConfig) -> list[str]:
    """Flags that were given but do nothing, as no layer is to become a memory."""
    default = MemoryConfig()
    return [
        flag(f.name)
        for f in dataclasses.fields(memory)
        if not memory.enabled and getattr(memory, f.name) != getattr(default, f.name)
    ]
