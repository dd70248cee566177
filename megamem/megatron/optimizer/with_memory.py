"""Builds the optimizer of the tables and joins it to that of the model."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn

from megamem.config import ConfigurationError
from megamem.layers.tucker_keys import TuckerKeys
from megamem.layers.value_table import ValueTable
from megamem.megatron.model.carried_spec import spec_of_model
from megamem.megatron.model.fully_sharded import is_fully_sharded, refuse_sharded
from megamem.megatron.optimizer.background import load_background
from megamem.megatron.optimizer.chain import ChainWithTables, TableMember, find_tables
from megamem.megatron.optimizer.layer_gradients import sum_once_a_step
from megamem.megatron.optimizer.rate import decaying_factor
from megamem.optimizer import StepOptions, TableOptimizer
from megamem.patching import replace
from megamem.spec import MemorySpec


def with_memory(
    optimizer: MegatronOptimizer,
    config: OptimizerConfig,
    chunks: list[nn.Module],
    args: argparse.Namespace | None = None,
) -> MegatronOptimizer:
    """One optimizer for the model and the tables of its memory layers.

    All ranks must call this, also those without tables. Use the result in place of `optimizer` from
    then on: for the schedule of learning rates, the training loop, saving and loading. For a model
    without memory layers it is `optimizer` itself.

    Args:
        optimizer: the optimizer of the model, as get_megatron_optimizer() returned it.
        config: the settings that `optimizer` was made with.
        chunks: the model on this rank, as Megatron's DistributedDataParallel wraps it.
        args: Megatron's arguments, which name the checkpoint to load. Only --memory-finetune-rows
            needs them, for the read counts in that checkpoint.

    Raises:
        ConfigurationError: requires_grad is False for a table that would be trained, or FSDP2 was
            applied to a table.
    """
    spec = spec_of_model(chunks)
    if spec is None:
        return optimizer
    found = find_tables(chunks)
    refuse_frozen(found, config, spec)
    refuse_sharded(found)
    tables = TableOptimizer(
        found.values(),
        spec,
        StepOptions(
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            buffer_dtype=None if _reduces_in_fp32(chunks) else config.params_dtype,
            seed=spec.seed,
        ),
        **table_group(config, spec),
    )
    if args is not None:
        load_background(spec, args, found)
    data_ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    # FSDP2 averages over the ranks whatever the loss is, and Megatron does not scale its gradients
    fully_sharded = is_fully_sharded(chunks)
    # if the loss is a sum over tokens, Megatron divides gradients by the number of tokens instead
    per_token = not fully_sharded and any(
        getattr(chunk.config, "calculate_per_token_loss", False) for chunk in chunks
    )
    member = TableMember(
        tables,
        config,
        data_ranks=1 if per_token else data_ranks,
        separate_clip=spec.clip_grad,
        loss_scale=optimizer.get_loss_scale,
        timeout=spec.timeout,
    )
    for chunk in chunks if not fully_sharded else ():
        replace(chunk, "scale_gradients", _with_tables_of(chunk))
    modules = (module for chunk in chunks for module in chunk.modules())
    return ChainWithTables(
        member,
        optimizer,
        sum_once_a_step(chunks),
        keys=[module for module in modules if isinstance(module, TuckerKeys)],
        loads_in_place=fully_sharded,
    )


def refuse_frozen(
    tables: Mapping[str, ValueTable], config: OptimizerConfig, spec: MemorySpec
) -> None:
    """Raise a ConfigurationError if a table was frozen, but has a learning rate."""
    rate = config.lr if spec.lr == "model" else spec.lr
    frozen = [name for name, table in tables.items() if table.frozen]
    if frozen and rate:
        raise ConfigurationError(
            f"requires_grad was set to False for value table {', '.join(frozen)}, which would be "
            f"trained with a learning rate of {rate:g}; add --memory-lr 0, with which it stays as "
            "it is, or do not freeze it."
        )


def _reduces_in_fp32(chunks: list[nn.Module]) -> bool:
    if is_fully_sharded(chunks):
        # FSDP2 has no buffers and no choice of their dtype
        return True
    configs: list[Any] = [chunk.ddp_config for chunk in chunks]
    return all(config.grad_reduce_in_fp32 for config in configs)


def table_group(config: OptimizerConfig, spec: MemorySpec) -> dict[str, Any]:
    """The entries of a parameter group that Megatron's scheduler reads.

    A scheduled learning rate decays from --memory-lr to --memory-lr * (--min-lr / --lr). A constant
    one has itself as its minimum, so that no decay style lowers it. Either is multiplied by the
    factor of --memory-lr-times.
    """
    group: dict[str, Any] = {
        "lr_mult": 1.0,
        "wd_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        # Megatron logs the learning rate of groups for which this is True
        "default_config": False,
        **decaying_factor(spec),
    }
    if spec.lr != "model":
        floor = 1.0
        if spec.lr_schedule == "scheduled":
            floor = (config.min_lr or 0) / config.lr if config.lr else 0.0
        group |= {"max_lr": spec.lr, "min_lr": spec.lr * floor}
    if spec.weight_decay != "model":
        group |= {"start_wd": spec.weight_decay, "end_wd": spec.weight_decay}
    return group


def _with_tables_of(chunk: nn.Module) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The scale_gradients() of a chunk, which also scales the gradients of its tables, lazily."""

    def with_tables(original: Callable[..., None]) -> Callable[..., None]:
        def scale_gradients(scaling_factor: float | torch.Tensor) -> None:
            original(scaling_factor)
            for table in find_tables([chunk]).values():
                assert table.gradient is not None
                table.gradient.scale(scaling_factor)

        return scale_gradients

    return with_tables
