"""Whether the ranks that a table is to be spread over exist, and can share it."""

import argparse

from megamem.config import MemoryConfig
from megamem.planner.traffic import mode_problem


def group_problems(args: argparse.Namespace, memory: MemoryConfig) -> list[str]:
    """A sentence for everything about --memory-group-size and --memory-mode that cannot work.

    Args:
        args: Megatron's, validated by Megatron.
        memory: with its layout.
    """
    size = memory.memory_group_size or args.tensor_model_parallel_size
    stage = args.world_size // args.pipeline_model_parallel_size
    if stage % size:
        fitting = [n for n in range(1, stage + 1) if stage % n == 0]
        return [
            f"--memory-group-size {size} does not divide the {stage} ranks of a pipeline stage "
            f"(tensor x context x data parallel); use one of {', '.join(map(str, fitting))}."
        ]
    assert memory.memory_mode != "auto"
    columns = memory.memory_column_ranks or 1
    problem = mode_problem(memory.memory_mode, memory.value_dim, size, columns)
    problems = [problem] if problem else []
    if size == args.tensor_model_parallel_size:
        return problems
    for name, option, why in (
        (
            "log_params_norm",
            "--log-params-norm",
            "it takes the table for spread over the tensor-parallel ranks",
        ),
        (
            "data_parallel_random_init",
            "--data-parallel-random-init",
            "it would copy one data-parallel rank's rows over the others'",
        ),
        (
            "check_weight_hash_across_dp_replicas_interval",
            "--check-weight-hash-across-dp-replicas-interval",
            "data-parallel ranks hold different rows",
        ),
    ):
        if getattr(args, name, None):
            problems.append(
                f"--memory-group-size {size} with --tensor-model-parallel-size "
                f"{args.tensor_model_parallel_size} does not work with {option}: {why}; drop it."
            )
    return problems
