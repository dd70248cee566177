"""A memory enters the layer specs of every kind that Megatron makes."""

from functools import partial

import pytest
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megamem.checkpoint import SHARED
from megamem.config import MemoryConfig
from megamem.megatron import compat
from megamem.megatron.model.layer_specs import with_memory
from megamem.megatron.model.memory_mlp import MemoryMLP
from megamem.resolution import resolve

CONFIG = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2)


POOL = object()


def _with_memory(spec: ModuleSpec, **settings) -> TransformerLayerSubmodules:
    memory = MemoryConfig(memory_layers=[0], memory_num_keys=4, memory_topk=2, **settings)
    changed = with_memory(spec, 0, resolve(memory, 16), {SHARED: POOL}).submodules
    assert changed.mlp.params["pool"] is POOL
    return changed


def _transformer_engine_spec(mlp) -> ModuleSpec:
    """The dense spec that Megatron makes with Transformer Engine: the norm is in the MLP."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=IdentityOp,
            mlp=mlp,
            sharded_state_dict_keys_map={"mlp.0.weight": "mlp.linear_fc1.layer_norm_weight"},
        ),
    )


FUSED = MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear)
SLOTS = [pytest.param(ModuleSpec(module=MLP, submodules=FUSED), id="spec, in 0.17")]
if hasattr(MLP, "as_mlp_submodule"):
    builder = partial(MLP.as_mlp_submodule, submodules=FUSED)
    SLOTS.append(pytest.param(builder, id="builder, since 0.18"))


@pytest.mark.parametrize("slot", SLOTS)
def test_transformer_engine_gets_the_norm_that_was_in_its_mlp(slot) -> None:
    given = _transformer_engine_spec(slot)
    changed = _with_memory(given)
    assert changed.pre_mlp_layernorm is compat.TransformerEngineNorm
    assert changed.mlp.module is MemoryMLP and "ffn" not in changed.mlp.params
    assert changed.sharded_state_dict_keys_map == {}
    # the given spec may serve other layers
    assert given.submodules.pre_mlp_layernorm is IdentityOp and given.submodules.mlp is slot
    assert given.submodules.sharded_state_dict_keys_map


@pytest.mark.parametrize("slot", SLOTS)
def test_a_transformer_engine_ffn_that_stays_does_not_normalise_again(slot) -> None:
    plain = compat.without_fused_norm(slot)
    submodules = plain.keywords["submodules"] if isinstance(plain, partial) else plain.submodules
    assert submodules.linear_fc1 is TEColumnParallelLinear
    assert submodules.linear_fc2 is TERowParallelLinear
    assert FUSED.linear_fc1 is TELayerNormColumnParallelLinear
    changed = _with_memory(_transformer_engine_spec(slot), memory_keep_ffn=True)
    assert callable(changed.mlp.params["ffn"])


def test_the_local_spec_keeps_its_norm_and_saves_it_under_its_own_name() -> None:
    spec = ModuleSpec(module=TransformerLayer, submodules=get_gpt_layer_local_submodules())
    norm = spec.submodules.pre_mlp_layernorm
    assert any("mlp" in name for name in spec.submodules.sharded_state_dict_keys_map.values())
    changed = _with_memory(spec)
    assert changed.pre_mlp_layernorm is norm and changed.mlp.module is MemoryMLP
    saved = changed.sharded_state_dict_keys_map
    assert saved and not any("mlp" in name for name in saved.values())
