"""Converts a checkpoint of the released code of UltraMem and UltraMemV2 to a Megatron checkpoint.

The model computes what the released code does. Of a query for each Tucker rank the released
forward uses two of the 2 A vectors, the first two, for the rows and the columns of all ranks.
"""

import math
from typing import Any

import torch
from torch import Tensor

from megamem.checkpoint import settings_of, table_key
from megamem.config import ConfigurationError, MemoryConfig
from megamem.layers.variants import VARIANTS, pool_of
from megamem.layers.variants.variant import VALUES as OUR_VALUES
from megamem.ops import unplace_rows
from megamem.parallel.row_shard import id_dtype
from megamem.resolution import resolve
from megamem.spec import MemorySpec
from megamem.tools.convert import layout
from megamem.tools.convert.lazy import LazyTensor, computed, of_rows, of_tensor
from megamem.tools.convert.reference import Converted, joined_qkv
from megamem.tools.convert.released_file import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    PRE_VALUES,
    RING,
    VALUES,
    Memories,
    Queries,
    Released,
)

OUTER = {EMBEDDING: layout.EMBEDDING, FINAL_NORM: layout.FINAL_NORM, OUTPUT: layout.OUTPUT}


def convert_released(
    source: Released, *, queries: Queries = "released", seed: int = 0, separate_tables: bool = False
) -> Converted:
    """Give all weights Megatron's names and shapes; tables are not read into memory.

    Args:
        source: the checkpoint.
        queries: released: what the released forward computes. ranks: the source was trained by a
            forward in which each Tucker rank has its own query.
        seed: `--memory-placement-seed` of the runs that will load the checkpoint.
        separate_tables: copy the rows that several layers of UltraMemV2 share.

    Raises:
        ConfigurationError: megamem has no such memories.
    """
    memories = Memories.of(source)
    spec, warnings = _spec(source, memories, queries, seed, separate_tables)
    tensors = {
        target: of_tensor(source.weights[name])
        for name, target in OUTER.items()
        if name in source.weights
    }
    for layer in range(source.layers):
        rest = _block(source, layer)
        if layer in spec.layers:
            rest = layout.memory_in_place_of_ffn(rest, keep_ffn=True)
        tensors |= {layout.layer_key(layer, name): tensor for name, tensor in rest.items()}
    for number, layer in enumerate(spec.layers):
        own = _memory(source, number, memories, spec)
        tensors |= {layout.memory_key(layer, name): tensor for name, tensor in own.items()}
        tensors |= _tables(source, number, memories, spec)
    objects = layout.extra_states(source.layers, spec.layers, keep_ffn=True)
    return Converted(tensors, objects, _flags(source, spec), settings_of(spec), warnings)


def _spec(
    source: Released, memories: Memories, queries: Queries, seed: int, separate: bool
) -> tuple[MemorySpec, list[str]]:
    """The settings of the memory layers, and what the user should know about them."""
    own_queries = memories.query_rows > 2 * memories.width
    number = len(memories.layers)
    # the memories of V2 may read rows of each other
    together = memories.rows > memories.per_layer > 0
    side = math.isqrt(memories.rows)
    all_share = together and not separate
    num_keys = math.isqrt(memories.per_layer) if all_share else side
    second = memories.variant == "ultramem-v2"
    config = MemoryConfig(
        memory_layers=list(memories.layers),
        memory_variant=memories.variant,  # type: ignore[arg-type]
        memory_num_keys=num_keys,
        memory_heads=memories.heads,
        memory_topk=source.model["mem_knn"],
        memory_key_dim=2 * memories.width,
        memory_value_dim=memories.value_width,
        memory_pre_value_dim=memories.pre_value_width if second else None,
        memory_tucker_rank=memories.ranks,
        memory_cores=memories.cores,
        memory_expansion=memories.blocks,
        memory_expansion_proj="block" if memories.block_projections else "single",
        memory_rank_queries="on" if own_queries and queries == "ranks" else "off",
        memory_skip=memories.skip,
        memory_share_layers=number if all_share else 1,
        memory_dropout=source.setting("mem_output_dropout_rate", 0.0) if second else 0,
        memory_placement="stored" if all_share or memories.blocks > 1 else "seed",
        memory_placement_seed=seed,
    )
    spec = resolve(config, source.weights[EMBEDDING].shape[1], num_layers=source.layers)
    if all_share and spec.keys_per_side != memories.sub_keys:
        raise ConfigurationError(
            f"each of the {number} memories reads {memories.rows:,} of {memories.ring:,} rows in a "
            f"ring (mem_share_ratio), which tables of --memory-share-layers {number} cannot: they "
            f"have {spec.keys_per_side} sub-keys per side, not {memories.sub_keys}; use "
            "--separate-tables to give each memory a copy of the rows that it reads."
        )
    return spec, _warnings(memories, queries, own_queries, together and separate)


