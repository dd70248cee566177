"""What settings mean in one model on its ranks."""

import dataclasses
import typing

import pytest

from megamem.config import ConfigurationError, MemoryConfig
from megamem.layers.variants import VARIANTS
from megamem.resolution import resolve
from megamem.spec import Layout, MemorySpec


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
    spec = resolve(MemoryConfig(**settings), hidden_size)
    assert (spec.value_dim, spec.key_dim) == widths


def test_widths_that_cannot_follow_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="--hidden-size 100 is not a multiple of 8"):
        resolve(MemoryConfig(), 100)
    with pytest.raises(ConfigurationError, match="--memory-value-dim 64 differs"):
        resolve(MemoryConfig(memory_variant="memory", memory_value_dim=64), 128)


def test_derived_numbers() -> None:
    spec = resolve(MemoryConfig(memory_num_keys=100, memory_heads=3, memory_topk=5), 16)
    assert (spec.num_rows, spec.lookups_per_token) == (10_000, 15)


def test_nothing_is_left_to_decide() -> None:
    """No field can be None, and no value of the defaults is."""
    spec = resolve(MemoryConfig(memory_layers=[3, 1]), 64)
    for name, hint in typing.get_type_hints(MemorySpec).items():
        assert type(None) not in typing.get_args(hint), name
        assert getattr(spec, name) is not None, name
    assert spec.layers == (1, 3) and spec.value_init_std == 64**-0.5
    assert (spec.lr, spec.weight_decay, spec.clip_grad) == ("model", "model", "model")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "ranks", "layout", "wire"),
    [
        ({}, {}, Layout("row", 1, 1), "allgather"),
        ({}, {"tensor_ranks": 4, "stage_ranks": 16}, Layout("row", 4, 1), "allgather"),
        (
            {"memory_group_size": 16},
            {"tensor_ranks": 4, "stage_ranks": 16},
            Layout("row", 16, 1, 2),
            "alltoall",
        ),
        ({"memory_mode": "column"}, {"tensor_ranks": 4}, Layout("column", 4, 4), "allgather"),
        (
            {"memory_mode": "2d", "memory_group_size": 8},
            {"tensor_ranks": 2, "stage_ranks": 8},
            Layout("2d", 8, 2),
            "allgather",
        ),
        (
            {"memory_mode": "2d", "memory_group_size": 8, "memory_column_ranks": 4},
            {"tensor_ranks": 2, "stage_ranks": 8},
            Layout("2d", 8, 4),
            "allgather",
        ),
        (
            {"memory_mode": "auto", "memory_group_size": 8, "memory_value_dim": 2048},
            {"tensor_ranks": 2, "stage_ranks": 8},
            Layout("column", 8, 8),
            "allgather",
        ),
        ({"memory_wire": "alltoall"}, {"tensor_ranks": 2}, Layout("row", 2, 1), "alltoall"),
    ],
)
def test_tables_are_laid_over_ranks(settings, ranks, layout, wire) -> None:
    spec = resolve(MemoryConfig(**settings), 64, **ranks)
    assert (spec.layout, spec.wire) == (layout, wire)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_group_size": 3}, "--memory-group-size 3 does not divide the 8 ranks .* 1, 2, 4"),
        (
            {"memory_group_size": 8, "memory_mode": "2d", "memory_column_ranks": 3},
            "--memory-column-ranks 3 does not divide --memory-group-size 8; use one of 1, 2, 4",
        ),
        (
            {"memory_group_size": 8, "memory_mode": "column", "memory_value_dim": 32},
            "--memory-column-ranks 4 or fewer",
        ),
    ],
)
def test_tables_that_cannot_be_cut_so_are_refused(settings, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resolve(MemoryConfig(**settings), 64, stage_ranks=8)


def test_every_variant_can_be_asked_for() -> None:
    hint = typing.get_type_hints(MemoryConfig)["memory_variant"]
    assert set(typing.get_args(hint)) == set(VARIANTS)
