"""Reads the model, its stages and the bytes of its state from Megatron's arguments."""

import argparse
from typing import Any

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megamem.config import ConfigurationError
from megamem.hybrid_pattern import PREDICTION, STAGE, stage_layers, symbols
from megamem.megatron import compat
from megamem.planner import ModelShape
from megamem.planner.sizes import PARTS, Experts, LatentAttention, Placement, StateSpace

FP32_BYTES, HALF_BYTES = 4, 2
# what Megatron's optimizers store for a parameter beside its fp32 copy, if not two numbers
MOMENTS = {"sgd": 1, "lion": 1}


def shape_from_args(args: argparse.Namespace) -> ModelShape:
    """The dense model of a command line.

    Raises:
        ConfigurationError: a size is missing for which Megatron has no default, or the hidden size
            is not a multiple of the number of heads.
    """
    pattern = args.hybrid_layer_pattern
    needed = ["hidden_size", "num_attention_heads", "seq_length"]
    needed += [] if pattern else ["num_layers"]
    missing = [name for name in needed if getattr(args, name) is None]
    missing += ["vocab_size"] if args.vocab_size is None and args.padded_vocab_size is None else []
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        read = args.tokenizer_model if "vocab_size" in missing else None
        hint = f" (megamem plan does not read --tokenizer-model {read})" if read else ""
        raise ConfigurationError(f"missing flags: {flags}{hint}; add them, or use a --preset.")
    if args.num_attention_heads < 1 or args.hidden_size % args.num_attention_heads:
        raise ConfigurationError(
            f"--hidden-size {args.hidden_size} is not a multiple of --num-attention-heads "
            f"{args.num_attention_heads}; change one of them."
        )
    learned = args.position_embedding_type == "learned_absolute"
    layers, prediction = _layers(args)
    return ModelShape(
        num_layers=len(layers),
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        padded_vocab_size=args.padded_vocab_size or _padded(args),
        seq_length=args.seq_length,
        ffn_hidden_size=args.ffn_hidden_size,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        kv_channels=args.kv_channels,
        swiglu=args.swiglu,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        layer_norm_bias=args.normalization == "LayerNorm",
        qk_layernorm=args.qk_layernorm,
        untied=args.untie_embeddings_and_output_weights,
        learned_positions=(args.max_position_embeddings or args.seq_length) if learned else 0,
        output_gate=getattr(args, "attention_output_gate", False),
        latent=_latent(args),
        experts=_experts(args),
        state_space=_state_space(args) if any("M" in parts for parts in layers) else None,
        layers=layers,
        prediction=prediction,
    )


