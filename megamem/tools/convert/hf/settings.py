"""The config of an exported model, from the arguments and memory settings of the run.

Only what modeling_megamem.py computes digit for digit as Megatron does is exported; for all else
the flag that stands in the way is named.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megamem.checkpoint import TUCKER_SETTINGS
from megamem.config import ConfigurationError

FORMAT, PLAIN_FORMAT = 3, 1
"""Of config.json and the names of weights: configuration_megamem.py has the first number. The
second one is that of a folder whose tables are neither quantised nor pruned nor UltraMem's, as code
of that format reads it; it would take the numbers of quantised rows for values, so those say the
first."""

MODEL_TYPE = "megamem"
CLASSES = {
    "AutoConfig": "configuration_megamem.MegamemConfig",
    "AutoModel": "modeling_megamem.MegamemModel",
    "AutoModelForCausalLM": "modeling_megamem.MegamemForCausalLM",
}
EXACT_GELU, TANH_GELU = "gelu", "gelu_pytorch_tanh"
# of --use-rope-scaling, as in Llama 3.1; Megatron has no flags for them
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class _Obstacle:
    """An argument with which a model computes something that the exported one does not."""

    name: str
    flag: str
    stands: Callable[[Any], bool] = bool


def _other_than(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value not in values


OBSTACLES = (
    _Obstacle("multi_latent_attention", "--multi-latent-attention"),
    _Obstacle("hybrid_layer_pattern", "--hybrid-layer-pattern"),
    _Obstacle("hybrid_override_pattern", "--hybrid-override-pattern"),
    _Obstacle("is_hybrid_model", "--is-hybrid-model"),
    _Obstacle("experimental_attention_variant", "--experimental-attention-variant"),
    _Obstacle("mtp_num_layers", "--mtp-num-layers"),
    _Obstacle("heterogeneous_layers_config_path", "--heterogeneous-layers-config-path"),
    _Obstacle("enable_hyper_connections", "--enable-hyper-connections"),
    _Obstacle("enable_mhc", "--enable-mhc"),
    _Obstacle("apply_layernorm_1p", "--apply-layernorm-1p"),
    _Obstacle(
        "apply_residual_connection_post_layernorm", "--apply-residual-connection-post-layernorm"
    ),
    _Obstacle("softmax_scale", "--softmax-scale"),
    _Obstacle("qk_l2_norm", "--qk-l2-norm"),
    _Obstacle("rotary_interleaved", "--rotary-interleaved"),
    _Obstacle("no_rope_freq", "--no-rope-freq"),
    _Obstacle("quick_geglu", "--quick-geglu"),
    _Obstacle("attention_output_gate", "--attention-output-gate"),
    _Obstacle("window_size", "--window-size"),
    _Obstacle("softmax_type", "--softmax-type", _other_than(None, "vanilla")),
    _Obstacle("activation_func_clamp_value", "--activation-func-clamp-value"),
    _Obstacle("glu_linear_offset", "--glu-linear-offset"),
    _Obstacle("use_mup", "--use-mup"),
    _Obstacle("moe_latent_size", "--moe-latent-size"),
    _Obstacle("moe_router_group_topk", "--moe-router-group-topk"),
    _Obstacle("moe_expert_capacity_factor", "--moe-expert-capacity-factor"),
    _Obstacle(
        "moe_router_load_balancing_type",
        "--moe-router-load-balancing-type",
        lambda value: "sinkhorn" in (value if isinstance(value, list) else [value]),
    ),
    _Obstacle(
        "position_embedding_type",
        "--position-embedding-type",
        _other_than("rope", "learned_absolute", "none", None),
    ),
)


MEMORY = (
    *("layers", "variant", "num_keys", "heads", "topk", "key_dim", "value_dim"),
    *("pool", "qk_norm", "keep_ffn"),
)
"""The memory settings in a config."""

ULTRAMEM = (*(name for name in TUCKER_SETTINGS if name != "query_conv"), "placement_seed")
"""Those of UltraMem, whose convolution is not exported. Rows of other variants have no placement in
an export."""


@dataclass(frozen=True)
class Shapes:
    """What the weights of a model tell about it."""

    vocabulary: int
    """Rows of the embedding, padding included."""

    expert_layers: list[int]
    """Layers, from 0, whose feed-forward is a mixture of experts."""

    dtype: str
    """Of all weights but the tables, as transformers names it."""


def config_of(args: argparse.Namespace, settings: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The content of config.json.

    Args:
        args: Megatron's arguments of the run, from the checkpoint.
        settings: the memory settings in the checkpoint.
        shapes: what the weights tell.

    Raises:
        ConfigurationError: the exported model would compute something else than the run's.
    """
    if problems := obstacles(args) + config_obstacles(settings):
        raise ConfigurationError(*problems)
    ultramem = {f"memory_{name}": settings[name] for name in ULTRAMEM if "cores" in settings}
    kind = getattr(args, "position_embedding_type", "rope")
    return {
        "architectures": ["MegamemForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": CLASSES,
        "megamem_format": FORMAT if ultramem else PLAIN_FORMAT,
        "dtype": shapes.dtype,
        "vocab_size": shapes.vocabulary,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        **_attention(args),
        "hidden_act": _activation(args),
        "gated_mlp": bool(args.swiglu),
        "mlp_bias": bool(args.add_bias_linear),
        "normalization": args.normalization,
        "norm_eps": getattr(args, "norm_epsilon", getattr(args, "layernorm_epsilon", 1e-5)),
        "position_embedding": "learned" if kind == "learned_absolute" else kind,
        "rope_parameters": _rope(args),
        "max_position_embeddings": args.max_position_embeddings,
        "initializer_range": args.init_method_std,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "use_cache": True,
        **(_experts(args, shapes) if shapes.expert_layers else {}),
        **{f"memory_{name}": settings[name] for name in MEMORY},
        **ultramem,
        "memory_table_device": "cuda",
    }


def obstacles(args: argparse.Namespace) -> list[str]:
    """A sentence for each argument that stands in the way of an export."""
    found = []
    for obstacle in OBSTACLES:
        value = getattr(args, obstacle.name, None)
        if obstacle.stands(value):
            said = obstacle.flag if value is True else f"{obstacle.flag} {_words(value)}"
            found.append(
                f"the run was trained with {said}, which the exported model cannot compute; "
                "export without --format hf, which keeps Megatron's names and needs Megatron."
            )
    return found


def config_obstacles(settings: dict[str, Any]) -> list[str]:
    """A sentence for each memory setting that stands in the way of an export."""
    if not settings.get("query_conv"):
        return []
    return [
        f"the run was trained with --memory-query-conv {settings['query_conv']}, which the "
        "exported model cannot compute, as it keeps no earlier tokens; export without --format hf."
    ]


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _attention(args: argparse.Namespace) -> dict[str, Any]:
    grouped = getattr(args, "group_query_attention", False)
    groups = args.num_query_groups if grouped else None
    bias = bool(args.add_bias_linear)
    return {
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": groups or args.num_attention_heads,
        "head_dim": args.kv_channels or args.hidden_size // args.num_attention_heads,
        "attention_bias": bias or bool(getattr(args, "add_qkv_bias", False)),
        "attention_output_bias": bias,
        "attention_dropout": args.attention_dropout,
        "qk_norm": bool(getattr(args, "qk_layernorm", False)),
    }


def _activation(args: argparse.Namespace) -> str:
    if args.swiglu:
        return "silu"
    if getattr(args, "squared_relu", False):
        return "relu2"
    # the fused GELU of Megatron, which adds a bias, is the approximation by tanh
    fused = args.add_bias_linear and getattr(args, "bias_gelu_fusion", False)
    return TANH_GELU if fused else EXACT_GELU


def _rope(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    if args.rotary_percent < 1:
        found["partial_rotary_factor"] = args.rotary_percent
    longer = getattr(args, "rotary_seq_len_interpolation_factor", None)
    if getattr(args, "use_rope_scaling", False):
        found |= LLAMA3 | {"rope_type": "llama3", "factor": args.rope_scaling_factor}
    elif longer not in (None, 1):
        found |= {"rope_type": "linear", "factor": float(longer)}
    return found


def _experts(args: argparse.Namespace, shapes: Shapes) -> dict[str, Any]:
    scores = getattr(args, "moe_router_score_function", "softmax")
    after = scores == "softmax" and not getattr(args, "moe_router_pre_softmax", False)
    return {
        "num_experts": args.num_experts,
        "num_experts_per_tok": args.moe_router_topk,
        "expert_layers": shapes.expert_layers,
        "moe_intermediate_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        "shared_expert_intermediate_size": args.moe_shared_expert_intermediate_size or 0,
        "shared_expert_gate": bool(getattr(args, "moe_shared_expert_gate", False)),
        "router_scores": "softmax_of_chosen" if after else scores,
        "router_bias": bool(getattr(args, "moe_router_enable_expert_bias", False)),
        "router_scaling": getattr(args, "moe_router_topk_scaling_factor", None) or 1.0,
    }
