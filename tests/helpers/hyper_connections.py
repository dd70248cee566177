"""A spec of layers with hyper-connections (mHC), for --spec; Megatron has had them since 0.20.

Its own specs have none, so a script of a user makes one.
"""

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer.hyper_connection import HyperConnectionModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import HyperConnectionTransformerLayer


def layer_spec(config: Any) -> ModuleSpec:
    """The spec of each layer: that of a local GPT, with connections around both of its parts."""
    submodules = get_gpt_layer_local_submodules()
    submodules.self_attention_hyper_connection = HyperConnectionModule
    submodules.mlp_hyper_connection = HyperConnectionModule
    return ModuleSpec(module=HyperConnectionTransformerLayer, submodules=submodules)
