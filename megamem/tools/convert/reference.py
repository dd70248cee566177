"""Converts a consolidated checkpoint of facebookresearch/memory to a Megatron checkpoint.

facebookresearch/memory is the implementation that was published with "Memory Layers at Scale".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megamem.checkpoint import SHARED, layer_table, settings_of, table_key
from megamem.config import ConfigurationError
from megamem.layers.variants.peer import U
from megamem.tools.convert import layout
from megamem.tools.convert.lazy import LazyTensor, computed, of_tensor
from megamem.tools.convert.reference_file import (
    ATTENTION_NORM,
    ATTENTION_OUT,
    DOWN,
    EMBEDDING,
    EXPERTS_U,
    EXPERTS_V,
    FFN_NORM,
    GATE,
    KEYS,
    NORM,
    OUT_GATE,
    OUT_PROJ,
    OUTPUT,
    QUERIES,
    QUERY,
    SUB_KEYS,
    TABLE,
    UP,
    VALUES,
    ReferenceShape,
    layers_of,
)

Rope = Literal["neighbours", "halves"]

OUTER = {
    EMBEDDING: layout.EMBEDDING,
    NORM: layout.FINAL_NORM,
    OUTPUT: layout.OUTPUT,
}
LINEARS = {QUERY: "query.linear.", OUT_GATE: "output.gate.", OUT_PROJ: "output.proj."}
ROWS_AT_ONCE = 2**14


@dataclass(frozen=True)
class Converted:
    """A Megatron checkpoint that is ready to be written."""

    tensors: dict[str, LazyTensor]
    objects: list[str]
    """Keys of extra state, all of it empty."""
    flags: list[str]
    """The flags of a run that loads the checkpoint."""
    settings: dict[str, Any]
    """The settings of the memory layers, without those that the source does not say."""
    warnings: list[str]
    """Sentences about weights that are probably not what the user expects."""


def convert_reference(
    source: dict[str, Tensor],
    *,
    heads: int,
    rope: Rope = "neighbours",
    seed: int = 0,
    separate_tables: bool = False,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Converted:
    """Give all weights Megatron's names and shapes; tables are compared, but not read into memory.

    Args:
        source: key -> tensor of a consolidated checkpoint.
        heads: attention heads, which the shapes do not tell.
        rope: pairs of dimensions that the source's rotary embedding rotates; Megatron's are halves.
        seed: `--memory-placement-seed` of the runs that will load the checkpoint.
        separate_tables: keep one table per layer, where the layers' tables differ.
        advance: called with the number of bytes of tables that were compared.

    Raises:
        ConfigurationError: keys are missing or unknown, or shapes contradict each other.
    """
    layers = layers_of(source)
    memories = [layer for layer, names in layers.items() if SUB_KEYS in names]
    if not memories:
        raise ConfigurationError(
            f"no layer has {SUB_KEYS}, so the checkpoint is not of a model with memory layers."
        )
    shape = ReferenceShape.of(source, layers, memories, heads)
    spec = shape.spec(memories, separate_tables)
    tensors = {target: of_tensor(source[name]) for name, target in OUTER.items() if name in source}
    for layer, names in layers.items():
        weights = {name: source[f"layers.{layer}.{name}"] for name in names}
        tensors |= _attention(layer, weights, shape, rope)
        is_memory = layer in memories
        tensors |= _memory(layer, weights, shape) if is_memory else _ffn(layer, weights)
    kinds = {EXPERTS_V: "", EXPERTS_U: f".{U}"} if shape.variant == "peer" else {TABLE: ""}
    for kind, within in kinds.items():
        tables = [source[f"layers.{layer}.{kind}"] for layer in memories]
        if not separate_tables:
            _check_equal(tables, memories, advance)
        pools = [layer_table(layer) for layer in memories] if separate_tables else [SHARED]
        for pool, table in zip(pools, tables, strict=False):
            name = pool + within
            tensors[table_key(name)] = layout.placed(table, spec.num_keys, seed)
            tensors |= layout.placement_of(name, seed)
    settings = settings_of(spec) | {"placement_seed": seed}
    # shapes do not tell how many rows a head reads
    del settings["topk"]
    return Converted(
        tensors,
        layout.extra_states(len(layers), memories, keep_ffn=False),
        shape.flags(spec, OUTPUT in source, seed),
        settings,
        _not_finite(source),
    )


def joined_qkv(
    queries: Tensor, keys: Tensor, values: Tensor, *, heads: int, groups: int, rope: Rope
) -> Tensor:
    """Megatron's single matrix: for each key head its query heads, the key head, the value head.

    Megatron's rotary embedding rotates dimensions i and i + half of a head. For a source that
    rotates neighbours, the even dimensions of queries and keys are moved to the front, which does
    not change their products.
    """
    head_dim, hidden = queries.shape[0] // heads, queries.shape[1]
    q = queries.view(groups, heads // groups, head_dim, hidden)
    k = keys.view(groups, 1, head_dim, hidden)
    v = values.view(groups, 1, head_dim, hidden)
    if rope == "neighbours":
        q, k = (torch.cat((x[:, :, 0::2], x[:, :, 1::2]), dim=2) for x in (q, k))
    return torch.cat((q, k, v), dim=1).reshape(-1, hidden)


def _attention(
    layer: int, weights: dict[str, Tensor], shape: ReferenceShape, rope: Rope
) -> dict[str, LazyTensor]:
    q, k, v = (weights[name] for name in (QUERIES, KEYS, VALUES))

    def qkv() -> Tensor:
        return joined_qkv(q, k, v, heads=shape.heads, groups=shape.groups, rope=rope)

    found = {
        layout.QKV: computed((len(q) + len(k) + len(v), shape.hidden), q.dtype, qkv),
        layout.QKV_NORM: of_tensor(weights[ATTENTION_NORM]),
        layout.ATTENTION_OUT: of_tensor(weights[ATTENTION_OUT]),
    }
    return {layout.layer_key(layer, rest): tensor for rest, tensor in found.items()}


def _ffn(layer: int, weights: dict[str, Tensor]) -> dict[str, LazyTensor]:
    gate, up = weights[GATE], weights[UP]
    both = (2 * gate.shape[0], gate.shape[1])
    found = {
        f"{layout.FFN_NORM}weight": of_tensor(weights[FFN_NORM]),
        layout.FC1: computed(both, gate.dtype, lambda: torch.cat((gate, up))),
        layout.FC2: of_tensor(weights[DOWN]),
    }
    return {layout.layer_key(layer, rest): tensor for rest, tensor in found.items()}


def _memory(layer: int, weights: dict[str, Tensor], shape: ReferenceShape) -> dict[str, LazyTensor]:
    keys = weights[SUB_KEYS]
    by_head = (shape.memory_heads, 2, shape.num_keys, shape.key_dim // 2)
    by_half = (2, shape.memory_heads, *by_head[2:])
    found = {
        layout.layer_key(layer, f"{layout.MEMORY_NORM}weight"): of_tensor(weights[FFN_NORM]),
        layout.memory_key(layer, "keys.sub_keys"): computed(
            by_half, keys.dtype, lambda: keys.reshape(by_head).transpose(0, 1)
        ),
    }
    for prefix, ours in LINEARS.items():
        for part in ("weight", "bias"):
            if prefix + part in weights:
                name = layout.memory_key(layer, ours + part)
                found[name] = of_tensor(weights[prefix + part])
    return found


def _check_equal(tables: list[Tensor], layers: list[int], advance: Callable[[int], None]) -> None:
    """Check that the layers' copies of the table are equal.

    Raises:
        ConfigurationError: two of them differ.
    """
    first = tables[0]
    for table, layer in zip(tables[1:], layers[1:], strict=True):
        if table.data_ptr() == first.data_ptr():
            continue
        same = table.shape == first.shape and table.dtype == first.dtype
        for start in range(0, len(first) if same else 0, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            same = same and torch.equal(_bits(table[rows]), _bits(first[rows]))
            advance(first[rows].nbytes)
        if not same:
            raise ConfigurationError(
                f"layers {layers[0]} and {layer} have different tables; use --separate-tables to "
                "keep one table per layer (--memory-pool layer)."
            )


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as bytes, so that NaN equals itself in comparisons."""
    return tensor.contiguous().view(torch.uint8)


def _not_finite(source: dict[str, Tensor]) -> list[str]:
    """A warning for each bias with infinities or NaN.

    The published code does not initialise the biases of memory layers.
    """
    biases = [key for key in source if key.endswith(".bias")]
    return [
        f"{key} contains infinities or NaN, and is converted unchanged."
        for key in biases
        if not torch.isfinite(source[key]).all()
    ]
