"""Parameters and FLOPs of a model, dense parts and memory layers, in closed form.

A layer is written as the symbols of its parts, in the order in which they are applied, each behind
a norm: "*" is attention, "-" a feed-forward, "E" a mixture of experts, "M" a state-space layer. A
layer of a GPT is "*-" or "*E"; one of a hybrid model is a single part.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from megamem.config import ConfigurationError
from megamem.layers.init import WeightFactory
from megamem.layers.query_conv import QueryConv
from megamem.layers.variants import pool_names, variant_of
from megamem.spec import MemorySpec

FORWARD_AND_BACKWARD = 3
MULTIPLY_AND_ADD = 2


ATTENTION, FEED_FORWARD, EXPERTS, STATE_SPACE = "*", "-", "E", "M"
PARTS = ATTENTION + FEED_FORWARD + EXPERTS + STATE_SPACE


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts."""

    count: int
    """Number of experts."""
    topk: int
    """Experts that a token is sent to."""
    width: int
    """Inner width of one expert."""
    shared_width: int = 0
    """Inner width of the shared experts, which every token is sent to."""
    shared_gate: bool = False
    """The output of the shared experts is gated."""
    latent_width: int | None = None
    """Width of the tokens that the experts get, if they are projected before."""


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-latent attention."""

    query_rank: int | None
    """Width of a token's compressed queries; None if they are not compressed."""
    kv_rank: int
    """Width of a token's compressed keys and values."""
    head_width: int
    """Width of a head without its part for positions."""
    position_width: int
    """Width of the part of a head that encodes positions."""
    value_width: int
    """Width of a head's values."""


@dataclass(frozen=True, kw_only=True)
class StateSpace:
    """A layer of Mamba 2."""

    heads: int
    head_width: int
    groups: int
    state: int
    """Numbers of state for each channel."""
    convolution: int = 4

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_width


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model as Megatron's flags describe it; most fields are named like the flags."""

    num_layers: int
    """Layers of the model."""
    hidden_size: int
    """Width of a token's hidden state."""
    num_attention_heads: int
    """Query heads of attention."""
    padded_vocab_size: int
    """Rows of the embedding, padding included."""
    seq_length: int
    """Tokens per sequence."""
    ffn_hidden_size: int | None = None
    """Inner width of a feed-forward. Default: Megatron's, 4 hidden sizes; 8 / 3 with --swiglu."""
    num_query_groups: int | None = None
    """Key and value heads. Default: as many as query heads."""
    kv_channels: int | None = None
    """Width of an attention head. Default: hidden size / heads."""
    swiglu: bool = False
    """The feed-forward is gated, with two input matrices."""
    add_bias_linear: bool = True
    """Linear layers have biases."""
    add_qkv_bias: bool = False
    """Query, key and value have biases even where other linears do not."""
    layer_norm_bias: bool = True
    """Norms have biases, as LayerNorm has; RMSNorm has none."""
    qk_layernorm: bool = False
    """Attention normalises queries and keys."""
    untied: bool = False
    """The output layer has its own matrix and does not share the embedding's."""
    learned_positions: int = 0
    """Rows of a learned position embedding; 0 with RoPE."""
    output_gate: bool = False
    """The output of attention is gated."""
    latent: LatentAttention | None = None
    """Attention is multi-latent."""
    experts: Experts | None = None
    """The mixture of experts of all layers that have one."""
    state_space: StateSpace | None = None
    """The state-space layer of a hybrid model."""
    layers: tuple[str, ...] | None = None
    """The parts of each layer. Default: attention and a feed-forward, in all layers."""
    prediction: tuple[str, ...] = ()
    """The parts of each further module that predicts tokens (multi-token prediction)."""

    @property
    def layer_parts(self) -> tuple[str, ...]:
        """The parts of each layer."""
        return self.layers or (ATTENTION + FEED_FORWARD,) * self.num_layers

    def __post_init__(self) -> None:
        positive = ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size")
        ConfigurationError.collect(
            [
                f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1."
                for name in (*positive, "seq_length", "ffn_hidden_size", "num_query_groups")
                if (value := getattr(self, name)) is not None and value < 1
            ]
        )

    @property
    def ffn_width(self) -> int:
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        # Megatron's default keeps a gated feed-forward at the parameters of a plain one
        return int(4 * self.hidden_size * 2 / 3) // 64 * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def attention_width(self) -> int:
        """Width of all query heads together."""
        channels = self.kv_channels or self.hidden_size // self.num_attention_heads
        return channels * self.num_attention_heads

    @property
    def qkv_width(self) -> int:
        groups = self.num_query_groups or self.num_attention_heads
        queries = self.attention_width * (2 if self.output_gate else 1)
        return queries + 2 * groups * self.attention_width // self.num_attention_heads