def _warnings(memories: Memories, queries: Queries, own: bool, copied: bool) -> list[str]:
    found = []
    if memories.variant == "ultramem-v2" and not own:
        found.append(
            "the released forward fails for queries that all Tucker ranks share; this checkpoint "
            "is taken for one of a repaired forward, with one row query and one column query."
        )
    if own and queries == "released":
        found.append(
            "each Tucker rank has queries, of which the released forward uses those of one row and "
            "one column for all ranks; the others are left out. Use --queries ranks if the model "
            "was trained by a forward that uses all of them."
        )
    if copied:
        found.append(
            "rows that several memories share are copied to each, so that training moves the "
            "copies apart."
        )
    return found


def _block(source: Released, layer: int) -> dict[str, LazyTensor]:
    """Megatron's names in a dense layer -> its weights."""
    heads = source.model["n_heads"]
    qkv, hidden = source.block(layer, "att_proj"), source.weights[EMBEDDING].shape[1]
    keys = (len(qkv) - hidden) // 2
    groups = keys * heads // hidden

    def joined() -> Tensor:
        q, k, v = qkv.split((hidden, keys, keys))
        return joined_qkv(q, k, v, heads=heads, groups=groups, rope="halves")

    up_and_gate = source.block(layer, "ff_proj")

    def gate_and_up() -> Tensor:
        # the released code has the gate last
        up, gate = up_and_gate.chunk(2)
        return torch.cat((gate, up))

    found = {
        layout.QKV: computed(tuple(qkv.shape), qkv.dtype, joined),
        layout.QKV_NORM: of_tensor(source.block(layer, "attn_norm")),
        layout.ATTENTION_OUT: of_tensor(source.block(layer, "attn_out")),
        f"{layout.FFN_NORM}weight": of_tensor(source.block(layer, "ff_norm")),
        layout.FC1: computed(tuple(up_and_gate.shape), up_and_gate.dtype, gate_and_up),
        layout.FC2: of_tensor(source.block(layer, "ff_out")),
    }
    if source.setting("attention_layer_norm", False):
        for one in "qk":
            name = f"self_attention.{one}_layernorm.weight"
            found[name] = of_tensor(source.block(layer, f"{one}_norm"))
    return found


def _memory(
    source: Released, number: int, memories: Memories, spec: MemorySpec
) -> dict[str, LazyTensor]:
    """megamem's names in a memory layer -> its weights and state."""
    keys, query = source.memory(number, "keys"), source.memory(number, "query_proj.weight")
    sub_keys = (2, spec.heads, spec.keys_per_side, spec.tucker_rank, memories.width)
    used = 2 * memories.width * (spec.tucker_rank if spec.rank_queries else 1)
    cores = source.cores(number)
    u, v = (source.memory(number, f"tucker_core_{name}")[0, :, 0] for name in "uv")
    found = {
        "query.linear.weight": of_tensor(query[:used]),
        "query.norm.weight": of_tensor(source.memory(number, "query_norm.weight")),
        "keys.sub_keys": computed(sub_keys, keys.dtype, lambda: keys.permute(1, 0, 2, 4, 3)),
        "keys.norm.weight": of_tensor(source.memory(number, "keys_norm.weight")),
        "keys.cores": of_tensor(torch.stack(cores)),
        "keys.directions": of_tensor(torch.stack((u, v)).float()),
        "output.proj.weight": of_tensor(source.memory(number, "values_proj.weight")),
    }
    if spec.pre_value_dim:
        found["token.weight"] = of_tensor(source.memory(number, "pre_values_proj.weight"))
    if spec.placement == "stored":
        found["permutation"] = _permutation(source, number, memories, spec)
    return found


