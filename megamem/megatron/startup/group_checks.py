"""Options that do not work if the memory group is not the tensor-parallel group."""

import argparse

from megamem.spec import MemorySpec

REFUSED = (
    (
        "log_params_norm",
        "--log-params-norm",
        "it assumes that tables are sharded over the tensor-parallel ranks",
    ),
    (
        "data_parallel_random_init",
        "--data-parallel-random-init",
        "it would overwrite the rows of all data-parallel ranks with those of one of them",
    ),
    (
        "check_weight_hash_across_dp_replicas_interval",
        "--check-weight-hash-across-dp-replicas-interval",
        "it compares data-parallel ranks, which hold different rows",
    ),
)
"""(name in args, flag, reason)."""


def group_problems(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence for each option that assumes another sharding of the tables."""
    size = spec.layout.group_size
    if size == args.tensor_model_parallel_size:
        return []
    return [
        f"--memory-group-size {size} with --tensor-model-parallel-size "
        f"{args.tensor_model_parallel_size} does not work with {option}: {why}; drop it."
        for name, option, why in REFUSED
        if getattr(args, name, None)
    ]
