"""What megamem changes about Megatron's inference engines; examples/test_generate.py runs them."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
from megatron.core.inference.engines import DynamicInferenceEngine
from torch import nn

from megamem.config import ConfigurationError, MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.megatron import generation
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


def test_the_tools_of_a_checkout_find_the_longest_sequence() -> None:
    args = Namespace(inference_max_seq_length=2560, max_position_embeddings=32)
    generation.name_longest(args)
    assert args.inference_max_sequence_length == 32
    args.inference_max_sequence_length = 7
    generation.name_longest(args)
    assert args.inference_max_sequence_length == 7
