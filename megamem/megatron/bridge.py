"""Memory layers in the training runs of Megatron-Bridge (0.6, with Megatron-Core 0.19).

    config = vanilla_gpt_pretrain_config()  # any recipe of a GPT or hybrid model
    memories = add_memory_layers(config, MemoryConfig(memory_layers=[4, 12, 20]))
    pretrain(config, forward_step, callbacks=[memories])

The loop, the optimizer of the model, the schedule and the checkpoints are those of Megatron-Bridge.
What it offers for extensions is used where it can be: `provide` of the optimizer's settings, and
callbacks. Replaced once a run has memory layers, with no effect on models without:

    GPTModel.__init__, HybridModel.__init__     memories enter the layer specs of every provider
                                                and builder, tables are registered
    checkpointing.generate_state_dict           a checkpoint says which memory layers it holds
    flop_utils.num_floating_point_operations    memories are counted in place of feed-forwards
    calc_params_l2_norm, broadcast_params,      tables, which differ between data-parallel ranks,
    check_param_hashes_across_dp_replicas       are left to their own groups
"""

import argparse
import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

try:
    from megatron.bridge.data.base import DataloaderConfig
    from megatron.bridge.models.gpt.gpt_builder import GPTModelConfig
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.models.hybrid.hybrid_builder import HybridModelConfig
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
    from megatron.bridge.training import checkpointing, train
    from megatron.bridge.training.callbacks import Callback, CallbackContext
    from megatron.bridge.training.config import ConfigContainer, GPTDatasetConfig
    from megatron.bridge.training.utils import flop_utils
    from megatron.bridge.utils.common_utils import get_world_size_safe
except ImportError as error:
    raise ImportError(
        f"memory layers for Megatron-Bridge need its release 0.6, which cannot be imported: {error}"
    ) from error

from megamem.checkpoint import SAVED, settings_of
from megamem.config import ConfigurationError, MemoryConfig
from megamem.megatron.arguments import spec_from_args
from megamem.megatron.model.build import install_memories
from megamem.megatron.model.carried_spec import carried_spec, carry_later, spec_of_model
from megamem.megatron.model.hidden_tables import compares_replicas, norm_of_all, without_tables
from megamem.megatron.optimizer.with_memory import with_memory
from megamem.megatron.reports.broken_tables import report_broken
from megamem.megatron.reports.sizes import with_memory_flops
from megamem.megatron.reports.tensorboard import TrainingMetrics
from megamem.megatron.startup.begin import begin
from megamem.megatron.startup.checks import check
from megamem.patching import replace
from megamem.spec import MemorySpec


def add_memory_layers(config: ConfigContainer, memory: MemoryConfig) -> "MemoryCallback":
    """Let Megatron-Bridge train a model with memory layers in place of feed-forwards.

    The configuration may still be changed afterwards: it is read when the model is built. What
    cannot work is refused then, before anything is allocated.

    Args:
        config: the configuration of a GPT or a hybrid model; it is changed in place.
        memory: the memory layers, for example
            MemoryConfig(memory_layers=[4, 12, 20], memory_num_keys=1024).

    Returns:
        A callback for pretrain(..., callbacks=[...]), which reports how the memory is used to
        TensorBoard, wandb and the log, and names tables that are not finite. Training is the same
        without it.

    Raises:
        ConfigurationError: the model is neither a GPT nor a hybrid model of Megatron-Bridge, or
            has memory layers already. When the model is built: something cannot work.
    """
    models = (GPTModelProvider, HybridModelProvider, GPTModelConfig, HybridModelConfig)
    if not isinstance(config.model, models):
        raise ConfigurationError(
            f"memory layers need a GPT or hybrid model, but config.model is a "
            f"{type(config.model).__name__}; use a recipe of such a model."
        )
    if hasattr(config.optimizer, "provide") and _adds_tables(config.optimizer.provide):
        raise ConfigurationError("config has memory layers already; add them once.")
    if memory.enabled:
        _install()
        carry_later(transformer_of(config), partial(_begin, config, memory))
        make = getattr(config.optimizer, "provide", None)
        config.optimizer.provide = partial(_provide, config, make)
    return MemoryCallback()


