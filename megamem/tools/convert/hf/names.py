"""The weights of a memory model by Megatron's names and by those of the exported one.

Either side is a mapping of names to LazyTensors. Each weight of one is one of the other, apart from
two kinds that Megatron stores in one tensor: queries, keys and values, group by group of queries,
and the two matrices of a gated feed-forward.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megamem.checkpoint import SHARED, layer_table, table_key
from megamem.config import ConfigurationError
from megamem.layers.variants import VARIANTS
from megamem.layers.variants.ultramem_v2 import PRE_VALUES
from megamem.tools.convert import layout
from megamem.tools.convert.export import stay_placed
from megamem.tools.convert.lazy import LazyTensor, Tensors, computed

EMBED, HEAD, FINAL = "model.embed_tokens", "lm_head.weight", "model.norm"
POSITIONS = ("embedding.position_embeddings.weight", "model.embed_positions.weight")
EXPERTS = "experts.experts.linear_fc"

NORMS_BEFORE = ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
"""Megatron's names of the norm before experts, with layers of Transformer Engine and without."""
NORM_REMARK = "norm_before_experts"
"""Which of them a checkpoint had, in the metadata of the exported weights."""

# of a layer: Megatron's name -> the exported one
PLAIN = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.q_layernorm.": "self_attn.q_norm.",
    "self_attention.k_layernorm.": "self_attn.k_norm.",
    "self_attention.linear_proj.": "self_attn.o_proj.",
    "mlp.linear_fc1.layer_norm_": "post_attention_layernorm.",
    "pre_mlp_layernorm.": "post_attention_layernorm.",
    "mlp.memory.query.linear.": "memory.query.",
    "mlp.memory.query.norm.": "memory.query_norm.",
    "mlp.memory.keys.sub_keys": "memory.sub_keys",
    "mlp.memory.keys.norm.": "memory.key_norm.",
    "mlp.memory.keys.cores": "memory.cores",
    "mlp.memory.keys.directions": "memory.directions",
    "mlp.memory.token.": "memory.pre.",
    "mlp.memory.permutation": "memory.permutation",
    "mlp.memory.output.": "memory.",
}
FEED_FORWARD = {
    "linear_fc2.": "down_proj.",
    "router.weight": "gate.weight",
    "router.expert_bias": "gate.bias",
    "shared_experts.linear_fc2.": "shared_expert.down_proj.",
    "shared_experts.gate_weight": "shared_expert_gate.weight",
    "experts.experts.linear_fc1.weight": "experts.gate_up_proj",
    "experts.experts.linear_fc2.weight": "experts.down_proj",
}


def exported(source: Tensors, config: dict[str, Any]) -> dict[str, LazyTensor]:
    """The weights of an exported model, tables last.

    Args:
        source: the weights in a checkpoint, with row i * N + j of a table for the pair (i, j).
        config: the content of config.json.

    Raises:
        ConfigurationError: there is a weight that the exported model does not have.
    """
    found: dict[str, LazyTensor] = {}
    for key, tensor in source.items():
        if match := layout.SINGLE.fullmatch(key):
            prefix = f"model.layers.{match['layer']}."
            for name, part in _of_layer(match["rest"], tensor, config):
                found[prefix + name] = part
        elif (outside := _outside_layers(key)) is not None:
            found[outside] = tensor
        elif not key.startswith(layout.TABLES):
            raise ConfigurationError(
                f"the checkpoint has the weight {key}, which the exported model does not have; "
                "export without --format hf."
            )
    for name, key in layout.tables(source).items():
        found[table_weight(name)] = source[key]
    return found


def tables_of(config: dict[str, Any]) -> list[str]:
    """The names of the tables of a model, pool by pool."""
    variant, shared = VARIANTS[config["memory_variant"]], config["memory_pool"] == SHARED
    # neighbours share the pool of the first of them
    owners = config["memory_layers"][:: config.get("memory_share_layers", 1)]
    pools = [SHARED] if shared else [layer_table(layer) for layer in owners]
    return [variant.table_name(pool, use) for pool in pools for use in variant.tables]


def table_width(name: str, config: dict[str, Any]) -> int:
    """The width of the rows of a table."""
    pre: int = config.get("memory_pre_value_dim", 0)
    return pre if name.endswith(f".{PRE_VALUES}") else int(config["memory_value_dim"])


def table_weight(name: str) -> str:
    """The exported name of the weight of a table."""
    pool, _, kind = name.partition(".")
    return f"model.tables.{pool}.{kind or 'v'}.weight"


def _outside_layers(key: str) -> str | None:
    if key == layout.EMBEDDING:
        return f"{EMBED}.weight"
    if key == layout.OUTPUT:
        return HEAD
    if key == POSITIONS[0]:
        return POSITIONS[1]
    ending = key.removeprefix("decoder.final_layernorm.")
    return f"{FINAL}.{ending}" if ending != key else None


