"""What a memory group that is wider than the tensor-parallel group does not work with."""

import argparse

from megamem.spec import MemorySpec

REFUSED = (
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
)
"""Name in args, flag, reason."""


def group_problems(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence for every option that takes the tables for Megatron's own."""
    size = spec.layout.group_size
    if size == args.tensor_model_parallel_size:
        return []
    return [
        f"--memory-group-size {size} with --tensor-model-parallel-size "
        f"{args.tensor_model_parallel_size} does not work with {option}: {why}; drop it."
        for name, option, why in REFUSED
        if getattr(args, name, None)
    ]
