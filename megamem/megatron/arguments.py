"""Adds the --memory-* flags, and turns a parsed command line into a MemorySpec."""

import argparse
import dataclasses
import os

from megatron.training.argument_utils import ArgumentGroupFactory

from megamem.checkpoint import SAVED, settings_of
from megamem.config import ConfigurationError, MemoryConfig, flag
from megamem.resolution import resolve
from megamem.spec import MemorySpec

GPUS_PER_NODE = 8
"""Assumed if the launcher does not set LOCAL_WORLD_SIZE."""


def add_memory_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add one flag for each field of MemoryConfig, with its docstring as help; returns the parser.

    It can be passed to Megatron's `parse_and_validate_args` as `extra_args_provider`. A second call
    changes nothing, so a script that adds the flags itself can also be run through the launcher.
    """
    if flag("memory_layers") not in parser._option_string_actions:
        ArgumentGroupFactory(MemoryConfig).build_group(parser, "memory")
    return parser


def spec_from_args(args: argparse.Namespace) -> MemorySpec | None:
    """The spec that the command line asks for, or None without --memory-layers.

    The arguments also get the settings of the memory layers, which Megatron then saves with every
    checkpoint.

    Args:
        args: the arguments of Megatron, validated by Megatron.

    Raises:
        ConfigurationError: the flags do not fit each other, the hidden size or the ranks.
    """
    if path := getattr(args, "yaml_cfg", None):
        raise yaml_error(path)
    config = MemoryConfig.from_args(args)
    if not config.enabled:
        return None
    spec = resolve(
        config,
        args.hidden_size,
        tensor_ranks=args.tensor_model_parallel_size,
        stage_ranks=args.world_size // args.pipeline_model_parallel_size,
        ranks_per_node=ranks_of_node(),
        number_bytes=args.params_dtype.itemsize,
        seed=args.seed,
        tokens_vary=tokens_vary(args),
        batch_tokens=args.global_batch_size * args.seq_length,
        microbatch_tokens=args.micro_batch_size
        * args.seq_length
        / (args.tensor_model_parallel_size * args.context_parallel_size),
        # Megatron's own collectives wait as long
        timeout_minutes=args.distributed_timeout_minutes,
        num_layers=args.num_layers,
        ffn_width=args.ffn_hidden_size,
    )
    setattr(args, SAVED, settings_of(spec))
    return spec


def ranks_of_node() -> int:
    """The number of ranks on this node, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", GPUS_PER_NODE))


def yaml_error(path: str) -> ConfigurationError:
    """The error of a run with memory layers whose settings are in a file, for --yaml-cfg PATH."""
    return ConfigurationError(
        f"--memory-layers does not work with --yaml-cfg {path}: Megatron then ignores all flags "
        "and builds no memory layers; write the settings of the file as flags."
    )


_made: tuple[argparse.Namespace, MemorySpec | None] | None = None


def run_spec(args: argparse.Namespace) -> MemorySpec | None:
    """The result of spec_from_args(), which is made once for the arguments of a run."""
    global _made
    if _made is None or _made[0] is not args:
        _made = (args, spec_from_args(args))
    return _made[1]


def tokens_vary(args: argparse.Namespace) -> bool:
    """Whether ranks that share a table may get sequences of different lengths."""
    ranks = MemoryConfig.from_args(args).asked_group_size
    wide = (ranks or 1) > args.tensor_model_parallel_size
    packs = ("variable_seq_lengths", "sft", "use_packed_sequence", "sequence_packing_scheduler")
    return wide and any(bool(getattr(args, name, None)) for name in packs)


def idle_flags(config: MemoryConfig) -> list[str]:
    """Flags that were given but have no effect, because --memory-layers was not."""
    default = MemoryConfig()
    return [
        flag(f.name)
        for f in dataclasses.fields(config)
        if not config.enabled and getattr(config, f.name) != getattr(default, f.name)
    ]
