"""The tables' optimizer, built from Megatron's settings and joined to Megatron's own."""

import argparse
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn

from megamem.config import MemoryConfig
from megamem.megatron.arguments import timeout
from megamem.megatron.optimizer.background import load_background
from megamem.megatron.optimizer.chain import ChainWithTables, TableMember, find_tables
from megamem.optimizer import StepOptions, TableOptimizer


def with_tables(
    model_optimizer: MegatronOptimizer,
    config: OptimizerConfig,
    chunks: list[nn.Module],
    args: argparse.Namespace,
    memory: MemoryConfig,
) -> MegatronOptimizer:
    """Megatron's optimizer of the model and one of the tables, as one.

    Every rank must call this, with tables or without.
    """
    tables = TableOptimizer(
        found := find_tables(chunks),
        memory,
        StepOptions(
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            buffer_dtype=None if args.accumulate_allreduce_grads_in_fp32 else config.params_dtype,
            seed=args.seed,
        ),
        **table_group(args, memory),
    )
    load_background(found, args, memory)
    data_ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    member = TableMember(
        tables,
        config,
        data_ranks=1 if args.calculate_per_token_loss else data_ranks,
        clip_apart=memory.memory_clip_grad,
        loss_scale=model_optimizer.get_loss_scale,
        timeout=timeout(args),
    )
    return ChainWithTables(member, model_optimizer)


def table_group(args: argparse.Namespace, memory: MemoryConfig) -> dict[str, Any]:
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
    if memory.memory_lr is not None:
        floor = 1.0
        if memory.memory_lr_schedule == "scheduled":
            floor = (args.min_lr or 0) / args.lr if args.lr else 0.0
        group |= {"max_lr": memory.memory_lr, "min_lr": memory.memory_lr * floor}
    if memory.memory_weight_decay is not None:
        group |= {
            "start_wd": memory.memory_weight_decay,
            "end_wd": memory.memory_weight_decay,
        }
    return group


def scale_tables(chunk: nn.Module, factor: float | torch.Tensor) -> None:
    """Scale the gradients of a model chunk's tables, without touching them."""
    for table in find_tables([chunk]).values():
        assert table.gradient is not None
        table.gradient.scale(factor)
