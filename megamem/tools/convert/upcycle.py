"""Adds memory layers to a dense Megatron checkpoint."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megamem.checkpoint import settings_of, table_key
from megamem.config import ConfigurationError, MemoryConfig
from megamem.layers.init import WeightFactory
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.layers.value_table import initial_rows
from megamem.layers.variants import VARIANTS, pool_names
from megamem.parallel.row_shard import TableShard
from megamem.resolution import resolve
from megamem.spec import Layout, MemorySpec
from megamem.tools.convert import layout
from megamem.tools.convert.lazy import REGION_BYTES, LazyTensor, Region, Tensors, of_tensor

EXPERTS = ("mlp.experts", "mlp.router", "mlp.shared_experts")


def upcycle(
    source: Tensors, config: MemoryConfig, seed: int
) -> tuple[dict[str, LazyTensor], list[str], dict[str, Any]]:
    """Add memory layers to a dense model, with the initial weights of a run with this seed.

    With `memory_keep_ffn` the new layers start by adding zero, so that the model's output does not
    change: memory+, ultramem and ultramem-v2 have a projection of zeros, memory a table of zeros,
    peer a table v of zeros.
    Where memory layers replace feed-forwards, the loss increases.

    Args:
        source: key -> tensor of the dense checkpoint.
        config: settings of the memory layers.
        seed: seed of the new weights.

    Returns:
        key -> tensor, the keys of extra state, and the settings of the memory layers.

    Raises:
        ConfigurationError: the checkpoint is not a dense GPT, or does not have these layers.
    """
    source = layout.weights_only(source)
    _check_dense(source)
    try:
        dense = layout.dense_layers(source)
    except ValueError as error:
        raise ConfigurationError(f"the checkpoint is not a complete GPT: {error}.") from error
    embedding = source[layout.EMBEDDING]
    hidden = embedding.shape[1]
    variant, ffn = VARIANTS[config.memory_variant], dense.per_layer[0].get(layout.FC2)
    spec = resolve(
        config,
        hidden,
        seed=seed,
        num_layers=dense.num_layers,
        ffn_width=ffn.shape[1] if ffn else None,
    )
    _check_layers(dense, spec)
    if spec.keep_ffn and not variant.silent_output:
        spec = replace(spec, value_init_std=0.0)

    tensors = dict(dense.others)
    for layer, rest in dense.per_layer.items():
        if layer in spec.layers:
            rest = layout.memory_in_place_of_ffn(rest, spec.keep_ffn)
        tensors |= {layout.layer_key(layer, name): tensor for name, tensor in rest.items()}
    for layer in spec.layers:
        tensors |= _new_layer(layer, spec, embedding.dtype)
    for pool in pool_names(spec):
        for use in variant.tables:
            name, std = variant.table_name(pool, use), variant.init_std(spec, use)
            width = variant.table_width(spec, use)
            tensors[table_key(name)] = initial_table(name, width, std, spec, embedding.dtype)
            tensors |= layout.placement_of(name, spec.placement_seed)
    objects = layout.extra_states(dense.num_layers, spec.layers, spec.keep_ffn)
    return tensors, objects, settings_of(spec)


def _check_dense(source: Tensors) -> None:
    if tables := layout.tables(source):
        raise ConfigurationError(
            f"the checkpoint already has memory layers ({', '.join(tables.values())}); give "
            "megamem convert upcycle a dense one."
        )
    for name in EXPERTS:
        if any(f".{name}" in key for key in source):
            raise ConfigurationError(
                f"the checkpoint has {name}; give megamem convert upcycle a dense one."
            )
    if layout.EMBEDDING not in source:
        raise ConfigurationError(f"the checkpoint has no {layout.EMBEDDING}, so it is not a GPT.")


def _check_layers(dense: layout.DenseLayers, spec: MemorySpec) -> None:
    last = dense.num_layers - 1
    if not spec.layers:
        raise ConfigurationError(
            "there are no memory layers to add; name them with --memory-layers."
        )
    if beyond := [layer for layer in spec.layers if layer > last]:
        raise ConfigurationError(
            f"--memory-layers {' '.join(map(str, beyond))} is beyond the checkpoint's layers; use "
            f"0 to {last}."
        )


def _new_layer(layer: int, spec: MemorySpec, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """A memory layer's own weights, as a run with this seed initialises them."""
    pool = MemoryPool(replace(spec, layout=Layout()), device="meta")
    module = MemoryLayer(spec, pool, layer=layer, device="cpu", dtype=dtype)
    weights: dict[str, Tensor] = dict(module.state_dict())
    if spec.keep_ffn:
        for name in VARIANTS[spec.variant].silent_output:
            weights[f"output.{name}"] = torch.zeros_like(weights[f"output.{name}"])
    return {layout.memory_key(layer, name): of_tensor(weight) for name, weight in weights.items()}


def initial_table(
    name: str, width: int, std: float, spec: MemorySpec, dtype: torch.dtype
) -> LazyTensor:
    """The initial table of a run with these settings, drawn shard by shard."""
    shape = (spec.num_rows, width)
    count = max(1, -(-shape[0] * shape[1] * dtype.itemsize // REGION_BYTES))
    shards = [TableShard.cut(shape, row=(number, count)) for number in range(count)]
    by_offset = {shard.offset: shard for shard in shards}
    make = WeightFactory(seed=spec.seed, name=name, device="cpu", dtype=dtype)

    def rows(region: Region) -> Tensor:
        shard = by_offset[region.offsets[0], region.offsets[1]]
        return initial_rows(spec, std, make, shard).detach()

    regions = tuple(Region(shard.offset, shard.shape) for shard in shards)
    return LazyTensor(shape, dtype, regions, rows)
