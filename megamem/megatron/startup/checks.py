"""Refuses settings that memory layers do not work with, before anything is allocated."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from megamem.config import ConfigurationError
from megamem.megatron import compat
from megamem.megatron.startup.data_checks import data_problems
from megamem.megatron.startup.group_checks import group_problems
from megamem.ops import forms
from megamem.spec import MemorySpec


@dataclass(frozen=True)
class Refusal:
    """An option of Megatron that memory layers do not work with."""

    option: str
    """The flag, with its value if only that value is refused."""

    applies: Callable[[argparse.Namespace], bool]
    why: str
    fix: str

    def message(self) -> str:
        return f"--memory-layers does not work with {self.option}: {self.why}; {self.fix}."


def _given(name: str) -> Callable[[argparse.Namespace], bool]:
    return lambda args: bool(getattr(args, name, None))


def _captures_memory(args: argparse.Namespace) -> bool:
    """Whether CUDA graphs would capture a memory layer; graphs of attention only would not."""
    if getattr(args, "cuda_graph_impl", "none") in (None, "none"):
        return bool(getattr(args, "enable_cuda_graph", False))
    parts = getattr(args, "cuda_graph_modules", None) or getattr(args, "cuda_graph_scope", None)
    names = {str(getattr(part, "name", part)) for part in (parts or [])}
    return names != {"attn"} or args.cuda_graph_impl != "transformer_engine"


def _recomputes_in_low_precision(module: str) -> Callable[[argparse.Namespace], bool]:
    def applies(args: argparse.Namespace) -> bool:
        low = getattr(args, "fp8", None) or getattr(args, "fp4", None)
        return bool(low) and module in (getattr(args, "recompute_modules", None) or [])

    return applies


def _recomputes_memory_in_low_precision(args: argparse.Namespace) -> bool:
    """Whether an MLP without layers of Transformer Engine is recomputed in low precision."""
    kept = getattr(args, "memory_keep_ffn", False)
    return not kept and _recomputes_in_low_precision("mlp")(args)


REFUSALS = (
    Refusal(
        "--mtp-num-layers",
        _given("mtp_num_layers"),
        "its layers are built from the spec of the last decoder layer, which may be a memory layer",
        "drop it",
    ),
    Refusal(
        "--use-megatron-fsdp",
        _given("use_megatron_fsdp"),
        "it would flatten the value table and gather all of it on every rank",
        "use --use-distributed-optimizer, with which the table stays sharded",
    ),
    Refusal(
        "--use-torch-fsdp2",
        _given("use_torch_fsdp2"),
        "it would gather all of the value table on every rank",
        "use --use-distributed-optimizer, with which the table stays sharded",
    ),
    Refusal(
        "--cuda-graph-impl",
        _captures_memory,
        "a memory layer cannot be captured in a graph",
        "use --cuda-graph-impl transformer_engine with --cuda-graph-modules attn, or drop it",
    ),
    Refusal(
        "--fp8-param-gather",
        _given("fp8_param_gather"),
        "the value table cannot be stored in fp8",
        "drop it; fp8 works without it, with memory layers in bf16",
    ),
    Refusal(
        "--fp4-param-gather",
        _given("fp4_param_gather"),
        "the value table cannot be stored in fp4",
        "drop it; fp4 works without it, with memory layers in bf16",
    ),
    Refusal(
        "--recompute-modules layernorm in fp8 or fp4",
        _recomputes_in_low_precision("layernorm"),
        "it saves the input of the norm for linear_fc1, which a memory layer does not have",
        "drop layernorm from --recompute-modules",
    ),
    Refusal(
        "--recompute-modules mlp in fp8 or fp4",
        _recomputes_memory_in_low_precision,
        "Transformer Engine recomputes only modules that contain layers of its own",
        "drop mlp from --recompute-modules, or recompute all with --recompute-granularity full",
    ),
    Refusal(
        "--overlap-moe-expert-parallel-comm",
        _given("overlap_moe_expert_parallel_comm"),
        "it interleaves the layers of two microbatches, which a memory layer does not support",
        "drop it",
    ),
    Refusal(
        "--delay-wgrad-compute",
        _given("delay_wgrad_compute"),
        "a memory layer does not compute its weight gradients in a separate step",
        "drop it",
    ),
    Refusal(
        "--inference-fuse-tp-communication",
        _given("inference_fuse_tp_communication"),
        "it uses the linear layers of an MLP, which a memory layer does not have",
        "drop it",
    ),
    Refusal(
        "--transformer-impl inference_optimized",
        lambda args: getattr(args, "transformer_impl", "") == "inference_optimized",
        "its fused layers use the linear layers of an MLP, which a memory layer does not have",
        "use --transformer-impl transformer_engine or local",
    ),
    Refusal(
        "--heterogeneous-layers-config-path",
        _given("heterogeneous_layers_config_path"),
        "it gives each layer its own configuration",
        "drop it",
    ),
    Refusal(
        "--hybrid-layer-pattern",
        lambda args: _given("hybrid_layer_pattern")(args) and compat.HybridModel is None,
        "this release of Megatron-Core has no HybridModel",
        "use Megatron-Core 0.18 or later, or a model with --num-layers",
    ),
    Refusal(
        "hyper-connections",
        lambda args: _given("enable_hyper_connections")(args) or _given("enable_mhc")(args),
        "they replace the transformer layer that contains the memory layer",
        "drop them",
    ),
    Refusal(
        "--tensor-parallel-num-weight-shards",
        lambda args: getattr(args, "gtp_weight_remat_size", 1) > 1,
        "it shards weights that memory layers keep complete on each rank",
        "drop it",
    ),
    Refusal(
        "--optimizer other than adam and sgd",
        lambda args: getattr(args, "optimizer", "adam") not in ("adam", "sgd"),
        "it would orthogonalise the rows of the value table",
        "use --optimizer adam",
    ),
    Refusal(
        "--ckpt-format other than torch_dist",
        lambda args: (
            bool(getattr(args, "save", None) or getattr(args, "load", None))
            and getattr(args, "ckpt_format", "torch_dist") != "torch_dist"
        ),
        "only torch_dist stores the value table by rows",
        "use --ckpt-format torch_dist",
    ),
    Refusal(
        "--ckpt-convert-format other than torch_dist",
        lambda args: getattr(args, "ckpt_convert_format", None) not in (None, "torch_dist"),
        "only torch_dist stores the value table by rows and the state of its optimizer",
        "drop it",
    ),
)
"""All options of Megatron that are refused, in the order in which they are reported."""


def check(spec: MemorySpec, args: argparse.Namespace) -> None:
    """Refuse everything that cannot work, in one error.

    Args:
        spec: the spec of the run.
        args: the arguments of Megatron, validated by Megatron.

    Raises:
        ConfigurationError: something cannot work; the message names flags, values and fixes.
    """
    ConfigurationError.collect([said for problems in CHECKS for said in problems(spec, args)])


def refusal_problems(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence for each option of Megatron that memory layers do not work with."""
    return [refusal.message() for refusal in REFUSALS if refusal.applies(args)]


