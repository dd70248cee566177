"""Where megamem enters Megatron: eleven functions replaced at run time, none of its files changed.

At start, by install():

    add_megatron_arguments             the --memory-* flags
    validate_args                      what cannot work is refused, the rest is installed
    core_transformer_config_from_args  the spec travels to the model

Once the flags are known and name memory layers, by install_memory():

    GPTModel.__init__                  layer specs get memories, the model gets their tables
    HybridModel.__init__               the same where a pattern gives each feed-forward a layer
    get_megatron_optimizer             the tables' own optimizer joins Megatron's
    DistributedDataParallel
      .scale_gradients                 the tables' gradients are scaled with the model's
    num_floating_point_operations      memories counted in place of feed-forwards
    setup_model_and_optimizer          the flags are compared between ranks, and with the checkpoint
    train_step                         a table that is not finite is named when a batch is skipped
    training_log                       what memories did is logged beside the loss

A spec slot or a documented hook would be better, and there is none: pretrain_gpt.py passes its own
extra_args_provider, and a `--spec` can add no flags.

Without --memory-layers, setup_model_and_optimizer refuses a checkpoint that holds memories, and
nothing else is replaced once the flags are known.
"""

import argparse
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.training import arguments, training
from megatron.training.global_vars import get_args

from megamem.checkpoint import TABLES
from megamem.config import ConfigurationError, MemoryConfig
from megamem.errors import friendly_parser
from megamem.megatron import compat
from megamem.megatron.arguments import (
    ATTRIBUTE,
    add_memory_flags,
    idle_flags,
    run_spec,
    spec_of_model,
)
from megamem.megatron.model.hybrid import memory_stack_spec
from megamem.megatron.model.layer_specs import memory_layer_spec
from megamem.megatron.model.memory_mlp import ValueTables
from megamem.megatron.optimizer.background import load_background
from megamem.megatron.optimizer.chain import find_tables
from megamem.megatron.optimizer.with_memory import scale_tables, with_memory
from megamem.megatron.reports import sizes
from megamem.megatron.reports.broken_tables import report_broken
from megamem.megatron.reports.tensorboard import TrainingMetrics
from megamem.megatron.startup import checks
from megamem.megatron.startup.rank_consistency import broadcast_from_rank0, differing_flags
from megamem.megatron.startup.saved_model import checkpoint_problems
from megamem.patching import replace, replace_everywhere

logger = logging.getLogger("megamem")


def install() -> None:
    """Replace the functions named above, once; a second call changes nothing.

    Raises:
        MissingSymbolError: this release of Megatron has one of them no longer.
    """
    replace_everywhere(arguments, "add_megatron_arguments", _add_flags)
    replace_everywhere(arguments, "validate_args", _validate)
    replace_everywhere(compat.CONFIG_ROOM, "core_transformer_config_from_args", _carry_spec)


def install_memory() -> None:
    """Replace what a run with memory layers needs; a second call changes nothing.

    Raises:
        MissingSymbolError: as of install().
    """
    replace(GPTModel, "__init__", _build_memories)
    if compat.HybridModel is not None:
        replace(compat.HybridModel, "__init__", _build_memories)
    replace(training, "get_megatron_optimizer", _add_table_optimizer)
    replace(DistributedDataParallel, "scale_gradients", _scale_tables)
    replace(training, "num_floating_point_operations", _count_flops)
    replace(training, "setup_model_and_optimizer", _compare_with_ranks_and_checkpoint)
    replace(training, "train_step", _name_broken_tables)
    # training_log is not told of the model, so what is set up has to be remembered
    metrics = TrainingMetrics()
    replace(training, "setup_model_and_optimizer", metrics.watch)
    replace(training, "training_log", metrics.log)


def _add_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_memory_flags(friendly_parser(original(parser)))

    return add_megatron_arguments


