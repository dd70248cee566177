"""Runs examples/bridge_recipe.py with another model of Megatron-Bridge in its recipe.

    python -m tests.helpers.bridge_models MODEL WORDS...

builder  a GPT that is described by a ModelConfig and built by its builder
hybrid   a HybridModelProvider with four attention layers and four feed-forwards
"""

import sys
from typing import Any

# this installs the CPU runtime, so the classes below are imported later
from examples import bridge_recipe

SIZE = {"hidden_size": 64, "num_attention_heads": 4, "hidden_dropout": 0, "attention_dropout": 0}


def builder() -> Any:
    from megatron.bridge.models.gpt.gpt_builder import GPTModelConfig
    from megatron.bridge.models.transformer_config import TransformerConfig

    transformer = TransformerConfig(num_layers=4, **SIZE)
    return GPTModelConfig(transformer=transformer, vocab_size=1000, seq_length=32)


def hybrid() -> Any:
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider

    return HybridModelProvider(hybrid_layer_pattern="*-*-*-*-", seq_length=32, **SIZE)


def main() -> None:
    model = {"builder": builder, "hybrid": hybrid}[sys.argv.pop(1)]
    recipe = bridge_recipe.vanilla_gpt_pretrain_config

    def with_model() -> Any:
        config = recipe()
        config.model = model()
        return config

    bridge_recipe.vanilla_gpt_pretrain_config = with_model
    words = [word for word in bridge_recipe.TINY if not word.startswith("model.")]
    bridge_recipe.TINY[:] = words
    bridge_recipe.main()


if __name__ == "__main__":
    main()
