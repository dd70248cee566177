"""What settings mean in one model on its ranks."""

import dataclasses
import typing

import pytest

from megamem.config import ConfigurationError, MemoryConfig
from megamem.layers.variants import VARIANTS
from megamem.resolution import resolve
from megamem.spec import Layout, MemorySpec

V1 = {"memory_variant": "ultramem"}
V2 = {"memory_variant": "ultramem-v2"}


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_topk": 33, "memory_num_keys": 32}, "-topk 33 is larger than --memory-num-keys"),
        ({"memory_cores": 2}, "--memory-cores 2 needs --memory-variant ultramem or"),
        ({"memory_dropout": 0.1}, "--memory-dropout 0.1 needs --memory-variant ultramem or"),
        (V1 | {"memory_expansion": 3}, "--memory-expansion 3 is not a square.* use 1 or 4"),
        (V1 | {"memory_topk": 4, "memory_final_topk": 17}, "-topk 17 is larger than the 16 pairs"),
        (V1 | {"memory_num_keys": 16}, "--memory-topk 42 is larger than .* the 32 sub-keys"),
        (V1 | {"memory_value_dim": 24}, "--memory-value-dim 24 is .* 8 for each .*-cores 2.* 32"),
        (V1 | {"memory_tucker_rank": 33}, "-rank 33 is larger than the 32 numbers of half a query"),
        (V1 | {"memory_num_keys": 30_000}, "means 60000 sub-keys per query half"),
        (V1 | {"memory_pre_value_dim": 8}, "--memory-pre-value-dim 8 needs .*ultramem-v2"),
        (V2 | {"memory_skip": 1}, "--memory-skip 1 needs --memory-variant ultramem,"),
        (
            V2 | {"memory_share_layers": 2, "memory_pool": "shared"},
            "--memory-share-layers 2 and --memory-pool shared both",
        ),
        (V2 | {"memory_mode": "column"}, "--memory-mode column splits rows"),
        (V2 | {"memory_pre_value_dim": 12}, "--memory-pre-value-dim 12 is not a multiple of 8"),
    ],
)
def test_what_cannot_work_together_is_refused(settings, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resolve(MemoryConfig(memory_layers=[0, 1], **settings), 64)


def test_ultramem_has_defaults_of_its_own() -> None:
    """Those of section 5 of the specification: both papers, and the released code's by name."""
    one = resolve(MemoryConfig(memory_layers=[0, 1], **V1), 1024, num_layers=12)
    assert (one.heads, one.topk, one.final_topk, one.tucker_rank, one.cores) == (2, 42, 42, 2, 2)
    assert (one.key_dim, one.value_dim, one.read_width) == (1024, 512, 2048)
    assert (one.num_rows, one.keys_per_side, one.pool) == (1024**2, 2048, "layer")
    assert one.keep_ffn and one.qk_norm and not one.rank_queries
    assert (one.core_aux_weight, one.core_aux_margin, one.lr_times) == (0.001, 0.15, 10)
    # the standard deviations that the papers' formulas give for 151M, 1.6B and 227M
    assert round(one.value_init_std, 4) == 0.0445
    large = resolve(MemoryConfig(memory_layers=[0], **V1), 2048, num_layers=32)
    assert round(large.value_init_std, 4) == 0.0273
    two = resolve(MemoryConfig(memory_layers=[0, 1], **V2), 768)
    assert (two.heads, two.topk, two.final_topk, two.expansion) == (1, 32, 32, 1)
    assert (two.value_dim, two.pre_value_dim, two.read_width) == (288, 96, 288)
    assert two.rank_queries and (two.core_aux_weight, two.lr_times) == (0, 1)
    released = resolve(MemoryConfig(memory_layers=[0], memory_init="released", **V2), 768)
    assert (released.value_init_std, released.key_gain) == (0.02, 384**-0.4)
    # g neighbours share g * N * N rows, of which a layer has sub-keys for all
    four = resolve(MemoryConfig(memory_layers=[0, 1, 2, 3], memory_share_layers=4, **V2), 768)
    assert (four.num_rows, four.keys_per_side) == (4 * 1024**2, 2048)


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