def depth_problems(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence if --memory-layers names layers that the model does not have."""
    beyond = [layer for layer in spec.layers if layer >= args.num_layers]
    if not beyond:
        return []
    return [
        f"--memory-layers {_words(beyond)} is out of range: layers are counted from 0, and "
        f"with --num-layers {args.num_layers} the last is layer {args.num_layers - 1}."
    ]


def pattern_problems(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence if --memory-layers names layers of a hybrid model that are no feed-forwards."""
    kinds = compat.feed_forwards(args)
    wrong = [n for n in spec.layers if n < len(kinds) and not kinds[n]]
    if not wrong:
        return []
    there = [layer for layer, kind in enumerate(kinds) if kind]
    return [
        f"--memory-layers {_words(wrong)} is no feed-forward: --hybrid-layer-pattern "
        f"{args.hybrid_layer_pattern}, counted from 0, has "
        + (f"them at {_words(there)}; choose among these." if there else "none; add some (-).")
    ]


def ffn_problems(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence if --memory-keep-ffn would have to keep a mixture of experts."""
    if not spec.keep_ffn:
        return []
    kinds = compat.feed_forwards(args)
    mixed = [n for n in spec.layers if n < len(kinds) and kinds[n] == "experts"]
    if not mixed:
        return []
    pattern = getattr(args, "hybrid_layer_pattern", None)
    chosen_by = "--hybrid-layer-pattern" if pattern else "--moe-layer-freq"
    return [
        f"--memory-keep-ffn keeps a dense feed-forward, but {chosen_by} makes layer "
        f"{_words(mixed)} a mixture of experts; drop --memory-keep-ffn or choose dense layers."
    ]


def _words(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def optimizer_problems(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence for each setting of the tables' optimizer that lacks another one."""
    problems = []
    if spec.lr_schedule == "constant" and spec.lr == "model":
        problems.append(
            "--memory-lr-schedule constant needs a learning rate of its own; add --memory-lr, such "
            f"as --memory-lr {getattr(args, 'lr', None) or 1e-3}."
        )
    if spec.stochastic_rounding and not args.bf16:
        problems.append(
            "--memory-stochastic-rounding rounds to bf16, but the model is not in bf16; add --bf16 "
            "or drop --memory-stochastic-rounding."
        )
    return problems


def form_problems(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence if the environment selects a form of a kernel that does not exist."""
    try:
        forms.selected()
    except ValueError as error:
        return [str(error)]
    return []


def finetune_problems(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence if a part of the model would change although --memory-finetune-rows freezes it."""
    rows = spec.finetune_rows
    if not rows or not getattr(args, "moe_router_enable_expert_bias", False):
        return []
    return [
        f"--memory-finetune-rows {rows} freezes the model, but --moe-router-enable-expert-bias "
        "changes the biases of the experts at every step; drop it."
    ]


CHECKS: tuple[Callable[[MemorySpec, argparse.Namespace], list[str]], ...] = (
    data_problems,
    refusal_problems,
    depth_problems,
    group_problems,
    pattern_problems,
    ffn_problems,
    optimizer_problems,
    finetune_problems,
    form_problems,
)
"""Functions of (spec, validated args) that return a sentence for each thing that cannot work."""