def _layers(args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parts of each layer, and of each module of multi-token prediction.

    Raises:
        ConfigurationError: the pattern of a hybrid model has a layer that the planner does not
            support.
    """
    if pattern := args.hybrid_layer_pattern:
        if unknown := set(pattern) - {*PARTS, STAGE, PREDICTION}:
            raise ConfigurationError(
                f"--hybrid-layer-pattern {pattern}: megamem plan does not support layers "
                f"{' '.join(sorted(unknown))}; replace them by others."
            )
        _, *modules = pattern.split(PREDICTION)
        layers = tuple(symbols(pattern))
    else:
        kinds = {"dense": "*-", "experts": "*E"}
        layers = tuple(kinds[kind] for kind in compat.feed_forwards(args))
        # a module has the parts of the last layer
        modules = [layers[-1]] * (args.mtp_num_layers or 0) if layers else []
    if getattr(args, "mtp_use_repeated_layer", False):
        modules = modules[:1]
    return layers, tuple(modules)


def _experts(args: argparse.Namespace) -> Experts | None:
    if args.num_experts is None:
        return None
    return Experts(
        count=args.num_experts,
        topk=args.moe_router_topk,
        width=args.moe_ffn_hidden_size or args.ffn_hidden_size or 4 * args.hidden_size,
        shared_width=args.moe_shared_expert_intermediate_size or 0,
        shared_gate=args.moe_shared_expert_gate,
        latent_width=args.moe_latent_size,
    )


def _latent(args: argparse.Namespace) -> LatentAttention | None:
    if not args.multi_latent_attention:
        return None
    return LatentAttention(
        query_rank=args.q_lora_rank,
        kv_rank=args.kv_lora_rank,
        head_width=args.qk_head_dim,
        position_width=args.qk_pos_emb_head_dim,
        value_width=args.v_head_dim,
    )


def _state_space(args: argparse.Namespace) -> StateSpace:
    return StateSpace(
        # Megatron's default makes it twice as wide as the model
        heads=args.mamba_num_heads or 2 * args.hidden_size // args.mamba_head_dim,
        head_width=args.mamba_head_dim,
        groups=args.mamba_num_groups,
        state=args.mamba_state_dim,
    )


def placement_from_args(args: argparse.Namespace, num_layers: int) -> Placement | None:
    """The layers of each virtual stage of each pipeline stage; None if they are spread evenly.

    Raises:
        ConfigurationError: the stages do not divide the layers.
    """
    stages, pattern = args.pipeline_model_parallel_size, args.hybrid_layer_pattern
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    if args.pipeline_model_parallel_layout:
        layout = PipelineParallelLayerLayout.from_str(args.pipeline_model_parallel_layout, stages)
        config: Any = argparse.Namespace(pipeline_model_parallel_layout=layout)
        return tuple(
            tuple(tuple(compat.stage_layers(config, chunk, stage)) for chunk in range(len(chunks)))
            for stage, chunks in enumerate(layout.layout)
        )
    virtual = _virtual_stages(args, num_layers)
    if pattern and STAGE in pattern:
        virtual = (pattern.split(PREDICTION)[0].count(STAGE) + 1) // stages
    elif first is None and last is None:
        if virtual == 1:
            return None
        if num_layers % (stages * virtual):
            raise ConfigurationError(
                f"--num-layers {num_layers} is not a multiple of {stages * virtual}, which "
                f"--pipeline-model-parallel-size {stages} x {virtual} virtual stages make."
            )
        each = num_layers // (stages * virtual)
        starts = range(0, num_layers, each)
        return tuple(
            tuple(tuple(range(start, start + each)) for start in starts[stage::stages])
            for stage in range(stages)
        )
    elif virtual > 1:
        raise ConfigurationError(
            "megamem plan does not support virtual stages with --decoder-first-pipeline-num-layers "
            "or --decoder-last-pipeline-num-layers; use --pipeline-model-parallel-layout."
        )
    # a GPT is divided as a hybrid model without stages in its pattern
    divided = pattern or "*" * num_layers
    return tuple(
        tuple(
            tuple(stage_layers(divided, stages, stage, chunk, first, last))
            for chunk in range(virtual)
        )
        for stage in range(stages)
    )


def _virtual_stages(args: argparse.Namespace, num_layers: int) -> int:
    """The number of virtual stages of a pipeline stage."""
    if layers := args.num_layers_per_virtual_pipeline_stage:
        return max(1, int(num_layers // args.pipeline_model_parallel_size // layers))
    return int(args.num_virtual_stages_per_pipeline_rank or 1)


def state_bytes(args: argparse.Namespace, half: bool) -> tuple[int, float]:
    """Bytes per parameter of gradients, and of the optimizer state on the GPU, dense model."""
    precise = args.use_precision_aware_optimizer
    # gradients of FSDP2 have the dtype of the weights
    in_half = half and (args.use_torch_fsdp2 or _reduces_in_half(args))
    numbers = MOMENTS.get(args.optimizer, 2)
    if precise:
        moments = [_dtype_bytes(args.exp_avg_dtype), _dtype_bytes(args.exp_avg_sq_dtype)]
        state = float(sum(moments[:numbers]))
        # Transformer Engine keeps what bf16 weights lack of fp32 ones, which is half of them
        halved = args.bf16 or args.main_params_dtype != "fp32"
        state += HALF_BYTES if halved else FP32_BYTES
    else:
        # a gradient that is reduced in half precision is copied to fp32 for the step
        copies = (FP32_BYTES if half else 0) + (FP32_BYTES if in_half else 0)
        state = float(FP32_BYTES * numbers + copies)
    if args.optimizer_cpu_offload:
        state *= 1 - args.optimizer_offload_fraction
    return HALF_BYTES if in_half else FP32_BYTES, state


def table_gradient_bytes(args: argparse.Namespace, half: bool) -> int:
    """Bytes per parameter of the gradients of the table, which FSDP2 leaves alone."""
    in_half = half and not args.use_torch_fsdp2 and _reduces_in_half(args)
    return HALF_BYTES if in_half else FP32_BYTES


def _reduces_in_half(args: argparse.Namespace) -> bool:
    """Whether a model in half precision has gradients in half precision, too."""
    return bool(
        args.grad_reduce_in_bf16
        or (args.fp16 and not args.accumulate_allreduce_grads_in_fp32)
        or (args.use_precision_aware_optimizer and args.main_grads_dtype != "fp32")
    )


def _dtype_bytes(name: str) -> int:
    """Bytes of a number of an optimizer's state."""
    return {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}[name]


def _padded(args: argparse.Namespace) -> int:
    """The number of rows of the embedding, rounded up as Megatron does."""
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return -(-args.vocab_size // multiple) * multiple