def _permutation(source: Released, number: int, memories: Memories, spec: MemorySpec) -> LazyTensor:
    """The row of each pair, as block * R + row of the table."""
    shuffle, count = source.memory(number, "shuffle_index"), memories.blocks * memories.rows
    dtype = id_dtype(spec.keys_per_side**2)

    def make() -> Tensor:
        if spec.share_layers == 1:
            return shuffle.to(dtype)
        block, row = shuffle.long() // memories.rows, shuffle.long() % memories.rows
        row = (row + number * memories.per_layer) % memories.ring
        return (block * memories.ring + row).to(dtype)

    return computed((count,), dtype, make)


def _tables(
    source: Released, number: int, memories: Memories, spec: MemorySpec
) -> dict[str, LazyTensor]:
    """The tables of the pool of a memory, and their placements."""
    pool, found = pool_of(spec.layers[number], spec), {}
    for use in VARIANTS[spec.variant].tables:
        theirs = VALUES if use.name == OUR_VALUES else PRE_VALUES
        rows = (
            source.weights[RING + theirs] if memories.per_layer else source.memory(number, theirs)
        )
        table = of_tensor(rows)
        if spec.share_layers == 1:
            table = _own_rows(rows, source.memory(number, "shuffle_index"), number, memories, spec)
        name = VARIANTS[spec.variant].table_name(pool, use)
        found[table_key(name)] = table
        found |= layout.placement_of(name, spec.placement_seed)
    return found


def _own_rows(
    rows: Tensor, shuffle: Tensor, number: int, memories: Memories, spec: MemorySpec
) -> LazyTensor:
    """The rows that one memory reads, where its pairs of sub-keys look for them."""
    first = number * memories.per_layer

    def take(ids: Tensor) -> Tensor:
        if spec.placement == "seed":
            # each row has one pair, so that the rows can be put where the seed places the pairs
            ids = shuffle[unplace_rows(ids, spec.keys_per_side, spec.placement_seed)].long()
        return rows[(ids + first) % len(rows)]

    return of_rows((memories.rows, rows.shape[1]), rows.dtype, take)


def _flags(source: Released, spec: MemorySpec) -> list[str]:
    """The flags of a run that loads the converted checkpoint."""
    heads, hidden = source.model["n_heads"], spec.hidden_size
    keys = (len(source.block(0, "att_proj")) - hidden) // 2
    groups = keys * heads // hidden
    found = {
        "num-layers": source.layers,
        "hidden-size": hidden,
        "ffn-hidden-size": len(source.block(0, "ff_proj")) // 2,
        "num-attention-heads": heads,
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
        "rotary-base": int(source.setting("rope_theta", 10_000)),
        "memory-layers": " ".join(map(str, spec.layers)),
        "memory-variant": spec.variant,
        "memory-num-keys": spec.num_keys,
        "memory-heads": spec.heads,
        "memory-topk": spec.topk,
        "memory-key-dim": spec.key_dim,
        "memory-value-dim": spec.value_dim,
        "memory-tucker-rank": spec.tucker_rank,
        "memory-cores": spec.cores,
        "memory-expansion": spec.expansion,
        "memory-expansion-proj": spec.expansion_proj,
        "memory-rank-queries": "on" if spec.rank_queries else "off",
        # the released code computes this loss, but does not add it
        "memory-core-aux-weight": 0,
    }
    further: dict[str, Any] = {
        "num-query-groups": groups if groups != heads else None,
        "memory-pre-value-dim": spec.pre_value_dim,
        "memory-skip": spec.skip,
        "memory-share-layers": spec.share_layers if spec.share_layers > 1 else None,
        "memory-dropout": spec.dropout,
        "memory-placement": "stored" if spec.placement == "stored" else None,
        "memory-placement-seed": spec.placement_seed,
    }
    said = [f"--{name} {value}" for name, value in found.items()]
    said += [f"--{name} {value}" for name, value in further.items() if value]
    switches = {
        "swiglu": True,
        "disable-bias-linear": True,
        "qk-layernorm": source.setting("attention_layer_norm", False),
        "group-query-attention": groups != heads,
        "untie-embeddings-and-output-weights": OUTPUT in source.weights,
    }
    return said + [f"--{name}" for name, given in switches.items() if given]
