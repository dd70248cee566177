"""FLOPs of a run with memory layers, and a line for its log about the size of its tables."""

import argparse
import copy
from collections.abc import Callable
from typing import Any

from megamem.layers.variants import variant_of
from megamem.megatron import compat
from megamem.planner.sizes import memory_flops_per_token as layer_flops_per_token
from megamem.planner.sizes import table_parameters, table_widths
from megamem.spec import MemorySpec


def with_memory_flops(
    count: Callable[..., float],
    spec: MemorySpec,
    args: argparse.Namespace,
    batch_size: int,
    *rest: Any,
    tokens: float | None = None,
    **more: Any,
) -> float:
    """FLOPs of a global batch: Megatron's count, with memories in place of feed-forwards.

    The FLOPs of the replaced feed-forwards are the difference to Megatron's count for a model whose
    feed-forwards have width 0.

    Args:
        count: Megatron's num_floating_point_operations.
        spec: the spec of the run.
        args: Megatron's arguments.
        batch_size: number of sequences in a global batch.
        rest: further positional arguments of `count`.
        tokens: number of tokens of a global batch; by default what `count` is told, or that of
            complete sequences.
        more: further keyword arguments of `count`.
    """
    total = count(copy.copy(args), batch_size, *rest, **more)
    if tokens is None:
        # since 0.19 the fourth argument is the number of tokens of the batch that are not padding
        tokens = more.get("total_real_tokens_in_batch", rest[1] if len(rest) > 1 else None)
    if tokens is None:
        tokens = batch_size * args.seq_length
    added = len(spec.layers) * layer_flops_per_token(spec) * tokens
    if spec.keep_ffn:
        return total + added

    # layers of multi-token prediction have feed-forwards, too, but keep them
    model = compat.without_prediction(args)
    of_model = count(model, batch_size, *rest, **more)
    feed_forwards = compat.feed_forwards(args)
    replaced = 0.0
    for kind in ("dense", "experts"):
        layers = [n for n, its_kind in enumerate(feed_forwards) if its_kind == kind]
        gone = sum(layer in layers for layer in spec.layers)
        if gone:
            bare = count(compat.without_ffn(model, kind), batch_size, *rest, **more)
            replaced += (of_model - bare) * gone / len(layers)
    return total - replaced + added


def summary(spec: MemorySpec) -> str:
    """One line about the memory layers of a run for its log."""
    layers = ", ".join(map(str, spec.layers))
    names, shared = [use.name for use in variant_of(spec).tables], spec.pool == "shared"
    readers = "each" if spec.share_layers == 1 else f"for every {spec.share_layers} layers"
    tables = "one shared table" if shared else f"a table {readers}"
    if len(names) > 1:
        listed = ", ".join(names)
        tables = (
            f"{len(names)} shared tables ({listed})"
            if shared
            else f"{len(names)} tables ({listed}) {readers}"
        )
    numbers, ranks = table_parameters(spec), spec.layout.group_size
    heads = "1 head" if spec.heads == 1 else f"{spec.heads} heads"
    widths = " and ".join(map(str, dict.fromkeys(table_widths(spec))))
    keys = spec.heads * spec.keys_per_side * spec.key_dim * max(1, spec.tucker_rank)
    share = f", {_si(numbers / ranks)} on each of {ranks} ranks" if ranks > 1 else ""
    return (
        f"megamem: layers {layers} are {spec.variant}: {heads} x {spec.reads_per_head} rows, "
        f"{tables} of {spec.num_rows:,} x {widths} = {_si(numbers)} parameters{share}; "
        f"sub-keys {_si(keys)} a layer; {_si(layer_flops_per_token(spec))}FLOP per token and layer"
    )


def _si(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g} "
