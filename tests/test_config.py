import argparse
import dataclasses

import pytest

from megamem.config import ConfigurationError, MemoryConfig, flag


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_layers": [1, 2, 1]}, "--memory-layers 1 2 1 names layer 1 more than once"),
        ({"memory_layers": [-1]}, "--memory-layers -1 is negative: layers are counted from 0"),
        ({"memory_heads": 0}, "--memory-heads 0 must be at least 1"),
        ({"memory_topk": 0}, "--memory-topk 0 must be at least 1"),
        ({"memory_num_keys": 46341}, "--memory-num-keys 46341 is larger than 46340"),
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


def test_from_args_reads_every_field_and_leaves_the_rest() -> None:
    given = {f.name: getattr(MemoryConfig(), f.name) for f in dataclasses.fields(MemoryConfig)}
    given |= {"memory_layers": [3], "memory_heads": 7, "memory_wire": "alltoall"}
    config = MemoryConfig.from_args(argparse.Namespace(**given, lr=1.0))
    assert config.to_dict() == given
    assert MemoryConfig.from_args(argparse.Namespace()) == MemoryConfig()


def test_a_flag_is_named_after_its_field() -> None:
    assert flag("memory_num_keys") == "--memory-num-keys"
