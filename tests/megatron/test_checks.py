"""Settings are refused at start-up by a message with the flag, its value and the fix."""

import argparse
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megamem.config import ConfigurationError
from megamem.megatron import compat
from megamem.megatron.arguments import spec_from_args
from megamem.megatron.startup import checks
from tests.helpers.megatron_runs import run_training


def _check(memory: dict | None = None, **given) -> None:
    usual = {
        "num_layers": 8,
        "hidden_size": 64,
        "seq_length": 32,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "context_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "num_experts": None,
        "ffn_hidden_size": 256,
        "lr": 1e-3,
        "tensor_model_parallel_size": 1,
        "world_size": 2,
        "params_dtype": torch.float32,
        "bf16": False,
        "seed": 1,
        "distributed_timeout_minutes": 10,
        "memory_group_size": None,
        "mock_data": True,
    }
    args = argparse.Namespace(**{**usual, "memory_layers": [2, 5], **given, **(memory or {})})
    spec = spec_from_args(args)
    assert spec is not None
    shape = TransformerConfig(
        num_layers=8,
        hidden_size=64,
        num_attention_heads=4,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        pipeline_dtype=torch.float32,
    )
    maker = "core_transformer_config_from_args"
    with mock.patch.object(compat.CONFIG_MODULE, maker, lambda args: shape):
        checks.check(spec, args)


def test_what_works_is_not_refused() -> None:
    _check()
    _check(cuda_graph_impl="none", mtp_num_layers=None, optimizer="adam", gtp_weight_remat_size=1)
    for parts in (["attn"], ["mamba"], ["attn", "moe_router", "moe_preprocess"], ["moe"]):
        modules = [SimpleNamespace(name=part) for part in parts]
        _check(cuda_graph_impl="transformer_engine", cuda_graph_modules=modules)
    _check(mtp_num_layers=1)
    _check(optimizer="muon", use_layer_wise_distributed_optimizer=True)
    _check(recompute_modules=["mlp", "layernorm"])
    _check(fp8="hybrid", fp8_param_gather=True)
    _check(fp4="e2m1", fp4_param_gather=True)
    _check(fp8="hybrid", recompute_modules=["mlp"], memory_keep_ffn=True)
    _check(pipeline_model_parallel_size=2, memory={"memory_layers": [4, 7]})
    _check(pipeline_model_parallel_size=2, memory={"memory_pool": "layer"})
    _check(num_experts=4, moe_layer_freq=2, memory={"memory_keep_ffn": True})


def test_a_form_that_does_not_exist_is_found_at_start(monkeypatch) -> None:
    monkeypatch.setenv("MEGAMEM_FORMS", "product_topk=two_looks")
    _check()
    monkeypatch.setenv("MEGAMEM_FORMS", "product_topk=fastest")
    with pytest.raises(ConfigurationError, match="no form 'fastest'; it has two_looks, torch"):
        _check()


