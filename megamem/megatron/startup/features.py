"""What of Megatron works beside memory layers: one table, by which runs are refused.

The README's support matrix and `megamem doctor --flags` come from the same table.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megamem.layers.variants import VARIANTS
from megamem.megatron import compat
from megamem.megatron.model.placement import placement_from_args, share_problem, skip_problem
from megamem.spec import MemorySpec

State = Literal["yes", "refused", "not run on a GPU"]
"""`not run on a GPU` is accepted, but only a GPU can run it, and no such run is recorded."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """Something of Megatron that a run may use."""

    part: str
    """The heading under which the matrix lists it."""

    name: str
    """In words."""

    option: str
    """The flags, with their value if only that value is meant."""

    uses: Callable[[argparse.Namespace], bool]
    """Whether a run with these arguments uses it; they need not be validated."""

    state: State
    why: str = ""
    """Why it is refused, or what it needs."""

    fix: str = ""
    """What to do instead, if it is refused."""

    test: str = ""
    """The test that trains with it, below tests/; each `yes` has one."""

    values: tuple[str, ...] = ()
    """Arguments of the flags that a refusal shows with their values; without them, `option`."""

    def given(self, args: argparse.Namespace) -> str:
        """The flags as a run gave them."""
        shown = [_as_given(name, value) for name in self.values if (value := _value(args, name))]
        return " with ".join(shown) or self.option

    def problem(self, spec: MemorySpec, args: argparse.Namespace) -> str | None:
        """A sentence with the reason and the fix if the run is refused, otherwise None."""
        if self.state != "refused" or not self.uses(args):
            return None
        layers = " ".join(map(str, spec.layers))
        return (
            f"--memory-layers {layers} does not work with {self.given(args)}: {self.why}; "
            f"{self.fix}."
        )


@dataclass(frozen=True, kw_only=True)
class FeatureOfLayers(Feature):
    """Something that depends on which layers are memory layers."""

    says: Callable[[MemorySpec, argparse.Namespace], str | None]

    def problem(self, spec: MemorySpec, args: argparse.Namespace) -> str | None:
        """The sentence of `says`."""
        return self.says(spec, args)


def _value(args: argparse.Namespace, name: str) -> Any:
    value = getattr(args, name, None)
    # where Megatron has an enum, its names are the words of the command line
    return [getattr(each, "name", each) for each in value] if isinstance(value, list) else value


FLAGS = {"fp8": "--fp8-format", "fp4": "--fp4-format"}
"""Arguments whose flag has another name."""


def _as_given(name: str, value: Any) -> str:
    """A flag with its value, as on a command line."""
    flag = FLAGS.get(name, "--" + name.replace("_", "-"))
    words = value if isinstance(value, list) else [] if value is True else [value]
    return " ".join(map(str, [flag, *words]))


Uses = Callable[[argparse.Namespace], bool]


def _given(*names: str) -> Uses:
    """Whether one of these arguments is set."""
    return lambda args: any(bool(getattr(args, name, None)) for name in names)


def _more_than_one(name: str) -> Uses:
    return lambda args: (getattr(args, name, None) or 1) > 1


def _is(name: str, *values: Any) -> Uses:
    return lambda args: getattr(args, name, None) in values


def _both(*conditions: Uses) -> Uses:
    return lambda args: all(condition(args) for condition in conditions)


def _has_data_ranks(args: argparse.Namespace) -> bool:
    """Whether there are several data-parallel ranks."""
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    ranks = 1
    for name in sizes:
        ranks *= getattr(args, name, 1)
    return (getattr(args, "world_size", None) or 1) > ranks


def _makes_graphs(args: argparse.Namespace) -> bool:
    """Whether CUDA graphs capture any part of the model."""
    if getattr(args, "cuda_graph_impl", "none") in (None, "none"):
        return bool(getattr(args, "enable_cuda_graph", False))
    return True


WITHOUT_MEMORY = {"attn", "mamba", "moe", "moe_router", "moe_preprocess"}
"""Parts of a model whose graphs leave out a memory layer, which is neither MLP nor MoELayer."""


def _captures_memory(args: argparse.Namespace) -> bool:
    """Whether CUDA graphs would capture a memory layer."""
    parts = getattr(args, "cuda_graph_modules", None) or getattr(args, "cuda_graph_scope", None)
    names = {str(getattr(part, "name", part)) for part in (parts or [])}
    # no names stand for whole layers
    leaves_it_out = bool(names) and names <= WITHOUT_MEMORY
    by_parts = getattr(args, "cuda_graph_impl", "none") == "transformer_engine"
    return _makes_graphs(args) and not (leaves_it_out and by_parts)


def _captures_other_parts(args: argparse.Namespace) -> bool:
    return _makes_graphs(args) and not _captures_memory(args)


_low_precision = _given("fp8", "fp4")


def _recomputes(module: str) -> Uses:
    return lambda args: module in (getattr(args, "recompute_modules", None) or [])


def _keeps_ffn(args: argparse.Namespace) -> bool:
    """Whether feed-forwards stay beside memories."""
    variant = VARIANTS.get(getattr(args, "memory_variant", ""))
    return bool(getattr(args, "memory_keep_ffn", False) or (variant and variant.keeps_ffn))


def _recomputes_memory(args: argparse.Namespace) -> bool:
    """Whether an MLP without layers of Transformer Engine is recomputed."""
    return not _keeps_ffn(args) and _recomputes("mlp")(args)


_skips = _given("memory_skip")


def _recomputes_whole_layers(args: argparse.Namespace) -> bool:
    return getattr(args, "recompute_granularity", None) == "full"


def _takes_layers_apart(args: argparse.Namespace) -> bool:
    """Whether something of Megatron computes layers, or feed-forwards, in an order of its own."""
    chunks = ("mlp_chunks_for_training", "mlp_chunks_for_prefill")
    parts = ("overlap_moe_expert_parallel_comm", "enable_mhc_connections", "use_torch_fsdp2")
    return (
        _given(*parts, "hybrid_layer_pattern")(args)
        or any(_more_than_one(name)(args) for name in chunks)
        or _makes_graphs(args)
    )


def _skips_to_another_chunk(spec: MemorySpec, args: argparse.Namespace) -> str | None:
    """A sentence if a memory is added where it is not computed together with its own layer."""
    if not spec.skip or getattr(args, "hybrid_layer_pattern", None):
        return None
    if max(spec.layers) >= args.num_layers:
        # depth_problems() says so
        return None
    return skip_problem(spec, placement_from_args(args), args)


def _shares_across_stages(spec: MemorySpec, args: argparse.Namespace) -> str | None:
    """A sentence if layers that share tables are on several pipeline stages."""
    if spec.share_layers == 1 or max(spec.layers) >= args.num_layers:
        return None
    return share_problem(spec, placement_from_args(args))


PACKING = (
    *("sft", "reset_attention_mask", "use_packed_sequence", "sequence_packing_scheduler"),
    "rl_use_sequence_packing",
)
"""Arguments that put documents into a sequence which do not see each other."""


def _has_hybrid_model(args: argparse.Namespace) -> bool:
    return compat.HybridModel is not None


def _has_no_hybrid_model(args: argparse.Namespace) -> bool:
    return compat.HybridModel is None


def _has_virtual_stages(args: argparse.Namespace) -> bool:
    flags = _given("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
    return flags(args) or (getattr(args, "virtual_pipeline_model_parallel_size", None) or 1) > 1


def _saves(args: argparse.Namespace) -> bool:
    return _given("save", "load")(args)


def _is_of_another_format(args: argparse.Namespace) -> bool:
    return getattr(args, "ckpt_format", "torch_dist") != "torch_dist"


def _ends_in_overlapped_memory(spec: MemorySpec, args: argparse.Namespace) -> str | None:
    """A sentence if the last layer has a memory, after which Megatron would leave out a norm."""
    last = args.num_layers - 1
    if last not in spec.layers or not getattr(args, "overlap_moe_expert_parallel_comm", False):
        return None
    return (
        f"--memory-layers {' '.join(map(str, spec.layers))} does not work with "
        f"--overlap-moe-expert-parallel-comm: Megatron's build_transformer_layer_callables() then "
        f"applies the final norm only after a layer of experts, and layer {last}, the last one, "
        "has a memory; choose other layers or drop --overlap-moe-expert-parallel-comm."
    )


def _changes_frozen_biases(spec: MemorySpec, args: argparse.Namespace) -> str | None:
    """A sentence if a part of the model would change although --memory-finetune-rows freezes it."""
    rows = spec.finetune_rows
    if not rows or not getattr(args, "moe_router_enable_expert_bias", False):
        return None
    return (
        f"--memory-finetune-rows {rows} freezes the model, but --moe-router-enable-expert-bias "
        "changes the biases of the experts at every step; drop it."
    )


RANKS, MODEL, PRECISION = "Parallelism", "Model", "Precision"
MEMORY, TRAINING, FILES = "Memory and speed", "Training", "Checkpoints"

TINY = "megatron/test_tiny_training.py"
RECIPES = "megatron/test_support.py::test_a_recipe_trains"
WIDE = "megatron/test_wide_groups.py"
SKIP = "megatron/test_ultramem_skip.py"
NEEDS_ENGINE = "it needs Transformer Engine and a GPU"

FEATURES = (
    Feature(
        part=RANKS,
        name="tensor parallelism",
        option="--tensor-model-parallel-size",
        uses=_more_than_one("tensor_model_parallel_size"),
        state="yes",
        test=f"{TINY}::test_two_ranks_take_the_steps_of_one",
    ),
    Feature(
        part=RANKS,
        name="sequence parallelism",
        option="--sequence-parallel",
        uses=_given("sequence_parallel"),
        state="yes",
        test=f"{TINY}::test_two_ranks_take_the_steps_of_one",
    ),
    Feature(
        part=RANKS,
        name="pipeline parallelism, also with a table shared between stages",
        option="--pipeline-model-parallel-size",
        uses=_more_than_one("pipeline_model_parallel_size"),
        state="yes",
        test="megatron/test_pipeline_pools.py",
    ),
    Feature(
        part=RANKS,
        name="virtual pipeline stages",
        option="--num-layers-per-virtual-pipeline-stage",
        uses=_has_virtual_stages,
        state="yes",
        test=f"{TINY}::test_virtual_stages_with_a_table_for_each_layer",
    ),
    Feature(
        part=RANKS,
        name="uneven pipeline stages",
        option="--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers, "
        "--pipeline-model-parallel-layout",
        uses=_given(
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
            "pipeline_model_parallel_layout",
        ),
        state="yes",
        test=RECIPES,
    ),
    Feature(
        part=RANKS,
        name="data parallelism",
        option="--overlap-grad-reduce",
        uses=_has_data_ranks,
        state="yes",
        test=f"{TINY}::test_two_ranks_take_the_steps_of_one",
    ),
    Feature(
        part=RANKS,
        name="distributed optimizer",
        option="--use-distributed-optimizer, --overlap-param-gather",
        uses=_given("use_distributed_optimizer"),
        state="yes",
        test=f"{TINY}::test_two_ranks_take_the_steps_of_one",
    ),
    Feature(
        part=RANKS,
        name="expert parallelism",
        option="--expert-model-parallel-size",
        uses=_more_than_one("expert_model_parallel_size"),
        state="yes",
        test=RECIPES,
    ),
    Feature(
        part=RANKS,
        name="context parallelism",
        option="--context-parallel-size",
        uses=_more_than_one("context_parallel_size"),
        state="not run on a GPU",
        why=NEEDS_ENGINE,
    ),
    Feature(
        part=RANKS,
        name="context parallelism with a convolution before queries",
        option="--context-parallel-size with --memory-query-conv",
        uses=_both(_given("memory_query_conv"), _more_than_one("context_parallel_size")),
        values=("memory_query_conv", "context_parallel_size"),
        state="refused",
        why="a rank then holds two pieces of a sequence, and other ranks the tokens before them, "
        "which the convolution sees",
        fix="drop --memory-query-conv, or use tensor parallelism in place of context parallelism",
    ),
    Feature(
        part=RANKS,
        name="Megatron's FSDP",
        option="--use-megatron-fsdp",
        uses=_given("use_megatron_fsdp"),
        state="refused",
        why="it has no way to leave parameters out, so it would flatten the value table and gather "
        "all of it on every rank",
        fix="use --use-torch-fsdp2 or --use-distributed-optimizer instead, with which the table "
        "stays sharded by rows",
    ),
    Feature(
        part=RANKS,
        name="FSDP2 of torch, which leaves tables as they are",
        option="--use-torch-fsdp2",
        uses=_both(_given("use_torch_fsdp2"), lambda args: compat.RUNS_TORCH_FSDP2),
        state="yes",
        test="megatron/test_fsdp.py::test_two_ranks_take_the_steps_of_one",
    ),
    Feature(
        part=RANKS,
        name="FSDP2 of torch before Megatron-Core 0.19",
        option="--use-torch-fsdp2",
        uses=_both(_given("use_torch_fsdp2"), lambda args: not compat.RUNS_TORCH_FSDP2),
        state="refused",
        why="finalize_model_grads() of this release of Megatron-Core fails with it, also without "
        "memory layers",
        fix="use Megatron-Core 0.19 or later, or --use-distributed-optimizer",
    ),
    Feature(
        part=RANKS,
        name="weights sharded over further ranks",
        option="--tensor-parallel-num-weight-shards",
        uses=_more_than_one("gtp_weight_remat_size"),
        values=("tensor_parallel_num_weight_shards",),
        state="refused",
        why="it shards weights that memory layers keep complete on each rank",
        fix="drop it",
    ),
    Feature(
        part=MODEL,
        name="grouped queries, norms of queries and keys",
        option="--group-query-attention, --qk-layernorm",
        uses=_given("group_query_attention", "qk_layernorm"),
        state="yes",
        test=RECIPES,
    ),
    Feature(
        part=MODEL,
        name="gated feed-forwards, RMSNorm, a separate output matrix",
        option="--swiglu, --normalization RMSNorm, --untie-embeddings-and-output-weights",
        uses=lambda args: (
            _given("swiglu", "untie_embeddings_and_output_weights")(args)
            or _is("normalization", "RMSNorm")(args)
        ),
        state="yes",
        test=RECIPES,
    ),
    Feature(
        part=MODEL,
        name="mixtures of experts, also shared ones, beside memory layers",
        option="--num-experts, --moe-layer-freq, --moe-shared-expert-intermediate-size",
        uses=_given("num_experts"),
        state="yes",
        test=RECIPES,
    ),
    Feature(
        part=MODEL,
        name="grouped GEMMs of experts",
        option="--moe-grouped-gemm",
        uses=_given("moe_grouped_gemm"),
        state="not run on a GPU",
        why=NEEDS_ENGINE,
    ),
    Feature(
        part=MODEL,
        name="a mixture of experts kept beside a memory",
        option="--memory-keep-ffn on a layer of experts",
        uses=_both(_keeps_ffn, _given("num_experts")),
        state="yes",
        test="megatron/test_kept_experts.py",
    ),
    Feature(
        part=MODEL,
        name="memories that are added behind a later layer",
        option="--memory-skip",
        uses=_skips,
        state="yes",
        test=f"{SKIP}::test_ranks_take_the_steps_of_one_process",
    ),
    Feature(
        part=MODEL,
        name="the same in units of full recomputation that contain both layers",
        option="--memory-skip with --recompute-granularity full",
        uses=_both(_skips, _recomputes_whole_layers),
        state="yes",
        test=f"{SKIP}::test_ranks_take_the_steps_of_one_process",
    ),
    FeatureOfLayers(
        part=MODEL,
        name="the same in other units, or with the later layer on another stage",
        option="--memory-skip with --recompute-granularity full, --pipeline-model-parallel-size",
        uses=_both(
            _skips,
            lambda args: (
                _recomputes_whole_layers(args)
                or _more_than_one("pipeline_model_parallel_size")(args)
            ),
        ),
        state="refused",
        says=_skips_to_another_chunk,
        why="the lookups are on their way from the one layer to the other",
        fix="use a smaller --memory-skip, other layers, or larger units",
    ),
    Feature(
        part=MODEL,
        name="the same with recomputation of feed-forwards or norms",
        option="--memory-skip with --recompute-modules mlp, layernorm",
        uses=_both(_skips, lambda args: any(_recomputes(m)(args) for m in ("mlp", "layernorm"))),
        values=("memory_skip", "recompute_modules"),
        state="refused",
        why="the layer that reads would be recomputed without the one behind which its memory is "
        "added",
        fix="recompute other modules, or use --recompute-granularity full",
    ),
    Feature(
        part=MODEL,
        name="the same where Megatron computes layers in an order of its own",
        option="--memory-skip with --hybrid-layer-pattern, --use-torch-fsdp2, --cuda-graph-impl, "
        "--overlap-moe-expert-parallel-comm, --enable-mhc-connections, --mlp-chunks-for-training, "
        "--mlp-chunks-for-prefill",
        uses=_both(_skips, _takes_layers_apart),
        values=(
            *("memory_skip", "hybrid_layer_pattern", "use_torch_fsdp2", "cuda_graph_impl"),
            *("overlap_moe_expert_parallel_comm", "enable_mhc_connections"),
            *("mlp_chunks_for_training", "mlp_chunks_for_prefill"),
        ),
        state="refused",
        why="the memory is read in one layer and added in another, both of which must be computed "
        "whole and in their order",
        fix="drop --memory-skip or these flags",
    ),
    Feature(
        part=MODEL,
        name="tables that neighbouring memory layers of a stage share",
        option="--memory-share-layers",
        uses=_more_than_one("memory_share_layers"),
        state="yes",
        test="megatron/test_ultramem.py::test_neighbours_of_a_stage_share_tables",
    ),
    FeatureOfLayers(
        part=MODEL,
        name="tables that memory layers of different stages share",
        option="--memory-share-layers with --pipeline-model-parallel-size",
        uses=_both(
            _more_than_one("memory_share_layers"), _more_than_one("pipeline_model_parallel_size")
        ),
        state="refused",
        says=_shares_across_stages,
        why="the ranks of a stage hold the tables of its layers",
        fix="choose layers such that those that share tables are on one stage",
    ),
    Feature(
        part=MODEL,
        name="experts made of a dense checkpoint at start",
        option="--moe-use-upcycling",
        uses=_given("moe_use_upcycling"),
        state="refused",
        why="it takes each layer for a feed-forward or for experts, and a memory layer is neither",
        fix="make the experts in a run without memory layers first",
    ),
    Feature(
        part=MODEL,
        name="multi-latent attention",
        option="--multi-latent-attention",
        uses=_given("multi_latent_attention"),
        state="not run on a GPU",
        why=NEEDS_ENGINE,
    ),
    Feature(
        part=MODEL,
        name="multi-token prediction, whose layers have no memories",
        option="--mtp-num-layers",
        uses=_given("mtp_num_layers"),
        state="yes",
        test="megatron/test_mtp.py",
    ),
    Feature(
        part=MODEL,
        name="hybrid models",
        option="--hybrid-layer-pattern",
        uses=_both(_given("hybrid_layer_pattern"), _has_hybrid_model),
        state="yes",
        test="megatron/test_hybrid.py"
        "::test_ranks_take_the_steps_of_one_process_and_resume_each_others_runs",
    ),
    Feature(
        part=MODEL,
        name="hybrid models with Megatron-Core 0.17",
        option="--hybrid-layer-pattern",
        uses=_both(_given("hybrid_layer_pattern"), _has_no_hybrid_model),
        values=("hybrid_layer_pattern",),
        state="refused",
        why="this release of Megatron-Core has no HybridModel",
        fix="use Megatron-Core 0.18 or later, or a model with --num-layers",
    ),
    Feature(
        part=MODEL,
        name="hyper-connections of a script's own layer specs, since Megatron-Core 0.20",
        option="--enable-mhc-connections",
        uses=_given("enable_mhc_connections"),
        state="yes",
        test="megatron/test_hyper_connections.py",
    ),
    Feature(
        part=MODEL,
        name="layers of different configurations",
        option="--heterogeneous-layers-config-path, --heterogeneous-layers-config-encoded-json",
        uses=_given("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
        values=("heterogeneous_layers_config_path",),
        state="refused",
        why="it gives each layer its own configuration",
        fix="drop it",
    ),
    Feature(
        part=MODEL,
        name="layers of Transformer Engine",
        option="--transformer-impl transformer_engine",
        uses=_is("transformer_impl", "transformer_engine"),
        state="not run on a GPU",
        why="models are built of its classes in a test; nothing of it computes without a GPU",
    ),
    Feature(
        part=MODEL,
        name="layers for inference",
        option="--transformer-impl inference_optimized",
        uses=_is("transformer_impl", "inference_optimized"),
        values=("transformer_impl",),
        state="refused",
        why="its fused layers use the linear layers of an MLP, which a memory layer does not have",
        fix="use --transformer-impl transformer_engine or local",
    ),
    Feature(
        part=PRECISION,
        name="bf16",
        option="--bf16",
        uses=_given("bf16"),
        state="yes",
        test=f"{TINY}::test_bf16_with_the_distributed_optimizer",
    ),
    Feature(
        part=PRECISION,
        name="fp16 with loss scaling",
        option="--fp16",
        uses=_given("fp16"),
        state="yes",
        test=RECIPES,
    ),
    Feature(
        part=PRECISION,
        name="gradients reduced in bf16, those of tables as well",
        option="--grad-reduce-in-bf16",
        uses=_given("grad_reduce_in_bf16"),
        state="yes",
        test=RECIPES,
    ),
    Feature(
        part=PRECISION,
        name="fp8 and fp4, with memory layers in bf16",
        option="--fp8-format, --fp4-format",
        uses=_low_precision,
        state="not run on a GPU",
        why=NEEDS_ENGINE,
    ),
    Feature(
        part=PRECISION,
        name="parameters gathered in fp8 or fp4, with memory layers in bf16",
        option="--fp8-param-gather, --fp4-param-gather",
        uses=_given("fp8_param_gather", "fp4_param_gather"),
        state="not run on a GPU",
        why="it needs Transformer Engine and a GPU; on CPUs a test shows that tables and other "
        "weights of memory layers are not among those in fp8",
    ),
    Feature(
        part=MEMORY,
        name="recomputation of whole layers or of modules",
        option="--recompute-granularity, --recompute-modules",
        uses=_given("recompute_granularity", "recompute_activations"),
        state="yes",
        test=f"{TINY}::test_two_ranks_take_the_steps_of_one",
    ),
    Feature(
        part=MEMORY,
        name="recomputation of norms in fp8 or fp4",
        option="--recompute-modules layernorm in fp8 or fp4",
        uses=_both(_low_precision, _recomputes("layernorm")),
        values=("recompute_modules", "fp8", "fp4"),
        state="refused",
        why="it saves the input of the norm for linear_fc1, which a memory layer does not have",
        fix="drop layernorm from --recompute-modules",
    ),
    Feature(
        part=MEMORY,
        name="recomputation of feed-forwards in fp8 or fp4",
        option="--recompute-modules mlp in fp8 or fp4",
        uses=_both(_low_precision, _recomputes_memory),
        values=("recompute_modules", "fp8", "fp4"),
        state="refused",
        why="Transformer Engine recomputes only modules that contain layers of its own",
        fix="drop mlp from --recompute-modules, or recompute all with --recompute-granularity full",
    ),
    Feature(
        part=MEMORY,
        name="CUDA graphs of parts other than feed-forwards",
        option="--cuda-graph-impl transformer_engine with --cuda-graph-modules attn, mamba, moe, "
        "moe_router, moe_preprocess",
        uses=_captures_other_parts,
        state="not run on a GPU",
        why=NEEDS_ENGINE,
    ),
    Feature(
        part=MEMORY,
        name="CUDA graphs of anything else",
        option="--cuda-graph-impl",
        uses=_captures_memory,
        values=("cuda_graph_impl", "cuda_graph_modules", "cuda_graph_scope"),
        state="refused",
        why="a memory layer cannot be captured in a graph",
        fix="use --cuda-graph-impl transformer_engine with --cuda-graph-modules (in Megatron-Core "
        "0.17 --cuda-graph-scope) of attn, mamba, moe, moe_router and moe_preprocess, or drop it",
    ),
    Feature(
        part=MEMORY,
        name="exchange of experts overlapped with computation; memory layers are computed whole",
        option="--overlap-moe-expert-parallel-comm",
        uses=_given("overlap_moe_expert_parallel_comm"),
        state="yes",
        test="megatron/test_overlapped_experts.py",
    ),
    FeatureOfLayers(
        part=MEMORY,
        name="the same with a memory in the last layer",
        option="--overlap-moe-expert-parallel-comm",
        uses=_given("overlap_moe_expert_parallel_comm"),
        state="refused",
        says=_ends_in_overlapped_memory,
        why="Megatron then applies the final norm only after a layer of experts",
        fix="choose other layers",
    ),
    Feature(
        part=MEMORY,
        name="weight gradients in a step of their own, except for those of memory layers",
        option="--delay-wgrad-compute",
        uses=_given("delay_wgrad_compute"),
        state="not run on a GPU",
        why="it needs Transformer Engine and a GPU; on CPUs a test runs its order of steps",
    ),
    Feature(
        part=MEMORY,
        name="tensor-parallel communication fused for inference",
        option="--inference-fuse-tp-communication",
        uses=_given("inference_fuse_tp_communication"),
        state="refused",
        why="it uses the linear layers of an MLP, which a memory layer does not have",
        fix="drop it",
    ),
    Feature(
        part=MEMORY,
        name="tensor-parallel communication overlapped with GEMMs",
        option="--tp-comm-overlap",
        uses=_given("tp_comm_overlap"),
        state="not run on a GPU",
        why=NEEDS_ENGINE,
    ),
    Feature(
        part=MEMORY,
        name="optimizer state in few bytes, or on the host, except for that of tables",
        option="--use-precision-aware-optimizer, --optimizer-cpu-offload",
        uses=_given("use_precision_aware_optimizer", "optimizer_cpu_offload"),
        state="not run on a GPU",
        why="it needs a GPU",
    ),
    Feature(
        part=TRAINING,
        name="Adam and SGD",
        option="--optimizer adam, sgd",
        uses=_is("optimizer", "adam", "sgd"),
        state="yes",
        test=RECIPES,
    ),
    Feature(
        part=TRAINING,
        name="Muon, Lion, SOAP and others for the model; tables have an optimizer of their own",
        option="--optimizer muon, dist_muon, lion, soap",
        uses=lambda args: getattr(args, "optimizer", "adam") not in ("adam", "sgd"),
        state="yes",
        test="megatron/test_muon.py",
    ),
    Feature(
        part=TRAINING,
        name="loss per token",
        option="--calculate-per-token-loss",
        uses=_given("calculate_per_token_loss"),
        state="yes",
        test=f"{TINY}::test_two_ranks_take_the_steps_of_one",
    ),
    Feature(
        part=TRAINING,
        name="the norm of parameters and the zeros of gradients, with those of tables",
        option="--log-params-norm, --log-num-zeros-in-grad",
        uses=_given("log_params_norm", "log_num_zeros_in_grad"),
        state="yes",
        test=f"{WIDE}::test_norms_and_zeros_are_those_of_one_process",
    ),
    Feature(
        part=TRAINING,
        name="random initialization of each data-parallel rank, which tables do not depend on",
        option="--data-parallel-random-init",
        uses=_given("data_parallel_random_init"),
        state="yes",
        test=f"{WIDE}::test_norms_and_zeros_are_those_of_one_process",
    ),
    Feature(
        part=TRAINING,
        name="comparison of weights between ranks, of tables between their replicas",
        option="--check-weight-hash-across-dp-replicas-interval",
        uses=_given("check_weight_hash_across_dp_replicas_interval"),
        state="yes",
        test=f"{WIDE}::test_replicas_that_differ_are_found",
    ),
    Feature(
        part=TRAINING,
        name="several documents in a sequence that do not see each other, with a convolution "
        "before queries",
        option="--sft, --reset-attention-mask with --memory-query-conv",
        uses=_both(_given("memory_query_conv"), _given(*PACKING)),
        values=("memory_query_conv", *PACKING),
        state="refused",
        why="the convolution would see tokens of the document before",
        fix="drop --memory-query-conv",
    ),
    Feature(
        part=TRAINING,
        name="settings of Megatron in a file",
        option="--yaml-cfg",
        uses=_given("yaml_cfg"),
        values=("yaml_cfg",),
        state="refused",
        why="Megatron then ignores all flags and builds no memory layers",
        fix="write the settings of the file as flags",
    ),
    FeatureOfLayers(
        part=TRAINING,
        name="sparse finetuning of a model whose experts have biases",
        option="--memory-finetune-rows with --moe-router-enable-expert-bias",
        uses=_both(_given("memory_finetune_rows"), _given("moe_router_enable_expert_bias")),
        state="refused",
        says=_changes_frozen_biases,
        why="the biases would change at every step, although the model is frozen",
        fix="drop --moe-router-enable-expert-bias",
    ),
    Feature(
        part=FILES,
        name="checkpoints for any number of ranks",
        option="--save, --load with --ckpt-format torch_dist",
        uses=_both(_saves, lambda args: not _is_of_another_format(args)),
        state="yes",
        test="megatron/test_resume.py::test_resume_on_one_rank_and_on_two",
    ),
    Feature(
        part=FILES,
        name="asynchronous saving",
        option="--async-save with --use-persistent-ckpt-worker",
        uses=_given("async_save"),
        state="not run on a GPU",
        why="Megatron saves synchronously without --use-persistent-ckpt-worker, whose process "
        "needs a GPU",
    ),
    Feature(
        part=FILES,
        name="settings from the checkpoint",
        option="--use-checkpoint-args",
        uses=_given("use_checkpoint_args"),
        state="yes",
        test="megatron/test_saved_settings.py::test_checkpoint_args_bring_the_memory",
    ),
    Feature(
        part=FILES,
        name="other formats",
        option="--ckpt-format other than torch_dist",
        uses=_both(_saves, _is_of_another_format),
        values=("ckpt_format",),
        state="refused",
        why="only torch_dist stores the value table by rows",
        fix="use --ckpt-format torch_dist",
    ),
    Feature(
        part=FILES,
        name="conversion to other formats",
        option="--ckpt-convert-format other than torch_dist",
        uses=lambda args: getattr(args, "ckpt_convert_format", None) not in (None, "torch_dist"),
        values=("ckpt_convert_format",),
        state="refused",
        why="only torch_dist stores the value table by rows and the state of its optimizer",
        fix="drop it",
    ),
)
"""In the order of the matrix, in which they are also reported."""


def feature_problems(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence for each thing of Megatron that memory layers do not work with."""
    return [said for feature in FEATURES if (said := feature.problem(spec, args)) is not None]
