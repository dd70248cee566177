"""The published model in plain torch, written from its description, and random checkpoints."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPSILON = 1e-5
ROTARY_BASE = 10_000


@dataclass(frozen=True)
class Sizes:
    """The sizes of a small model, some of them odd, to find mistakes in shapes."""

    layers: int = 3
    hidden: int = 64
    heads: int = 4
    groups: int = 2
    ffn: int = 96
    vocabulary: int = 128
    memories: tuple[int, ...] = (0, 2)
    num_keys: int = 9
    memory_heads: int = 3
    key_dim: int = 10
    value_dim: int = 40
    topk: int = 4
    gated: bool = True
    experts: bool = False


def random_checkpoint(sizes: Sizes, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint with the published keys, and numbers large enough to tell layouts apart."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=draw) * std

    hidden, head = sizes.hidden, sizes.hidden // sizes.heads
    found = {
        "tok_embeddings.weight": normal(sizes.vocabulary, hidden, std=1),
        "norm.weight": 1 + normal(hidden, std=0.3),
        "output.weight": normal(sizes.vocabulary, hidden, std=0.2),
    }
    table = normal(sizes.num_keys**2, sizes.value_dim if sizes.gated else hidden, std=1)
    tables = {"values": table}
    if sizes.experts:
        # with these values gelu is neither linear nor zero
        tables = {"values_v": table, "values_u": normal(*table.shape, std=hidden**-0.5)}
    for layer in range(sizes.layers):
        own = {
            "attention.wq.weight": normal(hidden, hidden, std=0.3),
            "attention.wk.weight": normal(sizes.groups * head, hidden, std=0.3),
            "attention.wv.weight": normal(sizes.groups * head, hidden, std=0.3),
            "attention.wo.weight": normal(hidden, hidden, std=0.3),
            "attention_norm.weight": 1 + normal(hidden, std=0.3),
            "ffn_norm.weight": 1 + normal(hidden, std=0.3),
        }
        if layer not in sizes.memories:
            own |= {
                f"feed_forward.{name}.weight": normal(*shape, std=0.2)
                for name, shape in {
                    "w1": (sizes.ffn, hidden),
                    "w2": (hidden, sizes.ffn),
                    "w3": (sizes.ffn, hidden),
                }.items()
            }
        else:
            width = sizes.memory_heads * sizes.key_dim
            keys = (2 * sizes.memory_heads * sizes.num_keys, sizes.key_dim // 2)
            own |= {
                "feed_forward.keys": normal(*keys, std=0.5),
                "feed_forward.query_proj.query_mlps.0.weight": normal(width, hidden, std=0.3),
                "feed_forward.query_proj.query_mlps.0.bias": normal(width, std=0.3),
            }
            own |= {f"feed_forward.{name}.weight": values for name, values in tables.items()}
            if sizes.gated:
                gate = (sizes.value_dim, hidden)
                own |= {
                    "feed_forward.swilu_projection.weight": normal(*gate, std=0.3),
                    "feed_forward.swilu_projection.bias": normal(sizes.value_dim, std=0.3),
                    "feed_forward.value_proj.weight": normal(hidden, sizes.value_dim, std=0.3),
                    "feed_forward.value_proj.bias": normal(hidden, std=0.3),
                }
        found |= {f"layers.{layer}.{name}": weight for name, weight in own.items()}
    return found


def loss_of(
    checkpoint: dict[str, Tensor], sizes: Sizes, tokens: Tensor, neighbours: bool = True
) -> float:
    """Mean cross entropy of the next token, in float64.

    Args:
        tokens: one sequence and the token after it.
        neighbours: rotary pairs are (0, 1), (2, 3), ..., not (0, half), (1, half + 1), ...
    """
    weights = {name: weight.double() for name, weight in checkpoint.items()}
    x = weights["tok_embeddings.weight"][tokens[:-1]]
    for layer in range(sizes.layers):
        own = {
            name.removeprefix(f"layers.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"layers.{layer}.")
        }
        x = x + _attention(_norm(x, own["attention_norm.weight"]), own, sizes, neighbours)
        y = _norm(x, own["ffn_norm.weight"])
        if layer in sizes.memories:
            x = x + _memory(y, own, sizes)
        else:
            w1, w2, w3 = (own[f"feed_forward.w{n}.weight"] for n in (1, 2, 3))
            x = x + (F.silu(y @ w1.T) * (y @ w3.T)) @ w2.T
    logits = _norm(x, weights["norm.weight"]) @ weights["output.weight"].T
    return float(F.cross_entropy(logits, tokens[1:]))


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + NORM_EPSILON).sqrt() * gain


def _rotated(x: Tensor, neighbours: bool) -> Tensor:
    """[tokens, heads, dim] with each pair of dimensions rotated by frequency times position."""
    tokens, _, dim = x.shape
    frequencies = ROTARY_BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = (torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies)[:, None]
    cos, sin = angles.cos(), angles.sin()
    if neighbours:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def _attention(x: Tensor, own: dict[str, Tensor], sizes: Sizes, neighbours: bool) -> Tensor:
    tokens, head = len(x), sizes.hidden // sizes.heads
    q, k, v = (
        (x @ own[f"attention.{name}.weight"].T).view(tokens, -1, head)
        for name in ("wq", "wk", "wv")
    )
    q, k = _rotated(q, neighbours), _rotated(k, neighbours)
    repeat = sizes.heads // sizes.groups
    k, v = (y.repeat_interleave(repeat, dim=1) for y in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / head**0.5
    ahead = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    shares = scores.masked_fill(ahead, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", shares, v).flatten(1) @ own["attention.wo.weight"].T


def _memory(x: Tensor, own: dict[str, Tensor], sizes: Sizes) -> Tensor:
    """The softmax-weighted sum of the rows with the K largest of a head's N * N scores."""
    heads, keys, half = sizes.memory_heads, sizes.num_keys, sizes.key_dim // 2
    query = "feed_forward.query_proj.query_mlps.0"
    q = (x @ own[f"{query}.weight"].T + own[f"{query}.bias"]).view(len(x), heads, 2, half)
    sub_keys = own["feed_forward.keys"].view(heads, 2, keys, half)
    first = torch.einsum("thc,hnc->thn", q[:, :, 0], sub_keys[:, 0])
    second = torch.einsum("thc,hnc->thn", q[:, :, 1], sub_keys[:, 1])
    scores = (first[..., :, None] + second[..., None, :]).flatten(-2)
    best, rows = scores.topk(sizes.topk, dim=-1)
    weights = best.softmax(-1)
    if sizes.experts:
        u, v = (own[f"feed_forward.values_{name}.weight"][rows] for name in "uv")
        return ((weights * F.gelu((u * x[:, None, None]).sum(-1)))[..., None] * v).sum((1, 2))
    values = own["feed_forward.values.weight"][rows]
    out = (weights[..., None] * values).sum((1, 2))
    if not sizes.gated:
        return out
    gate, proj = "feed_forward.swilu_projection", "feed_forward.value_proj"
    out = out * F.silu(x @ own[f"{gate}.weight"].T + own[f"{gate}.bias"])
    return out @ own[f"{proj}.weight"].T + own[f"{proj}.bias"]
