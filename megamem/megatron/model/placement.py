"""Where the layers of a model are built, and what of memories must be built together.

A memory that is added behind a later layer (--memory-skip) has its lookups in memory between the
two layers, so that one chunk must compute both, and recompute both at once. Layers that share
tables (--memory-share-layers) must be on one pipeline stage, whose ranks hold the tables.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megamem import hybrid_pattern
from megamem.layers.variants import pool_of
from megamem.megatron import compat
from megamem.planner.sizes import Placement
from megamem.spec import MemorySpec


def virtual_stages(config: Any) -> list[int | None]:
    """The virtual stages of a rank, or None for the only one."""
    count = config.virtual_pipeline_model_parallel_size
    return list(range(count)) if count else [None]


def placement_of(config: Any, stages: int, pattern: str | None = None) -> Placement:
    """The layers of each chunk of each pipeline stage.

    Args:
        config: Megatron's config of the model.
        stages: the pipeline-parallel size.
        pattern: the pattern of a hybrid model.
    """
    first = config.num_layers_in_first_pipeline_stage
    last = config.num_layers_in_last_pipeline_stage
    return [
        [
            compat.stage_layers(config, chunk, stage)
            if pattern is None
            else hybrid_pattern.stage_layers(pattern, stages, stage, chunk, first=first, last=last)
            for chunk in virtual_stages(config)
        ]
        for stage in range(stages)
    ]


def placement_from_args(args: Namespace) -> Placement:
    """The placement of the model that validated arguments of Megatron describe."""

    def given(name: str) -> Any:
        return getattr(args, name, None)

    stages, layout = args.pipeline_model_parallel_size, given("pipeline_model_parallel_layout")
    if isinstance(layout, str):
        layout = PipelineParallelLayerLayout.from_str(layout, stages)
    config = Namespace(
        num_layers=args.num_layers,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=given("virtual_pipeline_model_parallel_size"),
        pipeline_model_parallel_layout=layout,
        num_layers_in_first_pipeline_stage=given("decoder_first_pipeline_num_layers"),
        num_layers_in_last_pipeline_stage=given("decoder_last_pipeline_num_layers"),
        account_for_embedding_in_pipeline_split=bool(
            given("account_for_embedding_in_pipeline_split")
        ),
        account_for_loss_in_pipeline_split=bool(given("account_for_loss_in_pipeline_split")),
    )
    return placement_of(config, stages, given("hybrid_layer_pattern"))


def skip_problem(spec: MemorySpec, placement: Placement, recompute: Any) -> str | None:
    """A sentence if a memory is added behind a layer that is not computed together with its own.

    Args:
        spec: the memory layers.
        placement: the layers of each chunk of each stage.
        recompute: Megatron's arguments or config, of which those about recomputation are read.
    """
    if not spec.skip:
        return None
    chunks = [chunk for stage in placement for chunk in stage]
    for layer in spec.layers:
        last = layer + spec.skip
        chunk = next(chunk for chunk in chunks if layer in chunk)
        skips = f"--memory-skip {spec.skip} adds the memory of layer {layer} behind layer {last}, "
        if not any(last in other for other in chunks):
            return (
                f"{skips}which the model does not have; use a smaller --memory-skip, or other "
                "--memory-layers."
            )
        if last not in chunk:
            return (
                f"{skips}which is on another pipeline stage or virtual stage; use a smaller "
                "--memory-skip, or --memory-layers that are on one with those behind them."
            )
        if not _recomputed_together(chunk.index(layer), chunk.index(last), recompute):
            method = recompute.recompute_method
            return (
                f"{skips}but --recompute-method {method} with --recompute-num-layers "
                f"{recompute.recompute_num_layers} recomputes the two at different times; "
                + _fix(chunk, method)
            )
    return None


def _recomputed_together(first: int, last: int, given: Any) -> bool:
    """Whether two layers of a chunk, by their places in it, are recomputed at once or not at all.

    With `uniform` each unit of this number of layers is recomputed at once, with `block` each of
    the first so many layers by itself.
    """
    if getattr(given, "recompute_granularity", None) != "full":
        return True
    number = given.recompute_num_layers
    if given.recompute_method == "uniform":
        return first // number == last // number
    return first >= number


def _fix(chunk: Sequence[int], method: str) -> str:
    whole = f"use --recompute-method uniform with --recompute-num-layers {len(chunk)}"
    if method == "uniform":
        return f"{whole}, or --recompute-granularity selective."
    return f"{whole}, or a smaller --recompute-num-layers."


def share_problem(spec: MemorySpec, placement: Placement) -> str | None:
    """A sentence if layers that share tables are on several pipeline stages."""
    if spec.share_layers == 1:
        return None
    pools: dict[str, list[int]] = {}
    for layer in spec.layers:
        pools.setdefault(pool_of(layer, spec), []).append(layer)
    stage_of = {
        layer: number
        for number, stage in enumerate(placement)
        for chunk in stage
        for layer in chunk
    }
    for layers in pools.values():
        if len({stage_of[layer] for layer in layers}) > 1:
            return (
                f"--memory-share-layers {spec.share_layers} makes layers "
                f"{', '.join(map(str, layers))} share tables, but they are on different pipeline "
                "stages; use a --memory-share-layers whose sets of neighbouring memory layers are "
                "on one stage each, or other --memory-layers."
            )
    return None
