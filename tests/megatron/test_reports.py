"""The FLOPs and parameters that a run reports, compared with the counts of Megatron and torch."""

import argparse
from dataclasses import replace

import pytest
import torch
from megatron.training.training import num_floating_point_operations
from torch.utils.flop_counter import FlopCounterMode

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.megatron.reports import sizes
from megamem.resolution import resolve
from megamem.spec import Layout, MemorySpec

HIDDEN, FFN, TOKENS = 64, 128, 2 * 32

# what Megatron also reads to count a hybrid model
OF_OTHER_LAYERS = {
    **{"mamba_state_dim": 128, "mamba_head_dim": 64, "mamba_num_groups": 8},
    **{"mamba_num_heads": 8, "linear_key_head_dim": None, "linear_value_head_dim": None},
    **{"linear_num_key_heads": None, "linear_num_value_heads": None},
    **{"linear_conv_kernel_dim": None},
}


def _args(**given) -> argparse.Namespace:
    usual = {
        "num_layers": 4,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "seq_length": 32,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "group_query_attention": False,
        "num_query_groups": 4,
        "swiglu": False,
        "num_experts": None,
        "moe_layer_freq": 1,
        "moe_ffn_hidden_size": None,
        "moe_router_topk": 2,
        "moe_shared_expert_intermediate_size": None,
        "moe_latent_size": None,
        "mtp_num_layers": None,
        "multi_latent_attention": False,
        "padded_vocab_size": 128,
        "hybrid_layer_pattern": None,
        "attention_output_gate": False,
        "experimental_attention_variant": None,
        "linear_attention_freq": None,
        "gdp_num_householder": 3,  # asked for since 0.20
    }
    return argparse.Namespace(**{**usual, **given})


def _memory(**settings) -> MemorySpec:
    usual = {"memory_layers": [1, 2], "memory_num_keys": 16, "memory_topk": 4}
    return resolve(MemoryConfig(**{**usual, **settings}), HIDDEN)


def _counted(memory: MemorySpec, args: argparse.Namespace) -> float:
    return sizes.with_memory_flops(num_floating_point_operations, memory, args, 2)


@pytest.mark.parametrize("variant", ["memory", "memory+"])
def test_a_layer_counts_what_torch_counts(variant: str) -> None:
    memory = _memory(memory_variant=variant)
    # in fp64 the torch twins run, whose matrix products torch can count
    pool = MemoryPool(memory, dtype=torch.float64)
    layer = MemoryLayer(memory, pool, dtype=torch.float64)
    hidden = torch.randn(32, 2, HIDDEN, requires_grad=True, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        layer(hidden).sum().backward()
    assert counter.get_total_flops() == TOKENS * sizes.layer_flops_per_token(memory)


@pytest.mark.parametrize("swiglu", [False, True])
def test_memories_stand_in_place_of_feed_forwards(swiglu: bool) -> None:
    args, memory = _args(swiglu=swiglu), _memory()
    dense = num_floating_point_operations(_args(swiglu=swiglu), 2)
    feed_forward = 6 * HIDDEN * FFN * (3 if swiglu else 2) * TOKENS
    memories = 2 * TOKENS * sizes.layer_flops_per_token(memory)
    assert _counted(memory, args) == pytest.approx(dense - 2 * feed_forward + memories)
    kept = _memory(memory_keep_ffn=True)
    assert _counted(kept, args) == pytest.approx(dense + memories)


def test_a_memory_in_place_of_experts() -> None:
    experts = {"num_experts": 4, "moe_layer_freq": [0, 1, 0, 1], "moe_ffn_hidden_size": 96}
    args, memory = _args(**experts), _memory(memory_layers=[0, 1])
    whole = num_floating_point_operations(_args(**experts), 2)
    dense_ffn, expert_ffn = 6 * HIDDEN * FFN * 2, 6 * HIDDEN * 96 * 2 * 2
    added = 2 * sizes.layer_flops_per_token(memory)
    expected = whole + TOKENS * (added - dense_ffn - expert_ffn)
    assert _counted(memory, args) == pytest.approx(expected)


def test_a_memory_in_a_hybrid_model() -> None:
    hybrid = {
        **{"hybrid_layer_pattern": "*-*-*E", "num_layers": 6, "moe_ffn_hidden_size": 96},
        **OF_OTHER_LAYERS,
    }
    whole = num_floating_point_operations(_args(**hybrid), 2)
    dense_ffn, expert_ffn = 6 * HIDDEN * FFN * 2, 6 * HIDDEN * 96 * 2 * 2
    memory = _memory(memory_layers=[1, 5])
    added = 2 * sizes.layer_flops_per_token(memory)
    expected = whole + TOKENS * (added - dense_ffn - expert_ffn)
    assert _counted(memory, _args(**hybrid)) == pytest.approx(expected)


def test_rows_are_parameters_and_no_flops() -> None:
    few, many = _memory(memory_value_dim=64), _memory(memory_value_dim=64, memory_topk=16)
    assert _counted(few, _args()) == _counted(many, _args())
    assert sizes.table_parameters(few) == 256 * 64
    assert sizes.table_parameters(_memory(memory_pool="layer")) == 2 * 256 * 64


def test_summary_names_what_is_trained() -> None:
    memory = replace(_memory(memory_num_keys=1024), layout=Layout("row", 4))
    line = sizes.summary(memory)
    assert "layers 1, 2 are memory+: 4 heads x 4 rows" in line
    assert "one shared table of 1,048,576 x 64 = 67.11 M parameters" in line
    assert "16.78 M on each of 4 ranks" in line


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        # sqrt(4) * 16 sub-keys per side, of two ranks, and half of 64 numbers
        (
            "ultramem",
            "2 heads x 9 rows, a table each of 256 x 32 = 16.38 k parameters; sub-keys 8.192 k",
        ),
        (
            "ultramem-v2",
            "1 head x 9 rows, 2 tables (v, p) each of 256 x 32 and 8 = 20.48 k "
            "parameters; sub-keys 2.048 k",
        ),
    ],
)
def test_summary_of_tables_of_different_width(variant: str, expected: str) -> None:
    more = {"memory_variant": variant, "memory_topk": 4, "memory_final_topk": 9}
    line = sizes.summary(_memory(memory_num_keys=16, memory_heads=None, **more))
    assert f"are {variant}: {expected} a layer" in line
