"""Megatron's names and shapes of the weights of a GPT, with and without memory layers.

    dense model      decoder.layers.REST          [layers, ...]: all layers in one tensor
    memory model     decoder.layers.NUMBER.REST   [...]: one tensor per layer, as layers differ

These are pure functions of names and shapes; none reads or writes a file.
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
"""Prefix of weight and bias of the norm before a feed-forward."""
MEMORY_NORM = "pre_mlp_layernorm."
"""Prefix of weight and bias of the norm before a memory layer, which is a module of its own."""
FC1 = "mlp.linear_fc1.weight"
FC2 = "mlp.linear_fc2.weight"
KEPT_FFN = "mlp.ffn."

LAYERS = "decoder.layers."
STACKED = re.compile(r"decoder\.layers\.(?!\d)(?P<rest>.+)")
SINGLE = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<rest>.+)")

# modules with extra state in a checkpoint: linears, and separate norms of Transformer Engine;
# without low precision it is empty, and keys that a run does not ask for are ignored
ATTENTION_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
)
FFN_STATES = ("mlp.linear_fc1", "mlp.linear_fc2")
FINAL_STATE = "decoder.final_layernorm._extra_state/shard_0_1"


EXPERT_WEIGHT = re.compile(
    r"(?P<module>decoder\.layers\.\d+\.mlp\.(ffn\.)?(shared_experts|experts\.experts)\.linear_fc[12])"
    r"\.weight"
)


def layer_key(layer: int, rest: str) -> str:
    """The key of a weight of one layer in a memory model."""
    return f"{LAYERS}{layer}.{rest}"


def memory_key(layer: int, rest: str) -> str:
    """The key of a memory layer's own weight."""
    return layer_key(layer, f"mlp.memory.{rest}")


def extra_states(num_layers: int, memory_layers: Sequence[int], keep_ffn: bool) -> list[str]:
    """The keys of the extra state of a memory model's layers."""
    keys = [FINAL_STATE]
    for layer in range(num_layers):
        states = [*ATTENTION_STATES]
        if layer not in memory_layers:
            states += FFN_STATES
        elif keep_ffn:
            states += [state.replace("mlp.", KEPT_FFN) for state in FFN_STATES]
        keys += [layer_key(layer, f"{state}._extra_state/shard_0_1") for state in states]
    return keys


def expert_states(tensors: Tensors) -> list[str]:
    """The keys of the extra state of the experts in a model; each routed expert has its own."""
    keys = []
    for key, tensor in tensors.items():
        if match := EXPERT_WEIGHT.fullmatch(key):
            count = 1 if "shared_experts" in key else tensor.shape[0]
            module = match["module"]
            keys += [f"{module}._extra_state/shard_{n}_{count}" for n in range(count)]
    return keys


def weights_only(tensors: Tensors) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint without optimizer state."""
    optimizers = (f"{OPTIMIZER}.", "chained_")
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(optimizers)}


def tables(tensors: Tensors) -> dict[str, str]:
    """The name of each value table -> its key."""
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
    """Weights that do not belong to a layer, by key."""


def dense_layers(tensors: Tensors) -> DenseLayers:
    """Split a dense model into its layers, from one tensor for all layers or one per layer.

    Raises:
        ValueError: there are no layers, or some are missing.
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
        raise ValueError(f"it has layers {sorted(per_layer)}, which do not count up from 0")
    return DenseLayers(len(per_layer), per_layer, others)


def unstacked(tensor: LazyTensor, layer: int) -> LazyTensor:
    """One layer of a tensor that holds all layers."""
    shape = tensor.shape[1:]
    region = Region((layer, *(0,) * len(shape)), (1, *shape))
    return computed(shape, tensor.dtype, lambda: tensor.read(region)[0])


def memory_in_place_of_ffn(rest: dict[str, LazyTensor], keep_ffn: bool) -> dict[str, LazyTensor]:
    """A layer's weights after its feed-forward became a memory, or got one beside it."""
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
    """A table in the row order of a checkpoint.

    Args:
        values: the table with the value of the pair of sub-keys (i, j) in row i * N + j.
        num_keys: N.
        seed: of the placement.
    """

    def rows(ids: torch.Tensor) -> torch.Tensor:
        return values[unplace_rows(ids, num_keys, seed)]

    return of_rows((values.shape[0], values.shape[1]), values.dtype, rows)


def unplaced(table: LazyTensor, num_keys: int, seed: int) -> LazyTensor:
    """A table in the row order of a checkpoint, to be written in the order i * N + j."""

    def target(rows: torch.Tensor) -> torch.Tensor:
        return unplace_rows(rows, num_keys, seed)

    return LazyTensor(table.shape, table.dtype, table.regions, table.read, target)


def placement_of(table: str, seed: int) -> dict[str, LazyTensor]:
    """The entry of a checkpoint with the seed by which a table's rows are placed."""
    return {placement_key(table): of_tensor(torch.tensor([seed]))}
