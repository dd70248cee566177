"""How Megatron names and lays out the weights of a GPT, with and without memories.

    dense model      decoder.layers.REST          [layers, ...]: all layers in one tensor
    memory model     decoder.layers.NUMBER.REST   [...]: one layer, as layers differ

Pure functions on names and shapes; nothing here reads or writes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megamem.checkpoint import OPTIMIZER, TABLES, placement_key, table_key
from megamem.ops import unplace_rows
from megamem.tools.convert.lazy import LazyTensor, Region, Tensors, computed, of_rows, of_tensor

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
QKV = "self_attention.linear_qkv.weight"
QKV_NORM = "self_attention.linear_qkv.layer_norm_weight"
ATTENTION_OUT = "self_attention.linear_proj.weight"
FFN_NORM = "mlp.linear_fc1.layer_norm_"
"""weight or bias; the norm before a feed-forward."""
MEMORY_NORM = "pre_mlp_layernorm."
"""weight or bias; the norm before a memory, which has no linear to be named after."""
FC1 = "mlp.linear_fc1.weight"
FC2 = "mlp.linear_fc2.weight"
KEPT_FFN = "mlp.ffn."

LAYERS = "decoder.layers."
STACKED = re.compile(r"decoder\.layers\.(?!\d)(?P<rest>.+)")
SINGLE = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<rest>.+)")

# what keeps extra state in a checkpoint: linears, and norms of Transformer Engine that stand alone;
# without low precision it is empty, and what is never asked for does no harm
ATTENTION_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
)
FFN_STATES = ("mlp.linear_fc1", "mlp.linear_fc2")
FINAL_STATE = "decoder.final_layernorm._extra_state/shard_0_1"


def layer_key(layer: int, rest: str) -> str:
    """Key of one layer's weight in a memory model."""
    return f"{LAYERS}{layer}.{rest}"


def memory_key(layer: int, rest: str) -> str:
    """Key of a memory layer's own weight."""
    return layer_key(layer, f"mlp.memory.{rest}")


def extra_states(num_layers: int, memory_layers: Sequence[int], keep_ffn: bool) -> list[str]:
    """Keys of the extra state of a memory model's layers."""
    keys = [FINAL_STATE]
    for layer in range(num_layers):
        states = [*ATTENTION_STATES]
        if layer not in memory_layers:
            states += FFN_STATES
        elif keep_ffn:
            states += [state.replace("mlp.", KEPT_FFN) for state in FFN_STATES]
        keys += [layer_key(layer, f"{state}._extra_state/shard_0_1") for state in states]
    return keys


def weights_only(tensors: Tensors) -> dict[str, LazyTensor]:
    """A checkpoint without the state of its optimizers."""
    optimizers = (f"{OPTIMIZER}.", "chained_")
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(optimizers)}


def tables(tensors: Tensors) -> dict[str, str]:
    """Name of each value table -> its key."""
    ending = table_key("").removeprefix(f"{TABLES}.")
    return {
        key.removeprefix(f"{TABLES}.").removesuffix(ending): key
        for key in tensors
        if key.startswith(f"{TABLES}.") and key.endswith(ending)
    }


@dataclass(frozen=True)
class DenseLayers:
    """The layers of a dense checkpoint."""

    num_layers: int
    per_layer: dict[int, dict[str, LazyTensor]]
    """Layer -> REST -> weight."""
    others: dict[str, LazyTensor]
    """What belongs to no layer."""


def dense_layers(tensors: Tensors) -> DenseLayers:
    """Take a dense model apart, whichever of the two forms its layers are saved in.

    Raises:
        ValueError: there are no layers, or not all of them.
    """
    others: dict[str, LazyTensor] = {}
    per_layer: dict[int, dict[str, LazyTensor]] = {}
    for key, tensor in tensors.items():
        if match := SINGLE.fullmatch(key):
            per_layer.setdefault(int(match["layer"]), {})[match["rest"]] = tensor
        elif match := STACKED.fullmatch(key):
            for layer in range(tensor.shape[0]):
                per_layer.setdefault(layer, {})[match["rest"]] = unstacked(tensor, layer)
        else:
            others[key] = tensor
    if not per_layer or sorted(per_layer) != list(range(len(per_layer))):
        raise ValueError(f"it has layers {sorted(per_layer)}, not all from 0")
    return DenseLayers(len(per_layer), per_layer, others)


def unstacked(tensor: LazyTensor, layer: int) -> LazyTensor:
    """One layer of a tensor that holds all."""
    shape = tensor.shape[1:]
    region = Region((layer, *(0,) * len(shape)), (1, *shape))
    return computed(shape, tensor.dtype, lambda: tensor.read(region)[0])


def memory_in_place_of_ffn(rest: dict[str, LazyTensor], keep_ffn: bool) -> dict[str, LazyTensor]:
    """A layer's weights once its feed-forward is a memory, or stands beside one."""
    found = {}
    for name, tensor in rest.items():
        if name.startswith(FFN_NORM):
            found[MEMORY_NORM + name.removeprefix(FFN_NORM)] = tensor
        elif not name.startswith("mlp."):
            found[name] = tensor
        elif keep_ffn:
            found[KEPT_FFN + name.removeprefix("mlp.")] = tensor
    return found


def placed(values: torch.Tensor, num_keys: int, seed: int) -> LazyTensor:
    """A table whose row i * N + j is given, as it lies in a checkpoint."""

    def rows(ids: torch.Tensor) -> torch.Tensor:
        return values[unplace_rows(ids, num_keys, seed)]

    return of_rows((values.shape[0], values.shape[1]), values.dtype, rows)


def unplaced(table: LazyTensor, num_keys: int, seed: int) -> LazyTensor:
    """A table as it lies in a checkpoint, to be written with row i * N + j in its place."""

    def target(rows: torch.Tensor) -> torch.Tensor:
        return unplace_rows(rows, num_keys, seed)

    return LazyTensor(table.shape, table.dtype, table.regions, table.read, target)


def placement_of(table: str, seed: int) -> dict[str, LazyTensor]:
    """What a checkpoint holds beside a table: the seed that its rows are placed by."""
    return {placement_key(table): of_tensor(torch.tensor([seed]))}
