"""Hybrid models on a CPU, with the layers of Megatron's local (plain torch) implementation.

Megatron has the spec of a hybrid stack for Transformer Engine only. Its layers are replaced here by
local ones under the same name, so that the `--spec` of a run on GPUs works without a change.
"""

import importlib
from functools import partial
from importlib.util import find_spec
from typing import Any

ON_CPU = "*-E"
"""Symbols of the layers that need no GPU kernels."""

HYBRID = "megatron.core.models.hybrid"


def supply_local_stack() -> None:
    """Replace the layers of the stack's spec and the final norm, if there are hybrid models."""
    if find_spec(HYBRID) is None:
        return
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    specs: Any = importlib.import_module(f"{HYBRID}.hybrid_layer_specs")
    block: Any = importlib.import_module(f"{HYBRID}.hybrid_block")
    block.TENorm = WrappedTorchNorm
    stack = specs.hybrid_stack_spec.submodules
    attention, dense, experts = _local_layers()
    stack.attention_layer.submodules = attention
    stack.mlp_layer.submodules = dense
    stack.moe_layer.submodules = experts
    # the layers inside of these are built from the stack's spec
    for prediction in stack.mtp_block_spec.submodules.layer_specs:
        parts = prediction.submodules
        parts.enorm = parts.hnorm = parts.layer_norm = WrappedTorchNorm
        parts.eh_proj = ColumnParallelLinear


def _local_layers() -> tuple[Any, Any, Any]:
    """The submodules of an attention, a dense and an experts layer, each with its norm."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=DotProductAttention,
        linear_proj=RowParallelLinear,
    )
    causal = {"attn_mask_type": AttnMaskType.causal}
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    with_norm = partial(
        TransformerLayerSubmodules,
        pre_mlp_layernorm=WrappedTorchNorm,
        mlp_bda=get_bias_dropout_add,
    )
    return (
        TransformerLayerSubmodules(
            input_layernorm=WrappedTorchNorm,
            self_attention=ModuleSpec(SelfAttention, params=causal, submodules=attention),
            self_attn_bda=get_bias_dropout_add,
        ),
        with_norm(mlp=partial(MLP.as_mlp_submodule, submodules=linears)),
        # the number only says that there are experts; the config of the model replaces it
        with_norm(mlp=get_moe_module_spec(use_te=False, num_experts=2, moe_grouped_gemm=False)),
    )