def _of_layer(
    rest: str, tensor: LazyTensor, config: dict[str, Any]
) -> Iterator[tuple[str, LazyTensor]]:
    for ours, theirs in PLAIN.items():
        if rest.startswith(ours):
            yield theirs + rest.removeprefix(ours), tensor
            return
    if rest.startswith("self_attention.linear_qkv."):
        kind = rest.rpartition(".")[2]
        for name, rows in _qkv_rows(config).items():
            yield f"self_attn.{name}_proj.{kind}", _rows(tensor, rows)
        return
    inner = rest.removeprefix("mlp.").removeprefix("ffn.")
    for ours, theirs in FEED_FORWARD.items():
        if inner.startswith(ours):
            yield f"mlp.{theirs}{inner.removeprefix(ours)}", tensor
            return
    for ours, theirs in (("shared_experts.linear_fc1.", "shared_expert."), ("linear_fc1.", "")):
        if inner.startswith(ours):
            kind, half = inner.removeprefix(ours), tensor.shape[0] // 2
            if not config["gated_mlp"]:
                yield f"mlp.{theirs}up_proj.{kind}", tensor
                return
            yield f"mlp.{theirs}gate_proj.{kind}", _rows(tensor, torch.arange(half))
            yield f"mlp.{theirs}up_proj.{kind}", _rows(tensor, torch.arange(half, 2 * half))
            return
    raise ConfigurationError(
        f"the checkpoint has the weight {rest} in a layer, which the exported model does not have; "
        "export without --format hf."
    )


