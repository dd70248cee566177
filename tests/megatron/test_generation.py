"""What megamem changes about Megatron's inference engines; examples/test_generate.py runs them."""

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.inference.engines import DynamicInferenceEngine
from torch import Tensor, nn

from megamem.config import ConfigurationError, MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.megatron import generation
from megamem.megatron.model.whole_sequences import need_whole_sequences
from megamem.parallel.memory_group import MemoryGroup
from megamem.resolution import resolve


def test_the_dynamic_engine_is_refused_where_replicas_share_a_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    monkeypatch.setattr(
        DynamicInferenceEngine, "__init__", lambda self, controller, context: made.append(context)
    )
    generation.install_generation()
    spec = resolve(MemoryConfig(memory_layers=[0], memory_num_keys=4, memory_topk=2), 16)
    pool = MemoryPool(spec)
    model = nn.Sequential(nn.Linear(1, 1), MemoryLayer(spec, pool))
    controller = SimpleNamespace(inference_wrapped_model=SimpleNamespace(model=model))
    DynamicInferenceEngine(controller=controller, context="one")
    assert made == ["one"] and not generation.layers_of_wide_groups(model)
    monkeypatch.setattr(MemoryGroup, "world_size", 4)
    with pytest.raises(ConfigurationError) as error:
        DynamicInferenceEngine(controller, "two")
    assert str(error.value).startswith("--memory-group-size 4 does not work with Megatron's dynam")
    assert "load the checkpoint with --memory-group-size 1, or use" in str(error.value)
    assert made == ["one"]


class Model(nn.Module):
    """The arguments of Megatron's models."""

    def forward(
        self, tokens: Tensor, inference_context: Any = None, packed_seq_params: Any = None
    ) -> Tensor:
        """The tokens."""
        return tokens


def test_a_convolution_before_queries_needs_whole_sequences() -> None:
    tokens = torch.ones(3)
    for width, refused in ((0, False), (4, True)):
        config = {"memory_variant": "ultramem", "memory_topk": 2, "memory_query_conv": width}
        spec = resolve(MemoryConfig(memory_layers=[0], memory_num_keys=4, **config), 16)
        model = Model()
        need_whole_sequences(model, {"layer_0": MemoryPool(spec)})
        assert model(tokens).equal(tokens) and model(tokens, inference_context=None).equal(tokens)
        if not refused:
            assert model(tokens, object(), object()).equal(tokens)
            continue
        for rest, more, meaning in (
            ((object(),), {}, "generation"),
            ((), {"inference_context": object()}, "generation"),
            ((), {"packed_seq_params": object()}, "packed sequences"),
        ):
            with pytest.raises(ConfigurationError, match=f"-conv 4 does not work with {meaning}"):
                model(tokens, *rest, **more)


def test_the_tools_of_a_checkout_find_the_longest_sequence() -> None:
    args = Namespace(inference_max_seq_length=2560, max_position_embeddings=32)
    generation.name_longest(args)
    assert args.inference_max_sequence_length == 32
    args.inference_max_sequence_length = 7
    generation.name_longest(args)
    assert args.inference_max_sequence_length == 7
