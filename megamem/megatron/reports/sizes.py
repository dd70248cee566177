"""What a run says about itself: parameters with the table, FLOPs without it."""

import argparse
import copy
from collections.abc import Callable
from typing import Any

from megamem.layers.variants import variant_of
from megamem.megatron import compat
from megamem.planner.sizes import memory_flops_per_token as layer_flops_per_token
from megamem.planner.sizes import table_parameters
from megamem.spec import MemorySpec


def with_memory_flops(
    count: Callable[..., float],
    spec: MemorySpec,
    args: argparse.Namespace,
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
    added = len(spec.layers) * layer_flops_per_token(spec) * tokens
    if spec.keep_ffn:
        return whole + added

    feed_forwards = compat.feed_forwards(args)
    replaced = 0.0
    for kind in ("dense", "experts"):
        layers = [n for n, its_kind in enumerate(feed_forwards) if its_kind == kind]
        gone = sum(layer in layers for layer in spec.layers)
        if gone:
            bare = count(compat.without_ffn(args, kind), batch_size, *rest, **more)
            replaced += (whole - bare) * gone / len(layers)
    return whole - replaced + added


def summary(spec: MemorySpec) -> str:
    """One line about the memory layers of a run, for its log."""
    layers = ", ".join(map(str, spec.layers))
    names, shared = [use.name for use in variant_of(spec).tables], spec.pool == "shared"
    tables = "one shared table" if shared else "a table each"
    if len(names) > 1:
        listed = ", ".join(names)
        tables = (
            f"{len(names)} shared tables ({listed})"
            if shared
            else f"{len(names)} tables ({listed}) each"
        )
    numbers, ranks = table_parameters(spec), spec.layout.group_size
    keys = spec.heads * spec.num_keys * spec.key_dim
    share = f", {_si(numbers / ranks)} on each of {ranks} ranks" if ranks > 1 else ""
    return (
        f"megamem: layers {layers} are {spec.variant}: {spec.heads} heads x {spec.topk} rows, "
        f"{tables} of {spec.num_rows:,} x {spec.value_dim} = {_si(numbers)} parameters{share}; "
        f"sub-keys {_si(keys)} a layer; {_si(layer_flops_per_token(spec))}FLOP per token and layer"
    )


def _si(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g} "