def _qkv_rows(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Rows of Megatron's matrix, which has the queries of a group, its keys and its values."""
    groups, width = config["num_key_value_heads"], config["head_dim"]
    queries = config["num_attention_heads"] // groups
    all_rows = torch.arange(groups * (queries + 2) * width).view(groups, queries + 2, width)
    return {
        "q": all_rows[:, :queries].flatten(),
        "k": all_rows[:, queries].flatten(),
        "v": all_rows[:, queries + 1].flatten(),
    }


def _rows(tensor: LazyTensor, rows: torch.Tensor) -> LazyTensor:
    shape = (len(rows), *tensor.shape[1:])
    return computed(shape, tensor.dtype, lambda: tensor.whole()[rows])


def remarks_on(source: Tensors) -> dict[str, str]:
    """What imported() needs to know of a checkpoint beside weights and config."""
    for key in source:
        match = layout.SINGLE.fullmatch(key)
        if match and match["rest"].startswith(f"mlp.{EXPERTS}"):
            # in a memory layer, which may have experts too, the norm has one name
            norm = layout.layer_key(int(match["layer"]), NORMS_BEFORE[1])
            return {NORM_REMARK: NORMS_BEFORE[f"{norm}weight" in source]}
    return {}


def imported(
    source: Tensors, config: dict[str, Any], remarks: Mapping[str, str]
) -> dict[str, LazyTensor]:
    """The weights of a checkpoint, with row i * N + j of a table for the pair (i, j).

    Args:
        source: the weights of an exported model.
        config: the content of its config.json.
        remarks: the metadata of the exported weights.

    Raises:
        ConfigurationError: a weight is missing, or there is one that the model does not have.
    """
    found: dict[str, LazyTensor] = {}
    left = dict(source)

    def take(name: str) -> LazyTensor:
        if name not in left:
            raise ConfigurationError(
                f"the exported model has no weight {name}, which its config.json asks for; copy "
                "the folder again."
            )
        return left.pop(name)

    found[layout.EMBEDDING] = take(f"{EMBED}.weight")
    if config["position_embedding"] == "learned":
        found[POSITIONS[0]] = take(POSITIONS[1])
    norms = ("weight", "bias") if config["normalization"] == "LayerNorm" else ("weight",)
    for kind in norms:
        found[f"decoder.final_layernorm.{kind}"] = take(f"{FINAL}.{kind}")
    if not config["tie_word_embeddings"]:
        found[layout.OUTPUT] = take(HEAD)
    else:
        left.pop(HEAD, None)
    for layer in range(config["num_hidden_layers"]):
        of_layer = _Prefixed(f"model.layers.{layer}.", take)
        for rest, tensor in _layer(layer, config, norms, of_layer):
            if layer not in config["memory_layers"] and layer in config.get("expert_layers", ()):
                # other layers have one name
                before = remarks.get(NORM_REMARK, NORMS_BEFORE[0])
                rest = rest.replace(NORMS_BEFORE[0], before)  # noqa: PLW2901
            found[layout.layer_key(layer, rest)] = tensor
    for name in tables_of(config):
        found[table_key(name)] = take(table_weight(name))
        if stay_placed({field.removeprefix("memory_"): x for field, x in config.items()}):
            found |= layout.placement_of(name, config["memory_placement_seed"])
    if left:
        raise ConfigurationError(
            f"the exported model has the weight {min(left)}, which a model of its config.json does "
            "not have."
        )
    return found


Take = Callable[[str], LazyTensor]


@dataclass(frozen=True)
class _Prefixed:
    prefix: str
    take: Take

    def __call__(self, name: str) -> LazyTensor:
        return self.take(self.prefix + name)


def _layer(
    layer: int, config: dict[str, Any], norms: tuple[str, ...], take: Take
) -> Iterator[tuple[str, LazyTensor]]:
    remembers, mixed = layer in config["memory_layers"], layer in config.get("expert_layers", ())
    for kind in norms:
        yield f"self_attention.linear_qkv.layer_norm_{kind}", take(f"input_layernorm.{kind}")
    own_norm = remembers or mixed
    before = NORMS_BEFORE[0 if own_norm else 1]
    for kind in norms:
        yield before + kind, take(f"post_attention_layernorm.{kind}")
        if config["qk_norm"]:
            for one in ("q", "k"):
                yield f"self_attention.{one}_layernorm.{kind}", take(f"self_attn.{one}_norm.{kind}")
    for kind in _kinds(config["attention_bias"]):
        rows = _qkv_rows(config)
        parts = [take(f"self_attn.{one}_proj.{kind}") for one in rows]
        yield f"self_attention.linear_qkv.{kind}", _joined(parts, torch.cat([*rows.values()]))
    for kind in _kinds(config["attention_output_bias"]):
        yield f"self_attention.linear_proj.{kind}", take(f"self_attn.o_proj.{kind}")
    if remembers:
        for name in _memory_weights(config):
            ours = next(o for o, t in PLAIN.items() if name.startswith(t) and "memory" in o)
            yield ours + name.removeprefix(PLAIN[ours]), take(name)
    if remembers and not config["memory_keep_ffn"]:
        return
    slot = "mlp.ffn." if remembers else "mlp."
    if mixed:
        yield from ((slot + rest, tensor) for rest, tensor in _experts(config, take))
    else:
        yield from ((slot + rest, tensor) for rest, tensor in _dense("mlp.", config, take))


def _kinds(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _memory_weights(config: dict[str, Any]) -> list[str]:
    if config.get("memory_tucker_rank"):
        linears = ("query", "proj", *(("pre",) if config["memory_pre_value_dim"] else ()))
        found = [f"memory.{one}.weight" for one in (*linears, "query_norm", "key_norm")]
        stored = ["permutation"] if config["memory_placement"] == "stored" else []
        return found + [f"memory.{one}" for one in ("sub_keys", "cores", "directions", *stored)]
    found = ["memory.query.weight", "memory.query.bias", "memory.sub_keys"]
    if config["memory_qk_norm"]:
        found += ["memory.query_norm.weight", "memory.key_norm.weight"]
    if config["memory_variant"] == "memory+":
        found += [f"memory.{one}.{kind}" for one in ("gate", "proj") for kind in ("weight", "bias")]
    return found


def _dense(prefix: str, config: dict[str, Any], take: Take) -> Iterator[tuple[str, LazyTensor]]:
    for kind in _kinds(config["mlp_bias"]):
        parts = [take(f"{prefix}gate_proj.{kind}")] if config["gated_mlp"] else []
        parts.append(take(f"{prefix}up_proj.{kind}"))
        yield f"linear_fc1.{kind}", _joined(parts) if len(parts) > 1 else parts[0]
        yield f"linear_fc2.{kind}", take(f"{prefix}down_proj.{kind}")


def _experts(config: dict[str, Any], take: Take) -> Iterator[tuple[str, LazyTensor]]:
    yield "router.weight", take("mlp.gate.weight")
    if config["router_bias"]:
        yield "router.expert_bias", take("mlp.gate.bias")
    yield "experts.experts.linear_fc1.weight", take("mlp.experts.gate_up_proj")
    yield "experts.experts.linear_fc2.weight", take("mlp.experts.down_proj")
    if config["shared_expert_intermediate_size"]:
        for rest, tensor in _dense("mlp.shared_expert.", config, take):
            yield f"shared_experts.{rest}", tensor
        if config["shared_expert_gate"]:
            yield "shared_experts.gate_weight", take("mlp.shared_expert_gate.weight")


def _joined(parts: list[LazyTensor], rows: torch.Tensor | None = None) -> LazyTensor:
    """The parts one below the other, or each of their rows at its place."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def make() -> torch.Tensor:
        whole = torch.cat([part.whole() for part in parts])
        return whole if rows is None else torch.empty_like(whole).index_copy_(0, rows, whole)

    return computed(shape, parts[0].dtype, make)
