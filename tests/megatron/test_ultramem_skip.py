"""Memories of UltraMem that are added behind a later layer than the one where they read."""

import re
from pathlib import Path

import pytest

from megamem.config import ConfigurationError
from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_checks import HYBRID, _check
from tests.megatron.test_tiny_training import DO, OVERLAP, SP, TP2, WIDE, _same_steps
from tests.megatron.test_ultramem import SIZES

FORMULA = Path(__file__).parents[1] / "helpers" / "skip_formula.py"
ULTRAMEM = ("--memory-variant", "ultramem", *SIZES)
SKIP = (*ULTRAMEM, "--memory-layers", 0, 2, "--memory-skip", 1)
FULL = ("--recompute-granularity", "full")
UNITS = (*FULL, "--recompute-method", "uniform", "--recompute-num-layers", 2)
BLOCKS = (*FULL, "--recompute-method", "block", "--recompute-num-layers", 1)
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules", "core_attn")


@pytest.fixture(scope="module")
def alone() -> TrainingLog:
    return run_training("one process", 1, *SKIP)


@pytest.mark.gloo
def test_a_model_computes_its_formula_in_the_order_that_overlaps() -> None:
    log = run_training("formula", 1, *SKIP, script=FORMULA)
    assert re.search(r"^\d\d gradients agree$", log.stdout, re.M)
    order = (
        "attention 0, launch 0, ffn 0, attention 1, ffn 1, collect 0, "
        "attention 2, launch 2, ffn 2, attention 3, ffn 3, collect 2"
    )
    assert f"\norder: {order}\n" in log.stdout


@pytest.mark.gloo
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((*TP2, *SP, *UNITS), id="tp, sp, full recompute"),
        pytest.param((*TP2, *SELECTIVE), marks=pytest.mark.slow, id="tp, selective recompute"),
        pytest.param((*WIDE, *DO, *OVERLAP), marks=pytest.mark.slow, id="rows over dp"),
        pytest.param(
            (*WIDE, "--memory-mode", "column", *UNITS), marks=pytest.mark.slow, id="columns over dp"
        ),
    ],
)
def test_ranks_take_the_steps_of_one_process(alone: TrainingLog, flags: tuple) -> None:
    """The slow ones: pytest -m slow tests/megatron/test_ultramem_skip.py, 30 seconds."""
    assert alone.losses[-1] < alone.losses[0] - 0.1
    _same_steps(run_training("two ranks", 2, *SKIP, *flags), alone)


EXPERTS = ("--num-experts", 4, "--moe-layer-freq", "([0]+[1]*3)", "--moe-router-topk", 2)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "flags"),
    [
        pytest.param((0, "--memory-skip", 2), (), id="two layers later"),
        pytest.param((1, "--memory-skip", 2), BLOCKS, id="behind the layers that are recomputed"),
        pytest.param((0, "--memory-skip", 1, *EXPERTS), (), id="behind experts"),
        pytest.param((1, "--memory-skip", 1, *EXPERTS), (), id="from experts to experts"),
    ],
)
def test_other_spans_and_experts(first: tuple, flags: tuple) -> None:
    spans = (*ULTRAMEM, "--memory-layers", *first)
    alone = run_training("one process", 1, *spans)
    assert alone.losses[-1] < alone.losses[0] - 0.1
    _same_steps(run_training("two ranks", 2, *spans, *TP2, *SP, *flags), alone)


V1 = {"memory_variant": "ultramem", "memory_layers": [0, 4], "memory_skip": 3, "memory_topk": 8}
ONE_BY_ONE = {"recompute_granularity": "full", "recompute_num_layers": 1}


def test_what_works_is_not_refused() -> None:
    _check(memory=V1)
    _check(memory=V1, pipeline_model_parallel_size=2)
    _check(memory=V1, recompute_modules=["core_attn"], recompute_granularity="selective")
    whole = {"recompute_granularity": "full", "recompute_num_layers": 4}
    _check(memory=V1, **whole, recompute_method="uniform")
    later = {**V1, "memory_layers": [4]}
    _check(memory=later, **whole, recompute_method="block")
    _check(memory=V1, pipeline_model_parallel_size=2, **whole, recompute_method="uniform")


@pytest.mark.parametrize(
    ("memory", "given", "message"),
    [
        ({"memory_layers": [0, 5]}, {}, "layer 5 behind layer 8, which the model does not have; u"),
        ({"memory_layers": [0, 3]}, {}, "behind layer 3, but .* layer 3 is .*use --memory-skip 2"),
        ({"memory_layers": [0, 1]}, {}, "layer 1 is to read first.*; use --memory-skip 0, or"),
        (
            {"memory_layers": [2]},
            {"pipeline_model_parallel_size": 2},
            "the memory of layer 2 behind layer 5, which is on another pipeline stage or virtual",
        ),
        (
            {"memory_layers": [0]},
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "the memory of layer 0 behind layer 3, which is on another pipeline stage or virtual",
        ),
        ({}, {**ONE_BY_ONE, "recompute_method": "uniform"}, "different times; .*-num-layers 8, or"),
        ({}, {**ONE_BY_ONE, "recompute_method": "block"}, "different times; .*, or a smaller"),
        (
            {},
            {"recompute_modules": ["mlp", "core_attn"]},
            "does not work with --memory-skip 3 with --recompute-modules mlp core_attn: ",
        ),
        ({}, {"recompute_modules": ["layernorm"]}, "--memory-skip 3 with --recompute-modules lay"),
        ({"memory_layers": [1]}, HYBRID, r"--memory-skip 3 with --hybrid-layer-pattern \*-"),
        ({}, {"use_torch_fsdp2": True}, "--memory-skip 3 with --use-torch-fsdp2: "),
        ({}, {"mlp_chunks_for_training": 2}, "--memory-skip 3 with --mlp-chunks-for-training 2"),
        ({}, {"mlp_chunks_for_prefill": 2}, "--memory-skip 3 with --mlp-chunks-for-prefill 2"),
        ({}, {"enable_mhc_connections": True}, "--memory-skip 3 with --enable-mhc-connections"),
        (
            {"memory_layers": [2]},
            {"overlap_moe_expert_parallel_comm": True},
            "--memory-skip 3 with --overlap-moe-expert-parallel-comm: ",
        ),
        (
            {},
            {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["attn"]},
            "--memory-skip 3 with --cuda-graph-impl transformer_engine: ",
        ),
        ({"memory_variant": "ultramem-v2"}, {}, "--memory-skip 3 needs --memory-variant ultramem,"),
    ],
)
def test_what_does_not_work_is_named(memory: dict, given: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        _check(memory={**V1, **memory}, **given)