def _install() -> None:
    """Replace the functions named above; a second call changes nothing."""
    install_memories()
    replace(checkpointing, "generate_state_dict", _with_settings)
    replace(flop_utils, "num_floating_point_operations", _count_flops)
    replace(train, "calc_params_l2_norm", norm_of_all)
    replace(train, "check_param_hashes_across_dp_replicas", compares_replicas)
    replace(DistributedDataParallel, "broadcast_params", without_tables)


def transformer_of(config: ConfigContainer) -> Any:
    """Megatron-Core's config of the model, which a provider is itself."""
    return getattr(config.model, "transformer", config.model)


def _begin(config: ConfigContainer, memory: MemoryConfig) -> MemorySpec:
    """The spec of a run, once everything that cannot work has been refused; all ranks call it."""
    args = arguments_of(config, memory)
    spec = spec_from_args(args)
    assert spec is not None
    ConfigurationError.collect(own_problems(config))
    check(spec, args)
    begin(spec, args)
    return spec


def own_problems(config: ConfigContainer) -> list[str]:
    """A sentence for each thing of Megatron-Bridge that memory layers do not work with."""
    found = []
    if config.dist.use_decentralized_pg:
        found.append(
            "config.dist.use_decentralized_pg is True, but the optimizer of the value tables takes "
            "its groups from Megatron-Core's parallel state; set it to False."
        )
    if config.dist.use_torch_fsdp2:
        found.append(
            "config.dist.use_torch_fsdp2 is True, but value tables are left out of FSDP2 in "
            "Megatron-LM's training only; set it to False, and use the distributed optimizer."
        )
    if config.peft is not None:
        found.append(
            f"config.peft is a {type(config.peft).__name__}, which freezes the value tables and "
            "has no adapters for memory layers; set it to None, or use memory_finetune_rows."
        )
    if config.checkpoint.also_save_hf_checkpoint:
        found.append(
            "config.checkpoint.also_save_hf_checkpoint is True, but no Hugging Face model has "
            "memory layers; set it to False, and use megamem convert export."
        )
    return found


def _adds_tables(provide: Any) -> bool:
    return getattr(provide, "func", None) is _provide


def _provide(
    config: ConfigContainer, make: Callable[..., Any] | None, *, model_chunks: Any, **how: Any
) -> MegatronOptimizer:
    """The optimizer of the model and its tables, for `provide` of the optimizer's settings."""
    settings = config.optimizer
    make = make or partial(get_megatron_optimizer, settings)
    optimizer = make(model_chunks=model_chunks, **how)
    return with_memory(optimizer, settings, model_chunks, arguments_of(config))


