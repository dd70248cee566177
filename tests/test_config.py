import argparse
import dataclasses

import pytest

from megamem.config import ConfigurationError, MemoryConfig, flag


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_layers": [1, 2, 1]}, "--memory-layers 1 2 1 names layer 1 more than once"),
        ({"memory_layers": [-1]}, "--memory-layers -1: layers are counted from 0"),
        ({"memory_heads": 0}, "--memory-heads 0 must be at least 1"),
        ({"memory_topk": 0}, "--memory-topk 0 must be at least 1"),
        ({"memory_num_keys": 46341}, "--memory-num-keys 46341 is larger than 46340"),
        (
            {"memory_topk": 33, "memory_num_keys": 32},
            "--memory-topk 33 is larger than --memory-num-keys 32",
        ),
        ({"memory_value_dim": 100}, "--memory-value-dim 100 is not a multiple of 8"),
        ({"memory_value_dim": 0}, "--memory-value-dim 0 must be at least 1"),
        ({"memory_key_dim": 7}, "--memory-key-dim 7 is odd"),
        ({"memory_lr": float("nan")}, "--memory-lr nan must be a finite number"),
        ({"memory_weight_decay": -0.1}, "--memory-weight-decay -0.1 must be a finite number"),
    ],
)
def test_impossible_setting_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MemoryConfig(**settings)


def test_all_problems_come_in_one_error() -> None:
    with pytest.raises(ConfigurationError) as raised:
        MemoryConfig(memory_heads=0, memory_key_dim=3)
    assert "2 settings cannot work" in str(raised.value)
    assert "--memory-heads 0" in str(raised.value)
    assert "--memory-key-dim 3" in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "hidden_size", "widths"),
    [
        ({}, 768, (768, 384)),
        ({"memory_value_dim": 64}, 100, (64, 32)),
        ({"memory_variant": "memory"}, 2048, (2048, 256)),
        ({"memory_key_dim": 512}, 64, (64, 512)),
    ],
)
def test_widths_follow_from_the_hidden_size(settings, hidden_size, widths) -> None:
    config = MemoryConfig(**settings).resolve(hidden_size)
    assert (config.value_dim, config.key_dim) == widths


def test_widths_that_cannot_follow_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="--hidden-size 100 is not a multiple of 8"):
        MemoryConfig().resolve(100)
    with pytest.raises(ConfigurationError, match="--memory-value-dim 64 differs"):
        MemoryConfig(memory_variant="memory", memory_value_dim=64).resolve(128)


def test_from_args_reads_every_field_and_leaves_the_rest() -> None:
    given = {f.name: getattr(MemoryConfig(), f.name) for f in dataclasses.fields(MemoryConfig)}
    given |= {"memory_layers": [3], "memory_heads": 7, "memory_wire": "alltoall"}
    config = MemoryConfig.from_args(argparse.Namespace(**given, lr=1.0))
    assert config.to_dict() == given
    assert MemoryConfig.from_args(argparse.Namespace()) == MemoryConfig()


def test_derived_numbers() -> None:
    config = MemoryConfig(memory_num_keys=100, memory_heads=3, memory_topk=5)
    assert (config.num_rows, config.lookups_per_token, config.enabled) == (10_000, 15, False)
    assert flag("memory_num_keys") == "--memory-num-keys"
