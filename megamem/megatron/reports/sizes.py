"""What a run says about itself: parameters with the table, FLOPs without it."""

import argparse
import copy
from collections.abc import Callable
from typing import Any

from megamem.config import MemoryConfig
from megamem.megatron import compat
from megamem.planner.sizes import memory_flops_per_token as layer_flops_per_token
from megamem.planner.sizes import table_parameters


def with_memory_flops(
    count: Callable[..., float],
    args: argparse.Namespace,
    memory: MemoryConfig,
    batch_size: int,
    *rest: Any,
    **more: Any,
) -> float:
    """Megatron's FLOPs of a global batch, memories counted in place of what they replaced.

    What they replaced is found by asking Megatron's own count for a model whose feed-forwards have
    no width.
    """
    whole = count(copy.copy(args), batch_size, *rest, **more)
    # the fourth argument, since 0.19, is how many tokens of the batch are real
    tokens = more.get("total_real_tokens_in_batch", rest[1] if len(rest) > 1 else None)
    if tokens is None:
        tokens = batch_size * args.seq_length
    added = len(memory.memory_layers) * layer_flops_per_token(memory, args.hidden_size) * tokens
    if memory.memory_keep_ffn:
        return whole + added

    feed_forwards = compat.feed_forwards(args)
    replaced = 0.0
    for kind in ("dense", "experts"):
        layers = [n for n, its_kind in enumerate(feed_forwards) if its_kind == kind]
        gone = sum(layer in layers for layer in memory.memory_layers)
        if gone:
            bare = count(compat.without_ffn(args, kind), batch_size, *rest, **more)
            replaced += (whole - bare) * gone / len(layers)
    return whole - replaced + added


def summary(memory: MemoryConfig, hidden_size: int, ranks: int) -> str:
    """One line about the memory layers of a run, for its log."""
    layers = ", ".join(map(str, sorted(memory.memory_layers)))
    shared, experts = memory.memory_pool == "shared", memory.memory_variant == "peer"
    tables = "one shared table" if shared else "a table each"
    if experts:
        tables = "two shared tables (u, v)" if shared else "two tables (u, v) each"
    numbers = table_parameters(memory)
    keys = memory.memory_heads * memory.memory_num_keys * memory.key_dim
    share = f", {_si(numbers / ranks)} on each of {ranks} ranks" if ranks > 1 else ""
    return (
        f"megamem: layers {layers} are {memory.memory_variant}: {memory.memory_heads} heads x "
        f"{memory.memory_topk} rows, {tables} of {memory.num_rows:,} x {memory.value_dim} = "
        f"{_si(numbers)} parameters{share}; sub-keys {_si(keys)} a layer; "
        f"{_si(layer_flops_per_token(memory, hidden_size))}FLOP per token and layer"
    )


def _si(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g} "
