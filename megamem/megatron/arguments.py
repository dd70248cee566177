"""The --memory-* flags, generated from MemoryConfig, and the way from a command line to a model."""

import argparse
import dataclasses
import os
from datetime import timedelta

import torch
from megatron.training.argument_utils import ArgumentGroupFactory

from megamem.config import MemoryConfig, flag
from megamem.megatron.model.layer_specs import MemorySettings
from megamem.planner import choose_mode

GPUS_PER_NODE = 8
"""Where the launcher does not say."""

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
    memory = with_layout(memory.resolve(args.hidden_size), args)
    return MemorySettings(
        memory=memory, seed=args.seed, tokens_vary=tokens_vary(args), timeout=timeout(args)
    )


def with_layout(memory: MemoryConfig, args: argparse.Namespace) -> MemoryConfig:
    """The same settings with a group size, and a mode and column ranks in place of auto."""
    tensor_ranks = args.tensor_model_parallel_size
    size = memory.memory_group_size or tensor_ranks
    mode, columns = memory.memory_mode, memory.memory_column_ranks
    if mode == "auto":
        choice = choose_mode(
            memory.value_dim,
            memory.lookups_per_token,
            size,
            ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", GPUS_PER_NODE)),
            wire=memory.memory_wire,
            e=2 if args.params_dtype != torch.float32 else 4,
        )
        mode, columns = choice.mode, choice.column_ranks if choice.mode == "2d" else None
    elif mode == "2d":
        columns = columns or min(tensor_ranks, size)
    return dataclasses.replace(
        memory, memory_mode=mode, memory_group_size=size, memory_column_ranks=columns
    )


def tokens_vary(args: argparse.Namespace) -> bool:
    """Whether ranks of different data may bring sequences of different lengths."""
    wide = (args.memory_group_size or 1) > args.tensor_model_parallel_size
    packs = ("variable_seq_lengths", "sft", "use_packed_sequence", "sequence_packing_scheduler")
    return wide and any(bool(getattr(args, name, None)) for name in packs)


def timeout(args: argparse.Namespace) -> timedelta:
    """How long a collective may wait for a rank: as long as Megatron's own."""
    return timedelta(minutes=args.distributed_timeout_minutes)


def idle_flags(memory: MemoryConfig) -> list[str]:
    """Flags that were given but do nothing, as no layer is to become a memory."""
    default = MemoryConfig()
    return [
        flag(f.name)
        for f in dataclasses.fields(memory)
        if not memory.enabled and getattr(memory, f.name) != getattr(default, f.name)
    ]