PRESETS = {
    # layers, hidden, heads, FFN, key and value heads, vocabulary, sequence, memory layers
    "134m": (12, 768, 12, 2048, 12, 32_000, 2048, [2, 6, 10]),
    "373m": (24, 1024, 16, 2816, 16, 32_000, 2048, [4, 12, 20]),
    "1.3b": (22, 2048, 16, 5632, 16, 32_000, 2048, [3, 11, 19]),
    "8b": (32, 4096, 32, 14336, 8, 128_256, 4096, [8, 16, 24]),
}
"""The base models of "Memory Layers at Scale" (section 4; the 8B has the shape of Llama 3), and the
three layers whose feed-forward Memory+ replaces in each."""


def preset(name: str) -> tuple[ModelShape, list[int]]:
    """The shape of a published base model, and the layers whose feed-forward becomes a memory."""
    layers, hidden, heads, ffn, groups, vocabulary, sequence, places = PRESETS[name]
    shape = ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=ffn,
        num_query_groups=groups,
        padded_vocab_size=vocabulary,
        seq_length=sequence,
        swiglu=True,
        add_bias_linear=False,
        layer_norm_bias=False,
        untied=True,
    )
    return shape, places


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model, by part; with tp > 1, those on one tensor-parallel rank."""

    embeddings: int
    """Embeddings of tokens and learned positions."""
    output: int
    """The output matrix, where it is not shared with the embedding."""
    layer: int
    """One layer of a GPT without its feed-forward: attention and norms."""
    ffn: int
    """One feed-forward."""
    final_norm: int
    attention: int
    """Attention of one layer, without the norm before it."""
    router: int
    """What a mixture of experts has but the experts that tokens are sent to: router, shared
    experts, and projections."""
    expert: int
    """One expert of a mixture."""
    state_space: int
    """One state-space layer, without the norm before it."""

    def of_part(self, symbol: str) -> int:
        """Parameters of a part without the norm before it, and without experts."""
        return {
            ATTENTION: self.attention,
            FEED_FORWARD: self.ffn,
            EXPERTS: self.router,
            STATE_SPACE: self.state_space,
        }[symbol]

    def of_layer(self, parts: str, without_ffn: bool = False) -> int:
        """Parameters of a layer, without experts.

        Args:
            parts: the symbols of the layer.
            without_ffn: a memory is in the place of its feed-forward, or mixture of experts.
        """
        kept = _without_ffn(parts) if without_ffn else parts
        return len(parts) * self.final_norm + sum(map(self.of_part, kept))


def _without_ffn(parts: str) -> str:
    return parts.replace(FEED_FORWARD, "").replace(EXPERTS, "")


def dense_parts(shape: ModelShape, tp: int = 1, expert_tp: int | None = None) -> Parameters:
    """Parameters of the model by part, without memory layers.

    Args:
        shape: the model.
        tp: tensor-parallel ranks; matrices are sharded over them, norms and output biases are not.
        expert_tp: the same for experts. Default: tp.
    """
    hidden, norm = shape.hidden_size, shape.hidden_size * (2 if shape.layer_norm_bias else 1)
    attention = _attention(shape, tp)
    ffn = _ffn(shape, shape.ffn_width, hidden, tp)
    words = shape.padded_vocab_size * hidden // tp
    router = expert = 0
    if experts := shape.experts:
        width = experts.latent_width or hidden
        expert = _ffn(shape, experts.width, width, expert_tp or tp)
        router = experts.count * (hidden + (1 if shape.add_bias_linear else 0))
        router += 2 * hidden * width if experts.latent_width else 0
        if experts.shared_width:
            router += _ffn(shape, experts.shared_width, hidden, tp)
            router += hidden if experts.shared_gate else 0
    return Parameters(
        embeddings=words + shape.learned_positions * hidden,
        output=words if shape.untied else 0,
        layer=attention + 2 * norm,
        ffn=ffn,
        final_norm=norm,
        attention=attention,
        router=router,
        expert=expert,
        state_space=_state_space(shape, tp),
    )


def _ffn(shape: ModelShape, width: int, outer: int, tp: int) -> int:
    """Parameters of a feed-forward of this inner width between vectors of the outer width."""
    inner = width * (2 if shape.swiglu else 1)
    biases = inner // tp + outer if shape.add_bias_linear else 0
    return (outer * inner + width * outer) // tp + biases


def _attention(shape: ModelShape, tp: int) -> int:
    hidden, bias = shape.hidden_size, shape.add_bias_linear
    out_bias = hidden if bias else 0
    norm_size = 2 if shape.layer_norm_bias else 1
    if latent := shape.latent:
        heads, head = shape.num_attention_heads, latent.head_width + latent.position_width
        # the matrices that compress are on every tensor-parallel rank
        compressed = latent.kv_rank + latent.position_width + (latent.query_rank or 0)
        sharded = (latent.query_rank or hidden) * heads * head
        sharded += latent.kv_rank * heads * (latent.head_width + latent.value_width)
        sharded += heads * latent.value_width * hidden
        norms = (latent.kv_rank + (latent.query_rank or 0)) * norm_size if shape.qk_layernorm else 0
        return hidden * compressed + sharded // tp + norms + out_bias
    width, qkv = shape.attention_width, shape.qkv_width
    qk_norms = 2 * width // shape.num_attention_heads * norm_size if shape.qk_layernorm else 0
    biases = (qkv // tp if bias or shape.add_qkv_bias else 0) + out_bias
    return (hidden * qkv + hidden * width) // tp + biases + qk_norms


def _state_space(shape: ModelShape, tp: int) -> int:
    if (mamba := shape.state_space) is None:
        return 0
    mixed = mamba.inner + 2 * mamba.groups * mamba.state
    matrices = shape.hidden_size * (mamba.inner + mixed + mamba.heads)
    matrices += mamba.inner * shape.hidden_size
    biases = mamba.inner + mixed + mamba.heads if shape.add_bias_linear else 0
    # the convolution with its bias, three numbers for each head, and a norm
    small = mixed * (mamba.convolution + 1) + 3 * mamba.heads + mamba.inner
    return (matrices + biases + small) // tp + (shape.hidden_size if shape.add_bias_linear else 0)


def memory_layer_parameters(spec: MemorySpec) -> int:
    """Parameters of one memory layer without the tables.

    They are those of the query and the convolution before it, the sub-keys with their cores and
    norms, what the variant makes of a token for the owners of rows, and the output.
    """
    return sum(math.prod(shape) for shapes in layer_shapes(spec).values() for shape in shapes)


@functools.cache
def layer_shapes(spec: MemorySpec) -> dict[str, list[tuple[int, ...]]]:
    """Part of a memory layer -> the shapes of all of its weights; nothing is allocated."""
    make, variant = WeightFactory(seed=0, name="shapes", device="meta"), variant_of(spec)
    parts = {
        "convolution": QueryConv(spec, make, None) if spec.query_conv else nn.Identity(),
        "query": variant.query(spec, make),
        "keys": variant.keys(spec, make),
        "token": variant.token(spec, make),
        "output": variant.output(spec, make),
    }
    return {
        name: [tuple(weight.shape) for weight in part.parameters()] for name, part in parts.items()
    }


def table_widths(spec: MemorySpec) -> list[int]:
    """The width of the rows of each table of a pool."""
    variant = variant_of(spec)
    return [variant.table_width(spec, use) for use in variant.tables]


def table_parameters(spec: MemorySpec) -> int:
    """Parameters of all tables of the model."""
    return len(pool_names(spec)) * spec.num_rows * sum(table_widths(spec))


def numbers_read(spec: MemorySpec) -> int:
    """Numbers of all tables that one memory layer reads for a token."""
    return spec.lookups_per_token * sum(table_widths(spec))


def total_parameters(shape: ModelShape, spec: MemorySpec | None) -> dict[str, int]:
    """Part of the model -> its number of parameters, and their sum as `total`."""
    parts = dense_parts(shape)
    layers = _layers_left(shape, spec)
    ffns = sum(layer.count(FEED_FORWARD) for layer in layers)
    mixtures = sum(layer.count(EXPERTS) for layer in layers)
    mixers = sum(parts.of_layer(_without_ffn(layer)) for layer in layers)
    # norms stay where a memory is in the place of what follows them
    norms = sum(len(layer) for layer in map(_only_ffn, shape.layer_parts)) * parts.final_norm
    mixing = "attention, state spaces and norms" if shape.state_space else "attention and norms"
    found = {
        "embeddings": parts.embeddings + parts.output,
        mixing: mixers + norms + parts.final_norm,
        "feed-forwards": ffns * parts.ffn,
    }
    if shape.experts:
        found["experts"] = mixtures * (parts.router + shape.experts.count * parts.expert)
    if shape.prediction:
        found["multi-token prediction"] = sum(
            dense + experts for dense, experts in _prediction(shape, parts)
        )
    if spec:
        found["memory layers"] = len(spec.layers) * memory_layer_parameters(spec)
        found["value table"] = table_parameters(spec)
    return found | {"total": sum(found.values())}


def active_parameters(shape: ModelShape, spec: MemorySpec) -> int:
    """Parameters that one token meets: of experts those it is sent to, of tables the rows it reads.

    Multi-token prediction is counted, as it is trained with the model.
    """
    idle = 0
    if shape.experts:
        mixtures = sum(layer.count(EXPERTS) for layer in _layers_left(shape, spec))
        mixtures += sum(layer.count(EXPERTS) for layer in shape.prediction)
        idle = mixtures * (shape.experts.count - shape.experts.topk) * dense_parts(shape).expert
    read = len(spec.layers) * numbers_read(spec)
    return total_parameters(shape, spec)["total"] - idle - table_parameters(spec) + read


def _layers_left(shape: ModelShape, spec: MemorySpec | None) -> list[str]:
    """The parts of each layer that are left beside memories."""
    gone = () if spec is None or spec.keep_ffn else spec.layers
    return [
        _without_ffn(parts) if layer in gone else parts
        for layer, parts in enumerate(shape.layer_parts)
    ]


def _only_ffn(parts: str) -> str:
    return "".join(symbol for symbol in parts if symbol in FEED_FORWARD + EXPERTS)


def _prediction(shape: ModelShape, parts: Parameters, tp: int = 1) -> list[tuple[int, int]]:
    """(parameters without experts, those of one expert times their number) of each module."""
    # norms of the embedding, of the hidden state, and of the output; and the matrix that joins them
    own = 3 * parts.final_norm + 2 * shape.hidden_size**2 // tp
    count = shape.experts.count if shape.experts else 0
    return [
        (own + parts.of_layer(module), module.count(EXPERTS) * count * parts.expert)
        for module in shape.prediction
    ]


@dataclass(frozen=True)
class Held:
    """Parameters on one rank of a pipeline stage, without the value table."""

    dense: int
    """All but experts."""
    experts: int
    """Experts, which are spread over the expert-parallel ranks."""

    @property
    def total(self) -> int:
        return self.dense + self.experts


Placement = Sequence[Sequence[Sequence[int]]]
"""The layers of each virtual stage of each pipeline stage."""


def stage_parameters(
    shape: ModelShape,
    spec: MemorySpec,
    tp: int,
    placement: Placement,
    expert_ranks: int = 1,
    expert_tp: int | None = None,
) -> list[Held]:
    """Parameters per rank of each pipeline stage, without the value table.

    A memory layer's own weights are not sharded.

    Args:
        shape: the model.
        spec: the memory layers.
        tp: tensor-parallel ranks.
        placement: the layers of each stage.
        expert_ranks: expert-parallel ranks.
        expert_tp: tensor-parallel ranks of experts. Default: tp.
    """
    parts = dense_parts(shape, tp, expert_tp)
    own, left = memory_layer_parameters(spec), _layers_left(shape, spec)
    count = shape.experts.count // expert_ranks if shape.experts else 0
    stages = []
    for stage, chunks in enumerate(placement):
        layers = [layer for chunk in chunks for layer in chunk]
        memories = [layer for layer in layers if layer in spec.layers]
        dense = len(memories) * own
        for layer in layers:
            replaced = layer in memories and not spec.keep_ffn
            dense += parts.of_layer(shape.layer_parts[layer], without_ffn=replaced)
        experts = sum(left[layer].count(EXPERTS) for layer in layers) * count * parts.expert
        last = stage == len(placement) - 1
        if stage == 0:
            dense += parts.embeddings
        if last:
            dense += parts.final_norm + parts.output
            dense += sum(module for module, _ in _prediction(shape, parts, tp))
            modules = sum(module.count(EXPERTS) for module in shape.prediction)
            experts += modules * count * parts.expert
        # under pipeline parallelism the last stage has a copy of the embedding, if it needs it
        if last and len(placement) > 1 and (shape.prediction or not shape.untied):
            dense += shape.padded_vocab_size * shape.hidden_size // tp
        stages.append(Held(dense, experts))
    return stages


def even_placement(num_layers: int, stages: int) -> Placement:
    """The layers of each stage, where they are spread evenly and there are no virtual stages."""
    return tuple(
        (tuple(range(stage * num_layers // stages, (stage + 1) * num_layers // stages)),)
        for stage in range(stages)
    )


def memory_flops_per_token(spec: MemorySpec) -> int:
    """Matrix FLOPs per token of one memory layer, forward and backward.

    Reading the table counts as none, and so do the products of a row with the token, those of PEER
    and of UltraMemV2: like the sum of a bag they take one multiply-add per number that is read, and
    their time is that of reading the rows.
    """
    shapes = layer_shapes(spec)
    matrices = sum(
        math.prod(shape)
        for part in ("convolution", "query", "token", "output")
        for shape in shapes[part]
        if len(shape) > 1
    )
    return FORWARD_AND_BACKWARD * MULTIPLY_AND_ADD * matrices + score_flops_per_token(spec)


def score_flops_per_token(spec: MemorySpec) -> int:
    """The part of memory_flops_per_token() that the scores of sub-keys, and of pairs of them by
    Tucker cores, take."""
    scores = spec.heads * spec.keys_per_side * spec.key_dim * max(1, spec.tucker_rank)
    return FORWARD_AND_BACKWARD * MULTIPLY_AND_ADD * (scores + _pair_products(spec))


def _pair_products(spec: MemorySpec) -> int:
    """Multiply-adds per token of the second stage of Tucker scores, core by core: the K kept rows
    by the core, and the result by the K kept columns."""
    rank, topk = spec.tucker_rank, spec.topk
    return spec.heads * spec.cores * (topk * rank**2 + topk**2 * rank)


def dense_flops_per_token(shape: ModelShape, spec: MemorySpec | None) -> int:
    """Matrix FLOPs per token of everything but the memory layers, forward and backward.

    Attention is causal. Of experts those are counted that a token is sent to; of state-space layers
    the projections.
    """
    layers = [*_layers_left(shape, spec), *shape.prediction]
    matrices = sum(_matrices(shape, symbol) for parts in layers for symbol in parts)
    outputs = 1 + len(shape.prediction)
    matrices += outputs * shape.padded_vocab_size * shape.hidden_size
    matrices += len(shape.prediction) * 2 * shape.hidden_size**2
    return FORWARD_AND_BACKWARD * MULTIPLY_AND_ADD * matrices


def _matrices(shape: ModelShape, symbol: str) -> int:
    """Numbers of the matrices of a part that one token is multiplied with."""
    bare = replace(shape, add_bias_linear=False, add_qkv_bias=False, qk_layernorm=False)
    if symbol == ATTENTION:
        keys = values = shape.attention_width
        if latent := shape.latent:
            keys = shape.num_attention_heads * (latent.head_width + latent.position_width)
            values = shape.num_attention_heads * latent.value_width
        # scores and their product with the values, over half of the sequence on average
        return _attention(bare, 1) + (keys + values) * shape.seq_length // 2
    parts = dense_parts(bare)
    if symbol == EXPERTS:
        assert shape.experts is not None
        return parts.router + shape.experts.topk * parts.expert
    return parts.of_part(symbol)
