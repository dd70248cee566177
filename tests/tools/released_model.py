"""The released model of UltraMem and UltraMemV2 in plain torch, written from its description."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
ROTARY_BASE = 10_000


@dataclass(frozen=True)
class Sizes:
    """The sizes of a small model."""

    layers: int = 4
    hidden: int = 64
    heads: int = 4
    groups: int = 2
    ffn: int = 96
    vocabulary: int = 128
    second: bool = False
    way: str = "0:0/2:2"
    num_keys: int = 6
    expansion: int = 2
    memory_heads: int = 2
    width: int = 12
    value_width: int = 32
    pre_value_width: int = 16
    topk: int = 5
    ranks: int = 2
    share: float = 1.0
    own_queries: bool = False

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Layer where each memory reads, and after which its output is added."""
        if self.way == "full":
            return [(layer, layer) for layer in range(self.layers)]
        return [tuple(map(int, span.split(":"))) for span in self.way.split("/")]  # type: ignore

    @property
    def ring(self) -> int:
        """Rows of all memories."""
        return len(self.spans) * self.num_keys**2

    @property
    def side(self) -> int:
        """Sub-keys of a memory per side, without the expansion."""
        return math.isqrt(int(self.ring * self.share)) if self.second else self.num_keys

    def config(self) -> dict[str, Any]:
        """What config.yaml says of the model."""
        return {
            "d_model": self.hidden,
            "n_heads": self.heads,
            "n_kv_heads": self.groups,
            "n_layers": self.layers,
            "mlp_hidden_size": 2 * self.ffn,
            "block_type": "sequential",
            "layer_norm_type": "rms",
            "attention_layer_norm": True,
            "activation_type": "swiglu",
            "include_bias": False,
            "bias_for_layer_norm": False,
            "rope": True,
            "flash_attention": False,
            "vocab_size": self.vocabulary,
            "embedding_size": self.vocabulary,
            "max_sequence_length": 64,
            "weight_tying": True,
            "init_device": "cpu",
            "mem_type": "ultramem_v2" if self.second else "ultramem_v1",
            "mem_insert_way": self.way,
            "mem_knum": self.num_keys,
            "mem_kdim": self.width,
            "mem_vdim": self.value_width,
            "mem_pre_vdim": self.pre_value_width,
            "mem_knn": self.topk,
            "mem_head": self.memory_heads,
            "mem_share_ratio": self.share,
            "mem_key_expand_time": self.expansion,
            "mem_q_for_each_tucker_rank": self.own_queries,
        }


