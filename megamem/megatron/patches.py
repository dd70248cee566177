"""Replaces functions of Megatron at run time, for training scripts that are not changed.

A script of your own calls the same functions of megamem by name, as examples/own_script.py does. In
brackets is what Megatron would need to offer to make a replacement unnecessary.

Replaced at start, by install():

    add_megatron_arguments             the --memory-* flags
                                       (a flag that names a module with an extra_args_provider)
    load_yaml                          --yaml-cfg, which drops all flags, is refused beside memories
                                       (flags of plugins in that file)
    validate_args                      wrong flags are refused, install_memory() is called
                                       (a list of functions to call with the validated arguments)
    core_transformer_config_from_args  the config of the model gets the spec
                                       (a field for extensions in TransformerConfig)
    load_args_from_checkpoint          --use-checkpoint-args takes memory settings, too
                                       (a list of further arguments to take)
    load_checkpoint                    a checkpoint of another model is refused
                                       (a callback with the arguments in the checkpoint)

Replaced once --memory-layers has been read, by install_memory():

    GPTModel.__init__                  memories enter the layer specs, tables are registered
                                       (a flag for model_config_cls of gpt_config_from_args, 0.19)
    HybridModel.__init__               the same for models with --hybrid-layer-pattern
                                       (the same for hybrid_config_from_args)
    fully_shard of torch               FSDP2 leaves the tables alone
                                       (its argument for ignored parameters)
    to_local_if_dtensor                with torch 2.15, state of weights of FSDP2 can be saved
                                       (a lookup that does not depend on the identity of a tensor)
    get_megatron_optimizer             the optimizer of the tables joins that of the model
                                       (a function for optimizers in PretrainConfigContainer);
                                       in 0.17 get_megatron_muon_optimizer, too
    num_floating_point_operations      memories are counted in place of feed-forwards
                                       (a method of ModelConfig)
    setup_model_and_optimizer          flags are compared between ranks and with the checkpoint
                                       (a callback before the model is built, and one after);
                                       all ranks get the choices of one tuning file
    train_step                         tables that are not finite are named if a batch is skipped
                                       (a callback after a step)
    training_log                       statistics of the memories are logged beside the loss
                                       (a callback when Megatron logs)
    calc_params_l2_norm                each row of a table is counted once
    broadcast_params of DDP            tables, which differ between ranks, are left out
    check_param_hashes_across_dp_...   a table is compared with its own replicas
                                       (for all three: a mark of parameters with groups of their
                                       own)
    run_engine of StaticInference...   replicas that share a table generate together
    __init__ of DynamicInference...    refused where replicas share a table
                                       (for both: a callback before and after a step)

Without --memory-layers, setup_model_and_optimizer refuses a checkpoint that holds memories, and
nothing else is replaced once the flags are known.
"""

import argparse
import contextlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import check_is_distributed_checkpoint
from megatron.core.distributed import DistributedDataParallel
from megatron.training import arguments, checkpointing, training, yaml_arguments
from megatron.training.global_vars import get_args
from megatron.training.utils import print_rank_0

from megamem.config import ConfigurationError, MemoryConfig, flag
from megamem.errors import friendly_parser
from megamem.megatron import compat
from megamem.megatron.arguments import add_memory_flags, idle_flags, run_spec, yaml_error
from megamem.megatron.generation import install_generation, name_longest
from megamem.megatron.model.build import install_memories
from megamem.megatron.model.carried_spec import carry_spec, spec_of_model
from megamem.megatron.model.fully_sharded import is_fully_sharded, keep_tables_out_of_fsdp2
from megamem.megatron.model.hidden_tables import compares_replicas, norm_of_all, without_tables
from megamem.megatron.optimizer.chain import find_tables
from megamem.megatron.optimizer.with_memory import with_memory
from megamem.megatron.reports import sizes
from megamem.megatron.reports.broken_tables import report_broken
from megamem.megatron.reports.tensorboard import TrainingMetrics
from megamem.megatron.startup import checks
from megamem.megatron.startup.begin import begin
from megamem.megatron.startup.rank_consistency import broadcast_from_rank0
from megamem.megatron.startup.saved_model import (
    checkpoint_problems,
    load_problems,
    loaded_checkpoint,
    local_problems,
    saved_common,
)
from megamem.patching import replace, replace_everywhere
from megamem.saved_settings import take_settings
from megamem.spec import MemorySpec

logger = logging.getLogger("megamem")


def install() -> None:
    """Replace the functions named above, once; a second call changes nothing.

    Raises:
        MissingSymbolError: this release of Megatron lacks one of them.
    """
    replace_everywhere(arguments, "add_megatron_arguments", _add_flags)
    replace_everywhere(yaml_arguments, "load_yaml", _refuse_yaml)
    replace_everywhere(arguments, "validate_args", _validate)
    replace_everywhere(compat.CONFIG_MODULE, "core_transformer_config_from_args", _carry_spec)
    replace_everywhere(checkpointing, "load_args_from_checkpoint", _take_settings)
    replace_everywhere(checkpointing, "load_checkpoint", _compare_with_checkpoint)


def install_memory() -> None:
    """Replace what a run with memory layers needs as well; a second call changes nothing.

    Raises:
        MissingSymbolError: this release of Megatron lacks one of them.
    """
    install_memories()
    keep_tables_out_of_fsdp2()
    replace(training, "get_megatron_optimizer", _add_table_optimizer)
    if compat.MAKES_MUON is not None:
        replace(training, compat.MAKES_MUON, _add_table_optimizer)
    replace(training, "num_floating_point_operations", _count_flops)
    replace(training, "setup_model_and_optimizer", _compare_with_ranks_and_checkpoint)
    replace(training, "train_step", _name_broken_tables)
    # training_log does not get the model, so it has to be remembered when it is set up
    metrics = TrainingMetrics()
    replace(training, "setup_model_and_optimizer", metrics.watch)
    replace(training, "training_log", metrics.log)
    replace(training, "calc_params_l2_norm", norm_of_all)
    replace(training, "check_param_hashes_across_dp_replicas", compares_replicas)
    replace(DistributedDataParallel, "broadcast_params", without_tables)
    install_generation()