def _validate(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate_args(args: argparse.Namespace, *rest: Any, **more: Any) -> Any:
        # a wrong flag of ours first: Megatron may stumble over its consequences
        MemoryConfig.from_args(args)
        args = original(args, *rest, **more) or args
        spec = run_spec(args)
        if spec is None:
            if idle := idle_flags(MemoryConfig.from_args(args)):
                logger.warning("%s without --memory-layers: memory is off", ", ".join(idle))
            replace(training, "setup_model_and_optimizer", _refuse_memories)
            return args
        install_memory()
        # layers differ, so a checkpoint must not stack them on one axis
        args.hetereogenous_dist_checkpoint = True
        checks.check(spec, args)
        return args

    return validate_args


def _carry_spec(original: Callable[..., Any]) -> Callable[..., Any]:
    def core_transformer_config_from_args(args: argparse.Namespace, *rest: Any, **more: Any) -> Any:
        config = original(args, *rest, **more)
        if getattr(args, "memory_layers", None):
            config.hetereogenous_dist_checkpoint = True
            setattr(config, ATTRIBUTE, run_spec(args))
        return config

    return core_transformer_config_from_args


def _build_memories(original: Callable[..., Any]) -> Callable[..., Any]:
    """GPTModel's layers, and those of a hybrid model, by the name of what describes them."""
    signature = inspect.signature(original)
    hybrid = "hybrid_stack_spec" in signature.parameters

    def __init__(self: MegatronModule, *rest: Any, **more: Any) -> None:
        bound = signature.bind(self, *rest, **more)
        bound.apply_defaults()
        given = bound.arguments
        config = given["config"]
        spec = getattr(config, ATTRIBUTE, None)
        if spec is None:
            return original(self, *rest, **more)
        groups = given["pg_collection"] or ProcessGroupCollection.use_mpu_process_groups()
        here = {"pg_collection": groups, "vp_stage": given["vp_stage"]}
        if hybrid:
            pattern = given["hybrid_layer_pattern"]
            given["hybrid_stack_spec"], pools = memory_stack_spec(
                config, given["hybrid_stack_spec"], spec, pattern, **here
            )
        else:
            given["transformer_layer_spec"], pools = memory_layer_spec(
                config, given["transformer_layer_spec"], spec, **here
            )
        original(*bound.args, **bound.kwargs)
        if pools:
            self.add_module(TABLES, ValueTables(config, pools))

    return __init__


def _add_table_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_megatron_optimizer(config: Any, chunks: Any, *rest: Any, **more: Any) -> Any:
        optimizer = original(config, chunks, *rest, **more)
        spec = spec_of_model(chunks)
        if spec is None:
            return optimizer
        optimizer = with_memory(optimizer, config, chunks, spec)
        load_background(spec, get_args(), find_tables(chunks))
        return optimizer

    return get_megatron_optimizer


def _scale_tables(original: Callable[..., Any]) -> Callable[..., Any]:
    def scale_gradients(self: Any, scaling_factor: Any) -> None:
        original(self, scaling_factor)
        scale_tables(self, scaling_factor)

    return scale_gradients


def _count_flops(original: Callable[..., Any]) -> Callable[..., Any]:
    def num_floating_point_operations(
        args: argparse.Namespace, batch_size: int, *rest: Any, **more: Any
    ) -> float:
        spec = run_spec(args)
        if spec is None:
            return original(args, batch_size, *rest, **more)
        return sizes.with_memory_flops(original, spec, args, batch_size, *rest, **more)

    return num_floating_point_operations


def _refuse_memories(original: Callable[..., Any]) -> Callable[..., Any]:
    """A run without memories does not load a checkpoint that holds some."""

    def setup_model_and_optimizer(*rest: Any, **more: Any) -> Any:
        args = get_args()
        # one looks for all: a launcher ends the others with it
        if not getattr(args, "memory_layers", None) and dist.get_rank() == 0:
            ConfigurationError.collect(checkpoint_problems(None, args))
        return original(*rest, **more)

    return setup_model_and_optimizer


def _compare_with_ranks_and_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    def setup_model_and_optimizer(*rest: Any, **more: Any) -> Any:
        args = get_args()
        spec = run_spec(args)
        if spec is None:
            return original(*rest, **more)
        ConfigurationError.collect(differing_flags(spec, args))
        # all raise together
        ConfigurationError.collect(broadcast_from_rank0(lambda: checkpoint_problems(spec, args)))
        if dist.get_rank() == 0:
            sys.stdout.write(f" > {sizes.summary(spec)}\n")
        return original(*rest, **more)

    return setup_model_and_optimizer


def _name_broken_tables(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def train_step(*rest: Any, **more: Any) -> Any:
        result = original(*rest, **more)
        # also where Megatron stops because the loss is not finite
        skipped = result[1]
        if skipped:
            report_broken(signature.bind(*rest, **more).arguments["model"])
        return result

    return train_step