def _with_settings(original: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint holds the settings of its memory layers beside its tensors."""

    def generate_state_dict(ckpt_cfg: Any, model: Any, *rest: Any, **more: Any) -> dict[str, Any]:
        state: dict[str, Any] = original(ckpt_cfg, model, *rest, **more)
        is_loading = bool((more.get("optim_sd_kwargs") or {}).get("is_loading"))
        if not is_loading and (spec := spec_of_model(model)) is not None:
            state[SAVED] = settings_of(spec)
        return state

    return generate_state_dict


def _count_flops(original: Callable[..., Any]) -> Callable[..., Any]:
    def num_floating_point_operations(
        cfg: ConfigContainer, batch_size: int = 1, **more: Any
    ) -> float:
        spec = carried_spec(transformer_of(cfg))
        if spec is None:
            return original(cfg, batch_size=batch_size, **more)
        count = partial(_count_for, original, cfg)
        tokens = more.get("seqlen_sum")
        if tokens is None:
            tokens = batch_size * cfg.model.seq_length
        args = arguments_of(cfg)
        return with_memory_flops(count, spec, args, batch_size, tokens=tokens, **more)

    return num_floating_point_operations


SIZES = (
    *("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
    *("moe_latent_size", "mtp_num_layers"),
)
"""What with_memory_flops() changes in the arguments of a model."""


def _count_for(
    original: Callable[..., float],
    config: ConfigContainer,
    args: argparse.Namespace,
    batch_size: int,
    **more: Any,
) -> float:
    """The FLOPs of the model that `args` describes, which differs from the run's in SIZES only."""
    changed = copy.copy(config)
    changed.model = copy.copy(config.model)
    if changed.model is not transformer_of(changed):
        changed.model.transformer = copy.copy(changed.model.transformer)
    for name in SIZES:
        if hasattr(transformer_of(changed), name):
            setattr(transformer_of(changed), name, getattr(args, name))
    if hasattr(changed.model, "hybrid_layer_pattern"):
        changed.model.hybrid_layer_pattern = args.hybrid_layer_pattern
    return original(changed, batch_size=batch_size, **more)


def arguments_of(config: ConfigContainer, memory: MemoryConfig | None = None) -> argparse.Namespace:
    """The configuration as Megatron's arguments, by which megamem refuses runs.

    Args:
        config: the configuration of the run, finalized by Megatron-Bridge.
        memory: the memory layers.
    """
    transformer, checkpoint = transformer_of(config), config.checkpoint
    parts = (
        *(config.rng, config.logger, config.scheduler, config.train, checkpoint, config.dist),
        *(config.ddp, config.optimizer, transformer, config.model, memory),
    )
    found = {name: value for part in parts for name, value in _fields(part)}
    found |= {
        "world_size": get_world_size_safe(),
        "num_experts": transformer.num_moe_experts,
        "use_megatron_fsdp": config.dist.use_megatron_fsdp or config.ddp.use_megatron_fsdp,
        "no_load_optim": not checkpoint.load_optim,
        "seed": config.rng.seed,
        # sequences of finetuning are as long as the longest of a microbatch
        "sft": not isinstance(config.dataset, GPTDatasetConfig),
        "hybrid_layer_pattern": getattr(config.model, "hybrid_layer_pattern", None),
    }
    return argparse.Namespace(**found | _data_arguments(config.dataset) | _load_arguments(found))


def _fields(part: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(part) if part is not None else ():
        yield field.name, getattr(part, field.name)


def _data_arguments(dataset: DataloaderConfig) -> dict[str, Any]:
    """The flags that name datasets."""
    blend = getattr(dataset, "blend", None)
    # a weight before each prefix
    words = [word for prefix in blend[0] for word in ("1", prefix)] if blend else None
    names = ("data_args_path", "per_split_data_args_path")
    splits = (f"{split}_data_path" for split in ("train", "valid", "test"))
    return {**dict.fromkeys((*names, *splits)), "data_path": words, "mock_data": not blend}


def _load_arguments(found: dict[str, Any]) -> dict[str, Any]:
    """--load, or --pretrained-checkpoint, and --ckpt-step, for the folder of one iteration."""
    name = "load" if found["load"] else "pretrained_checkpoint"
    folder = Path(found[name] or "")
    if (iteration := re.fullmatch(r"iter_(\d+)", folder.name)) is None:
        return {}
    return {name: str(folder.parent), "ckpt_step": int(iteration[1])}


class MemoryCallback(Callback):
    """Reports how the memory of a run is used; without memory layers it does nothing."""

    def __init__(self) -> None:
        self.metrics = TrainingMetrics()

    def on_train_start(self, context: CallbackContext) -> None:
        """Start to measure, if there is something to write to."""
        spec, state = spec_of_model(context.model), context.state
        if spec is not None:
            self.metrics.find_writers = lambda: (state.tensorboard_logger, state.wandb_logger)
            self.metrics.attach(context.model, context.optimizer, spec, arguments_of(state.cfg))

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Report a step, and name the tables that are not finite if it was skipped."""
        if context.skipped_iter:
            report_broken(context.model)
        # Megatron-Bridge counts the step after this
        iteration = context.state.train_state.step + 1
        self.metrics.report(context.state.cfg.logger, iteration)