def random_checkpoint(sizes: Sizes) -> dict[str, Tensor]:
    """A checkpoint with the released keys, and numbers large enough to tell layouts apart."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=draw) * std

    hidden, head = sizes.hidden, sizes.hidden // sizes.heads
    found = {
        "transformer.wte.weight": normal(sizes.vocabulary, hidden, std=0.4),
        "transformer.ln_f.weight": 1 + normal(hidden, std=0.3),
    }
    for layer in range(sizes.layers):
        own = {
            "att_proj": normal(hidden + 2 * sizes.groups * head, hidden, std=0.3),
            "attn_out": normal(hidden, hidden, std=0.3),
            "ff_proj": normal(2 * sizes.ffn, hidden, std=0.2),
            "ff_out": normal(hidden, sizes.ffn, std=0.2),
            **{name: 1 + normal(hidden, std=0.3) for name in ("attn_norm", "ff_norm")},
            **{name: 1 + normal(head, std=0.3) for name in ("q_norm", "k_norm")},
        }
        found |= {f"transformer.blocks.{layer}.{name}.weight": x for name, x in own.items()}
    sub_keys, blocks = sizes.expansion * sizes.side, sizes.expansion**2
    queries = 2 * sizes.width * (sizes.ranks if sizes.own_queries else 1)
    for number in range(len(sizes.spans)):
        shape = (sizes.memory_heads, 2, sub_keys, sizes.width, sizes.ranks)
        width = sizes.value_width * (1 if sizes.second else blocks)
        square = (sizes.memory_heads, sizes.ranks, sizes.ranks)
        cores = [normal(*square, std=0.7) for _ in range(2)]
        u, _, v = torch.linalg.svd(cores[0] + cores[1])
        # of both signs of the singular vectors, the one that LAPACK does not give
        u, v = -u[:, :, 0], -v[:, 0]
        own = {
            "query_proj.weight": normal(queries, hidden, std=0.3),
            "keys": normal(*shape, std=0.5),
            "values_proj.weight": normal(hidden, width, std=0.1),
            "query_norm.weight": 0.5 + normal(sizes.width, std=0.1),
            "keys_norm.weight": 0.5 + normal(sizes.width, std=0.1),
            "shuffle_index": torch.randperm(sub_keys**2, generator=draw),
            "tucker_core_u": u[None, :, None].clone(),
            "tucker_core_v": v[None, :, None].clone(),
            **{f"tucker_core.{number}": core for number, core in enumerate(cores)},
        }
        if sizes.second:
            own["pre_values_proj.weight"] = normal(sizes.pre_value_width, hidden, std=0.3)
        else:
            own["values_for_look_up"] = normal(sizes.side**2, sizes.value_width, std=1)
        found |= {f"transformer.mem_blocks.{number}.{name}": x for name, x in own.items()}
    if sizes.second:
        widths = {"values": sizes.value_width, "pre_values": sizes.pre_value_width}
        found |= {
            f"transformer.full_memory_layer.{name}_for_look_up": normal(sizes.ring, width, std=0.5)
            for name, width in widths.items()
        }
    return found


def loss_of(checkpoint: dict[str, Tensor], sizes: Sizes, tokens: Tensor) -> float:
    """Mean cross entropy of the next token, in float64."""
    weights = {name: weight.double() for name, weight in checkpoint.items()}
    x = weights["transformer.wte.weight"][tokens[:-1]]
    in_flight: dict[int, Tensor] = {}
    reads = {first: (number, last) for number, (first, last) in enumerate(sizes.spans)}
    for layer in range(sizes.layers):
        own = _within(weights, f"transformer.blocks.{layer}.")
        x = x + _attention(_norm(x, own["attn_norm.weight"]), own, sizes)
        y = _norm(x, own["ff_norm.weight"])
        up, gate = (y @ own["ff_proj.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ own["ff_out.weight"].T
        if layer in reads:
            number, last = reads[layer]
            in_flight[last] = memory_of(weights, sizes, number, y)
        if layer in in_flight:
            x = x + in_flight.pop(layer)
    logits = _norm(x, weights["transformer.ln_f.weight"]) @ weights["transformer.wte.weight"].T
    return float(F.cross_entropy(logits, tokens[1:]))


def memory_of(
    weights: dict[str, Tensor], sizes: Sizes, number: int, x: Tensor, all_queries: bool = False
) -> Tensor:
    """The output of one memory for tokens [T, D].

    Args:
        weights: of the checkpoint.
        sizes: of the model.
        number: of the memory.
        x: the tokens.
        all_queries: whether each rank has its own row and column query, as in the paper, not the
            two first ones, which the released code takes.
    """
    own = _within(weights, f"transformer.mem_blocks.{number}.")
    queries = (x @ own["query_proj.weight"].T).view(len(x), -1, sizes.width)
    queries = _norm(queries, own["query_norm.weight"])
    if all_queries:
        row_query, column_query = queries.unflatten(1, (2, sizes.ranks)).unbind(1)
    else:
        row_query, column_query = (queries[:, [i] * sizes.ranks] for i in range(2))
    keys = _norm(own["keys"].transpose(3, 4), own["keys_norm.weight"])
    cores = torch.stack([own[f"tucker_core.{core}"] for core in range(2)])
    rows, columns = (
        torch.einsum("tac,hnac->thna", query, keys[:, side])
        for side, query in enumerate((row_query, column_query))
    )
    u, v = own["tucker_core_u"][0, :, 0], own["tucker_core_v"][0, :, 0]
    best_rows = torch.einsum("thna,ha->thn", rows, u).topk(sizes.topk).indices
    best_columns = torch.einsum("thna,ha->thn", columns, v).topk(sizes.topk).indices
    # every pair by every core, and of the pairs of the best rows and columns the best ones
    scores = torch.einsum("thia,ohab,thjb->othij", rows, cores, columns)
    chosen = torch.full(scores.shape[1:], -torch.inf, dtype=scores.dtype)
    for t in range(len(x)):
        for h in range(sizes.memory_heads):
            pairs = best_rows[t, h][:, None], best_columns[t, h][None]
            chosen[t, h][pairs] = scores.detach()[:, t, h][:, pairs[0], pairs[1]].sum(0)
    ids = chosen.flatten(2).topk(sizes.topk).indices
    singles = scores.flatten(3).gather(3, ids.expand(2, *ids.shape)).flatten(2)
    virtual = own["shuffle_index"].long()[ids.flatten(1)]
    count = sizes.side**2
    block, row = virtual // count, virtual % count
    blocks = sizes.expansion**2
    if sizes.second:
        ring = _within(weights, "transformer.full_memory_layer.")
        row = (row + number * sizes.num_keys**2) % sizes.ring
        values, pre_values = ring["values_for_look_up"][row], ring["pre_values_for_look_up"][row]
        dots = torch.einsum("tlp,tp->tl", pre_values, x @ own["pre_values_proj.weight"].T)
        singles = singles * dots
    else:
        values = own["values_for_look_up"][row]
    weighted = values.unflatten(-1, (2, -1)) * singles.permute(1, 2, 0)[..., None]
    sums = [(weighted.flatten(2) * (block == b)[..., None]).sum(1) for b in range(blocks)]
    out = sum(sums) if sizes.second else torch.cat(sums, -1)
    return out @ own["values_proj.weight"].T


def _within(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): x for n, x in weights.items() if n.startswith(prefix)}


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain


def _rotated(x: Tensor) -> Tensor:
    """[tokens, heads, dim], where dimensions i and i + dim / 2 are rotated together."""
    tokens, _, dim = x.shape
    frequencies = ROTARY_BASE ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    angles = (torch.arange(tokens, dtype=x.dtype)[:, None] * frequencies)[:, None]
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def _attention(x: Tensor, own: dict[str, Tensor], sizes: Sizes) -> Tensor:
    tokens, head = len(x), sizes.hidden // sizes.heads
    parts = [sizes.hidden, *[sizes.groups * head] * 2]
    q, k, v = (
        part.view(tokens, -1, head) for part in (x @ own["att_proj.weight"].T).split(parts, -1)
    )
    q, k = _rotated(_norm(q, own["q_norm.weight"])), _rotated(_norm(k, own["k_norm.weight"]))
    repeat = sizes.heads // sizes.groups
    k, v = (y.repeat_interleave(repeat, dim=1) for y in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / head**0.5
    ahead = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    shares = scores.masked_fill(ahead, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", shares, v).flatten(1) @ own["attn_out.weight"].T