CONV = {"memory_variant": "ultramem", "memory_query_conv": 3}


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        ({"use_torch_fsdp2": True, "old_fsdp2": True}, "--use-torch-fsdp2"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl"),
        ({"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": []}, "--cuda-graph-impl"),
        (
            {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["attn", "mlp"]},
            "--cuda-graph-impl",
        ),
        ({"cuda_graph_impl": "local", "cuda_graph_modules": ["attn"]}, "--cuda-graph-impl"),
        ({"fp8": "hybrid", "recompute_modules": ["layernorm"]}, "--recompute-modules layernorm"),
        ({"fp8": "hybrid", "recompute_modules": ["mlp"]}, "--recompute-modules mlp"),
        ({"inference_fuse_tp_communication": True}, "--inference-fuse-tp-communication"),
        ({"transformer_impl": "inference_optimized"}, "--transformer-impl inference_optimized"),
        ({"heterogeneous_layers_config_path": "x"}, "--heterogeneous-layers-config-path"),
        ({"hybrid_layer_pattern": "M*-*-*-*-", "no_hybrid": True}, "--hybrid-layer-pattern"),
        ({"gtp_weight_remat_size": 2}, "--tensor-parallel-num-weight-shards"),
        ({"moe_use_upcycling": True}, "--moe-use-upcycling"),
        (
            {**CONV, "context_parallel_size": 2},
            "--memory-query-conv 3 with --context-parallel-size 2",
        ),
        ({**CONV, "sft": True}, "--memory-query-conv 3 with --sft"),
        (
            {**CONV, "reset_attention_mask": True},
            "--memory-query-conv 3 with --reset-attention-mask",
        ),
        ({"yaml_cfg": "x"}, "--yaml-cfg"),
        ({"save": "x", "ckpt_format": "torch"}, "--ckpt-format torch"),
        ({"ckpt_convert_format": "torch"}, "--ckpt-convert-format torch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_of_megatron_that_do_not_work(monkeypatch, given: dict, option: str) -> None:
    if given.pop("no_hybrid", False):  # as in 0.17
        monkeypatch.setattr(compat, "HybridModel", None)
    if given.pop("old_fsdp2", False):  # as before 0.19
        monkeypatch.setattr(compat, "RUNS_TORCH_FSDP2", False)
    with pytest.raises(ConfigurationError, match=f"does not work with {option}.*: .+; .+"):
        _check(**given)


SGD = {"memory_optimizer": "sgd"}


def test_finetuning_keeps_the_biases_of_experts() -> None:
    _check(moe_router_enable_expert_bias=True)
    with pytest.raises(ConfigurationError, match="--memory-finetune-rows 9 freezes .* experts at"):
        _check(moe_router_enable_expert_bias=True, memory={"memory_finetune_rows": 9, **SGD})


def test_the_last_layer_where_experts_are_overlapped() -> None:
    overlapped = {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True}
    _check(**overlapped)
    said = "--memory-layers 2 7 .* --overlap-moe-expert-parallel-comm: .* layer 7, the last one"
    with pytest.raises(ConfigurationError, match=said):
        _check(**overlapped, memory={"memory_layers": [2, 7]})


def test_layer_out_of_range() -> None:
    with pytest.raises(ConfigurationError, match="--memory-layers 8 11 is out of range.*layer 7"):
        _check(memory={"memory_layers": [3, 8, 11]})


@pytest.mark.parametrize("virtual", [None, 2])
def test_a_shared_pool_may_be_on_several_stages(virtual) -> None:
    _check(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=virtual)


HYBRID = {
    **{"hybrid_layer_pattern": "*-*-*-E*", "num_layers": 8},
    **{"decoder_first_pipeline_num_layers": None, "decoder_last_pipeline_num_layers": None},
}
STAGES = {**HYBRID, "hybrid_layer_pattern": "*-*|-*-E*", "pipeline_model_parallel_size": 2}


def test_memories_in_a_hybrid_model_take_the_place_of_feed_forwards(monkeypatch) -> None:
    monkeypatch.setattr(compat, "HybridModel", object)  # also in 0.17, which has none
    _check(**HYBRID, memory={"memory_layers": [1, 6]})
    _check(**HYBRID, memory={"memory_layers": [1], "memory_keep_ffn": True})
    _check(**STAGES, memory={"memory_layers": [3, 5]})
    uneven = {**HYBRID, "pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 6}
    _check(**uneven, memory={"memory_layers": [1, 5]})
    said = "--memory-layers 0 7 is no feed-forward: .*; use some of 1 3 5 6"
    with pytest.raises(ConfigurationError, match=said):
        _check(**HYBRID, memory={"memory_layers": [0, 1, 7]})
    with pytest.raises(ConfigurationError, match=r"\*\*\*, counted from 0, has none; add some"):
        _check(**{**HYBRID, "hybrid_layer_pattern": "***"}, memory={"memory_layers": [2]})
    _check(**STAGES, memory={"memory_layers": [1, 3]})
    _check(**HYBRID, memory={"memory_layers": [6], "memory_keep_ffn": True})


def test_a_constant_rate_is_named() -> None:
    with pytest.raises(ConfigurationError, match="--memory-lr-schedule constant .* --memory-lr"):
        _check(memory={"memory_lr_schedule": "constant"})


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigurationError, match="2 settings cannot work") as raised:
        _check(use_megatron_fsdp=True, memory={"memory_layers": [9]})
    assert "--use-megatron-fsdp" in str(raised.value) and "--memory-layers 9" in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--memory-layers", 4), "--memory-layers 4 is out of range"),
        (("--memory-layers", 1, "--memory-heads", 0), "--memory-heads 0 must be at least 1"),
    ],
    ids=["checked with Megatron's arguments", "checked alone"],
)
def test_a_run_ends_with_one_line(flags, message) -> None:
    log = run_training("refused", 1, *flags, check=False)
    assert log.returncode == 2
    said = [line for line in log.stdout.splitlines() if "megamem: error:" in line]
    assert len(said) == 1 and message in said[0]
    assert "Traceback" not in log.stdout
