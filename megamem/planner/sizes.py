"""Parameters and FLOPs of a model, dense parts and memory layers, in closed form."""

import functools
import math
from dataclasses import dataclass, replace

from megamem.config import ConfigurationError
from megamem.layers.init import WeightFactory
from megamem.layers.variants import table_names, variant_of
from megamem.spec import MemorySpec

FORWARD_AND_BACKWARD = 3
MULTIPLY_AND_ADD = 2


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A dense GPT as Megatron's flags describe it; most fields are named like the flags."""

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
        return self.attention_width + 2 * groups * self.attention_width // self.num_attention_heads


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
    """One layer without its feed-forward: attention and norms."""
    ffn: int
    """One feed-forward."""
    final_norm: int


def dense_parts(shape: ModelShape, tp: int = 1) -> Parameters:
    """Parameters of the dense model by part.

    With tp > 1 matrices are sharded; norms and output biases are not.
    """
    hidden, norm = shape.hidden_size, shape.hidden_size * (2 if shape.layer_norm_bias else 1)
    width, qkv = shape.attention_width, shape.qkv_width
    head = width // shape.num_attention_heads
    bias = shape.add_bias_linear
    attention = (hidden * qkv + hidden * width) // tp
    attention += (qkv // tp if bias or shape.add_qkv_bias else 0) + (hidden if bias else 0)
    qk_norms = 2 * head * (2 if shape.layer_norm_bias else 1) if shape.qk_layernorm else 0
    inner = shape.ffn_width * (2 if shape.swiglu else 1)
    ffn = (hidden * inner + shape.ffn_width * hidden) // tp + (inner // tp + hidden if bias else 0)
    words = shape.padded_vocab_size * hidden // tp
    return Parameters(
        embeddings=words + shape.learned_positions * hidden,
        output=words if shape.untied else 0,
        layer=attention + 2 * norm + qk_norms,
        ffn=ffn,
        final_norm=norm,
    )


def memory_layer_parameters(spec: MemorySpec) -> int:
    """Parameters of one memory layer without the value table.

    They are the query projection, the sub-keys, the gains of the q/k norm and the variant's output.
    """
    query = (spec.hidden_size + 1) * spec.heads * spec.key_dim
    sub_keys = spec.heads * spec.num_keys * spec.key_dim
    gains = spec.key_dim + spec.key_dim // 2 if spec.qk_norm else 0
    return query + sub_keys + gains + sum(math.prod(shape) for shape in output_shapes(spec))


@functools.cache
def output_shapes(spec: MemorySpec) -> list[tuple[int, ...]]:
    """The shapes of all weights of a memory layer's output; nothing is allocated."""
    make = WeightFactory(seed=0, name="shapes", device="meta")
    return [tuple(weight.shape) for weight in variant_of(spec).output(spec, make).parameters()]


def table_parameters(spec: MemorySpec) -> int:
    """Parameters of all value tables of the model."""
    return len(table_names(spec)) * spec.num_rows * spec.value_dim


def total_parameters(shape: ModelShape, spec: MemorySpec | None) -> dict[str, int]:
    """Part of the model -> its number of parameters, and their sum as `total`."""
    parts = dense_parts(shape)
    places = len(spec.layers) if spec else 0
    kept = shape.num_layers if spec and spec.keep_ffn else shape.num_layers - places
    found = {
        "embeddings": parts.embeddings + parts.output,
        "attention and norms": shape.num_layers * parts.layer + parts.final_norm,
        "feed-forwards": kept * parts.ffn,
    }
    if spec:
        found["memory layers"] = places * memory_layer_parameters(spec)
        found["value table"] = table_parameters(spec)
    return found | {"total": sum(found.values())}


def stage_parameters(shape: ModelShape, spec: MemorySpec, tp: int, pp: int) -> list[int]:
    """Parameters per rank of each pipeline stage, without the value table.

    A memory layer's own weights are not sharded.
    """
    parts = dense_parts(shape, tp)
    own = memory_layer_parameters(spec)
    stages = []
    for stage in range(pp):
        layers = stage_layers(shape.num_layers, pp, stage)
        places = sum(layer in layers for layer in spec.layers)
        ffns = len(layers) if spec.keep_ffn else len(layers) - places
        count = len(layers) * parts.layer + ffns * parts.ffn + places * own
        if stage == 0:
            count += parts.embeddings
        if stage == pp - 1:
            count += parts.final_norm + parts.output
            # under pipeline parallelism the last stage holds a copy of a tied embedding
            count += (
                0
                if shape.untied or pp == 1
                else shape.padded_vocab_size // tp * (shape.hidden_size)
            )
        stages.append(count)
    return stages


def stage_layers(num_layers: int, pp: int, stage: int) -> range:
    """The layers of a pipeline stage, where layers are spread evenly."""
    return range(stage * num_layers // pp, (stage + 1) * num_layers // pp)


def memory_flops_per_token(spec: MemorySpec) -> int:
    """Matrix FLOPs per token of one memory layer, forward and backward.

    Reading the table counts as none, and so do PEER's products of u with the token: like the sum
    of a bag they take one multiply-add per number that is read, and their time is that of reading
    the rows.
    """
    query = spec.hidden_size * spec.heads * spec.key_dim
    output = sum(math.prod(shape) for shape in output_shapes(spec) if len(shape) == 2)
    matrices = FORWARD_AND_BACKWARD * MULTIPLY_AND_ADD * (query + output)
    return matrices + score_flops_per_token(spec)


def score_flops_per_token(spec: MemorySpec) -> int:
    """The part of memory_flops_per_token() that the scores of sub-keys take."""
    scores = spec.heads * spec.num_keys * spec.key_dim
    return FORWARD_AND_BACKWARD * MULTIPLY_AND_ADD * scores


def dense_flops_per_token(shape: ModelShape, spec: MemorySpec | None) -> int:
    """Matrix FLOPs per token of everything but the memory layers, forward and backward.

    Attention is causal.
    """
    without_norms = replace(shape, add_bias_linear=False, add_qkv_bias=False)
    width, inner = shape.attention_width, shape.ffn_width * (3 if shape.swiglu else 2)
    attention = shape.hidden_size * (without_norms.qkv_width + width)
    # scores and their product with the values, over half of the sequence on average
    attention += width * shape.seq_length
    ffns = shape.num_layers - (0 if spec is None or spec.keep_ffn else len(spec.layers))
    matrices = shape.num_layers * attention + ffns * shape.hidden_size * inner
    matrices += shape.padded_vocab_size * shape.hidden_size
    return FORWARD_AND_BACKWARD * MULTIPLY_AND_ADD * matrices
