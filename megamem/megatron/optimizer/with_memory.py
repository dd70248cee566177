"""The tables' optimizer, built from Megatron's settings and joined to Megatron's own."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn

from megamem.megatron.model.carried_spec import spec_of_model
from megamem.megatron.optimizer.background import load_background
from megamem.megatron.optimizer.chain import ChainWithTables, TableMember, find_tables
from megamem.optimizer import StepOptions, TableOptimizer
from megamem.patching import replace
from megamem.spec import MemorySpec


def with_memory(
    optimizer: MegatronOptimizer,
    config: OptimizerConfig,
    chunks: list[nn.Module],
    args: argparse.Namespace | None = None,
) -> MegatronOptimizer:
    """Megatron's optimizer of the model and one of the tables, as one.

    Every rank must call this, with tables or without. What it returns takes the place of
    `optimizer` in all that follows: the schedule of learning rates, the training loop, saving and
    loading. Of a model without memories it is `optimizer` itself.

    Args:
        optimizer: of the rest of the model, as get_megatron_optimizer() returned it.
        config: what that was made with.
        chunks: the model on this rank, as Megatron's DistributedDataParallel wraps it.
        args: Megatron's, which say what checkpoint will be loaded. Only --memory-finetune-rows
            needs them: it looks for read counts there.
    """
    spec = spec_of_model(chunks)
    if spec is None:
        return optimizer
    tables = TableOptimizer(
        (found := find_tables(chunks)).values(),
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
    # where the loss is a sum over tokens, Megatron divides gradients by their number instead
    per_token = any(getattr(chunk.config, "calculate_per_token_loss", False) for chunk in chunks)
    member = TableMember(
        tables,
        config,
        data_ranks=1 if per_token else data_ranks,
        clip_apart=spec.clip_grad,
        loss_scale=optimizer.get_loss_scale,
        timeout=spec.timeout,
    )
    for chunk in chunks:
        replace(chunk, "scale_gradients", _with_tables_of(chunk))
    return ChainWithTables(member, optimizer)


def _reduces_in_fp32(chunks: list[nn.Module]) -> bool:
    configs: list[Any] = [chunk.ddp_config for chunk in chunks]
    return all(config.grad_reduce_in_fp32 for config in configs)


def table_group(config: OptimizerConfig, spec: MemorySpec) -> dict[str, Any]:
    """What Megatron's scheduler of learning rates and weight decay reads of a parameter group.

    A scheduled rate runs from --memory-lr to the same fraction of it that --min-lr is of --lr. A
    constant one is its own minimum, so that no decay style can lower it.
    """
    group: dict[str, Any] = {
        "lr_mult": 1.0,
        "wd_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        # Megatron logs the learning rate of the groups that say True here
        "default_config": False,
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
    """A chunk's scale_gradients() that also scales its tables' gradients, without touching them."""

    def with_tables(original: Callable[..., None]) -> Callable[..., None]:
        def scale_gradients(scaling_factor: float | torch.Tensor) -> None:
            original(scaling_factor)
            for table in find_tables([chunk]).values():
                assert table.gradient is not None
                table.gradient.scale(scaling_factor)

        return scale_gradients

    return with_tables