def _add_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_memory_flags(friendly_parser(original(parser)))

    return add_megatron_arguments


def _refuse_yaml(original: Callable[..., Any]) -> Callable[..., Any]:
    """A file of settings, in whose place Megatron forgets the flags, must not ask for memories."""

    def load_yaml(path: str) -> Any:
        if flag("memory_layers") in {word.split("=", 1)[0] for word in sys.argv}:
            raise yaml_error(path)
        settings = original(path)
        if any(hasattr(part, "memory_layers") for part in (settings, *vars(settings).values())):
            raise yaml_error(path)
        return settings

    return load_yaml


def _validate(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate_args(args: argparse.Namespace, *rest: Any, **more: Any) -> Any:
        # memory flags come first, because Megatron may fail on the consequences of a wrong one
        MemoryConfig.from_args(args)
        args = original(args, *rest, **more) or args
        spec = run_spec(args)
        if spec is None:
            if idle := idle_flags(MemoryConfig.from_args(args)):
                logger.warning(
                    "without --memory-layers these flags have no effect: %s; add it, or drop them",
                    ", ".join(idle),
                )
            replace(training, "setup_model_and_optimizer", _refuse_memories)
            return args
        install_memory()
        name_longest(args)
        # the layers differ, so a checkpoint must not stack them along one axis
        args.hetereogenous_dist_checkpoint = True
        checks.check(spec, args)
        return args

    return validate_args


def _carry_spec(original: Callable[..., Any]) -> Callable[..., Any]:
    def core_transformer_config_from_args(args: argparse.Namespace, *rest: Any, **more: Any) -> Any:
        config = original(args, *rest, **more)
        if getattr(args, "memory_layers", None) and (spec := run_spec(args)) is not None:
            carry_spec(config, spec)
        return config

    return core_transformer_config_from_args


def _take_settings(original: Callable[..., Any]) -> Callable[..., Any]:
    """With --use-checkpoint-args, what memory layers compute comes from the checkpoint, too."""

    def load_args_from_checkpoint(
        args: argparse.Namespace, load_arg: str = "load", *rest: Any, **more: Any
    ) -> Any:
        result = original(args, load_arg, *rest, **more)
        given = loaded_checkpoint(args, (load_arg,))
        if given is not None and check_is_distributed_checkpoint(str(given.folder)):
            for setting in take_settings(args, saved_common(given.folder), str(given)):
                print_rank_0(f"Setting {setting} from checkpoint")
        return result

    return load_args_from_checkpoint


def _compare_with_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """However a checkpoint is loaded into a model, it must be one of that model."""
    signature = inspect.signature(original)

    def load_checkpoint(*rest: Any, **more: Any) -> Any:
        given = signature.bind(*rest, **more)
        given.apply_defaults()
        models = given.arguments["ddp_model"]
        chunks = models if isinstance(models, list) else [models]
        spec = spec_of_model(chunks)
        # the second is for where the first has no checkpoint
        options = (given.arguments["load_arg"], "pretrained_checkpoint")
        args = get_args()
        ConfigurationError.collect(broadcast_from_rank0(lambda: load_problems(spec, args, options)))
        context = given.arguments["checkpointing_context"] or {}
        with _comparing_local(context.get("local_checkpoint_manager"), spec, args):
            if spec is None or not is_fully_sharded(chunks):
                return original(*rest, **more)
            # tensors of FSDP2 are loaded in place; Megatron would then skip the number of steps
            given.arguments["skip_load_to_model_and_opt"] = False
            result = original(*given.args, **given.kwargs)
        for table in find_tables(chunks).values():
            table.loaded_in_place()
        return result

    return load_checkpoint


@contextlib.contextmanager
def _comparing_local(
    manager: Any, spec: MemorySpec | None, args: argparse.Namespace
) -> Iterator[None]:
    """Compare what the manager of --non-persistent-ckpt-type local loads, if there is one."""
    if manager is None:
        yield
        return
    original = manager.load

    def load() -> Any:
        state, name = original()
        # every rank has the same settings in its file, so all of them find the same
        ConfigurationError.collect(local_problems(state.common_state_dict, spec, args))
        return state, name

    manager.load = load
    try:
        yield
    finally:
        manager.load = original


def _add_table_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_megatron_optimizer(config: Any, chunks: Any, *rest: Any, **more: Any) -> Any:
        optimizer = original(config, chunks, *rest, **more)
        return with_memory(optimizer, config, chunks, get_args())

    return get_megatron_optimizer


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
    """A run without memory layers refuses a checkpoint that has some."""

    def setup_model_and_optimizer(*rest: Any, **more: Any) -> Any:
        args = get_args()
        # one rank checks for all of them: if it fails, the launcher ends the others
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
        begin(spec, args)
        return original(*rest, **more)

    return setup_model_and_optimizer


def _name_broken_tables(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def train_step(*rest: Any, **more: Any) -> Any:
        result = original(*rest, **more)
        # Megatron may also stop here because the loss is not finite
        skipped = result[1]
        if skipped:
            report_broken(signature.bind(*rest, **more).arguments["model"])
        return result

    return train_step
