"""A dense Megatron checkpoint with memory layers added: the start of a model that has them."""

from dataclasses import replace

import torch
from torch import Tensor

from megamem.checkpoint import SHARED, table_key
from megamem.config import ConfigurationError, MemoryConfig
from megamem.layers.expert_table import U, make_table, table_names
from megamem.layers.init import WeightFactory
from megamem.layers.memory import MemoryLayer
from megamem.ops import unplace_rows
from megamem.parallel.memory_group import MemoryGroup
from megamem.parallel.row_shard import TableShard
from megamem.tools.convert import layout
from megamem.tools.convert.lazy import REGION_BYTES, LazyTensor, Region, Tensors, of_tensor

EXPERTS = ("mlp.experts", "mlp.router", "mlp.shared_experts")


def upcycle(
    source: Tensors, memory: MemoryConfig, seed: int
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Give a dense model memory layers, with the initial weights that a run of this seed has.

    Where feed-forwards stay (`memory_keep_ffn`) the new layers start by adding zero, so that the
    model computes what it did: memory+ with a zero projection, memory with a table of zeros, peer
    with zeros for v. Where they are replaced it cannot, and the loss jumps.

    Args:
        source: key -> tensor of the dense checkpoint.
        memory: not resolved.
        seed: of the initial weights.

    Returns:
        key -> tensor, and the keys of extra state.

    Raises:
        ConfigurationError: the checkpoint is no dense GPT, or has no such layers.
    """
    source = layout.weights_only(source)
    _check_dense(source)
    try:
        dense = layout.dense_layers(source)
    except ValueError as error:
        raise ConfigurationError(f"the checkpoint is no whole GPT: {error}.") from error
    embedding = source[layout.EMBEDDING]
    memory = memory.resolve(embedding.shape[1])
    _check_layers(dense, memory)
    keep = memory.memory_keep_ffn
    zero_table = keep and memory.memory_variant != "memory+"
    if zero_table:
        memory = replace(memory, memory_value_init_std=0.0)

    tensors = dict(dense.others)
    for layer, rest in dense.per_layer.items():
        if layer in memory.memory_layers:
            rest = layout.memory_in_place_of_ffn(rest, keep)
        tensors |= {layout.layer_key(layer, name): tensor for name, tensor in rest.items()}
    for layer in memory.memory_layers:
        tensors |= _new_layer(layer, memory, embedding, seed, zero_output=keep)
    for name in table_names(memory):
        tensors[table_key(name)] = initial_table(name, memory, embedding.dtype, seed)
        tensors |= layout.placement_of(name, memory.memory_placement_seed)
    return tensors, layout.extra_states(dense.num_layers, memory.memory_layers, keep)


def _check_dense(source: Tensors) -> None:
    if tables := layout.tables(source):
        raise ConfigurationError(
            f"the checkpoint has memory layers already: {', '.join(tables.values())}; upcycle "
            "takes a dense one."
        )
    for name in EXPERTS:
        if any(f".{name}" in key for key in source):
            raise ConfigurationError(f"the checkpoint has {name}: upcycle takes a dense one.")
    if layout.EMBEDDING not in source:
        raise ConfigurationError(f"the checkpoint has no {layout.EMBEDDING}: it is no GPT.")


def _check_layers(dense: layout.DenseLayers, memory: MemoryConfig) -> None:
    last = dense.num_layers - 1
    if not memory.memory_layers:
        raise ConfigurationError("no layer to become a memory: name them with --memory-layers.")
    if beyond := [layer for layer in memory.memory_layers if layer > last]:
        raise ConfigurationError(
            f"--memory-layers {' '.join(map(str, beyond))}: the checkpoint has layers 0 to {last}."
        )


def _new_layer(
    layer: int, memory: MemoryConfig, like: LazyTensor, seed: int, zero_output: bool
) -> dict[str, LazyTensor]:
    """A memory layer's own weights, as a run of this seed would make them."""
    hidden = like.shape[1]
    make = WeightFactory(seed=seed, name=SHARED, device="meta", dtype=like.dtype)
    module = MemoryLayer(
        memory,
        hidden,
        make_table(memory, make, MemoryGroup()),
        layer=layer,
        group=None,
        tokens_sharded=True,
        seed=seed,
        device="cpu",
        dtype=like.dtype,
    )
    weights: dict[str, Tensor] = dict(module.state_dict())
    if zero_output:
        weights |= {
            name: torch.zeros_like(weight)
            for name, weight in weights.items()
            if name.startswith("output.proj.")
        }
    return {layout.memory_key(layer, name): of_tensor(weight) for name, weight in weights.items()}


def initial_table(name: str, memory: MemoryConfig, dtype: torch.dtype, seed: int) -> LazyTensor:
    """The table that a run of this seed starts with, drawn piece by piece."""
    shape = (memory.num_rows, memory.value_dim)
    pieces = max(1, -(-shape[0] * shape[1] * dtype.itemsize // REGION_BYTES))
    shards = [TableShard.cut(shape, row=(piece, pieces)) for piece in range(pieces)]
    by_offset = {shard.offset: shard for shard in shards}
    # an own standard deviation is that of v alone
    std = None if name.endswith(f".{U}") else memory.memory_value_init_std
    make = WeightFactory(seed=seed, name=name, device="cpu", dtype=dtype)

    def rows(region: Region) -> Tensor:
        shard = by_offset[region.offsets[0], region.offsets[1]]
        return make.normal(
            "values",
            *shard.shape,
            std=memory.value_dim**-0.5 if std is None else std,
            piece=shard,
            name_rows=lambda ids: unplace_rows(
                ids, memory.memory_num_keys, memory.memory_placement_seed
            ),
        ).detach()

    regions = tuple(Region(shard.offset, shard.shape) for shard in shards)
    return LazyTensor(shape, dtype, regions, rows)
