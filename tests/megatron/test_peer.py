"""PEER in Megatron's training loop and in its checkpoints."""

import argparse
from pathlib import Path

import pytest
import torch

from megamem.checkpoint import placement_key, state_key, table_key
from megamem.config import ConfigurationError, MemoryConfig
from megamem.megatron.startup.saved_model import compare, saved_tables, state_problems
from megamem.resolution import resolve
from megamem.spec import MemorySpec
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_resume import LONG, _ends_alike
from tests.megatron.test_tiny_training import FULL, MEMORY, SP, TP2, WIDE, _same_steps

PEER = (*MEMORY, *LONG, "--memory-variant", "peer", "--memory-value-init-std", 0.2)
ROWS, HIDDEN = 81, 64


@pytest.fixture(scope="module")
def alone() -> TrainingLog:
    return run_training("one process", 1, *PEER)


@pytest.mark.gloo
def test_the_loss_falls_and_both_tables_are_counted(alone: TrainingLog) -> None:
    assert alone.losses[-1] < alone.losses[0] - 0.1
    said = "2 heads x 4 rows, 2 shared tables (v, u) of 81 x 64 = 10.37 k parameters;"
    assert f"layers 0, 1 are peer: {said}" in alone.stdout
    feed_forward, attention, norms = 2 * 64 * 128, 4 * 64 * 64, 4 * 64
    # 2 heads of width 256
    query, sub_keys = 512 * (64 + 1), 2 * 2 * 9 * 128
    dense = 2 * (attention + norms + feed_forward)
    memories = 2 * (attention + norms + query + sub_keys) + 2 * ROWS * HIDDEN
    # tied embeddings and a final norm
    assert alone.parameters == {(0, 0): dense + memories + 128 * 64 + 2 * 64}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingLog, Path]:
    """A run of two tensor-parallel ranks that saves checkpoints, with its folder."""
    folder = tmp_path_factory.mktemp("saved")
    saving = ("--save", folder, "--save-interval", 4)
    return run_training("tp sp", 2, *PEER, *TP2, *SP, *saving, "--memory-metrics", "on"), folder


@pytest.mark.gloo
def test_tensor_parallel_ranks_take_the_steps_of_one_process(
    alone: TrainingLog, saved: tuple[TrainingLog, Path]
) -> None:
    log, folder = saved
    _same_steps(log, alone)
    assert log.stdout.count("memory: rows used") == 8
    found = saved_tensors(folder / "iter_0000004")
    tables, moments = ("shared", "shared.u"), ("exp_avg", "exp_avg_sq")
    wide = {table_key(t) for t in tables} | {state_key(t, of) for t in tables for of in moments}
    # without the entries of Megatron's optimizer
    of_tables = {key for key in found if "memory_values" in key}
    counted = {state_key(t, name) for t in tables for name in ("hits", "batches")}
    assert of_tables == wide | counted | {placement_key(table) for table in tables}
    for key in wide:
        assert found[key].shape == (ROWS, HIDDEN)
        assert found[key].any(1).sum() > ROWS / 2
    # the standard deviation of v is the flag's, that of u follows from the width
    assert found[table_key("shared")].std() > 1.3 * found[table_key("shared.u")].std()


@pytest.mark.gloo
def test_data_parallel_ranks_resume_tensor_parallel_ones(
    alone: TrainingLog, saved: tuple[TrainingLog, Path]
) -> None:
    """Rows are divided over data-parallel ranks, with alltoall and full recomputation."""
    other = ("--memory-wire", "alltoall", *WIDE, *FULL, "--ckpt-step", 4)
    log = run_training("resume", 2, *PEER, *other, "--load", saved[1])
    assert log.iterations == [5, 6, 7, 8]
    _ends_alike(log, alone)


SETTINGS = {"memory_layers": [1], "memory_num_keys": 8, "memory_topk": 2}
SUB_KEYS = {"decoder.layers.1.mlp.memory.keys.sub_keys": (2, 4, 8, 128)}


def _memory(variant: str = "peer", **settings) -> MemorySpec:
    return resolve(MemoryConfig(**SETTINGS, memory_variant=variant, **settings), 16)


def _saved(*tables: str) -> dict[str, tuple[int, ...]]:
    return SUB_KEYS | {table_key(table): (64, 16) for table in tables}


@pytest.mark.parametrize(
    ("saved", "memory", "message"),
    [
        (_saved("shared", "shared.u"), _memory(), None),
        (_saved("layer_1", "layer_1.u"), _memory(memory_pool="layer"), None),
        (
            _saved("shared", "shared.u"),
            _memory("memory"),
            "holds values and tables u, but --memory-variant memory reads values alone",
        ),
        (
            _saved("shared"),
            _memory(),
            "holds values alone, but --memory-variant peer reads values and tables u",
        ),
        (_saved("shared", "shared.u"), _memory(memory_pool="layer"), "reads layer_1, layer_1.u;"),
        (
            _saved("shared", "shared.u") | {table_key("shared.u"): (81, 16)},
            _memory(),
            "means 64 rows, but --load ckpt holds 81",
        ),
    ],
)
def test_a_checkpoint_of_another_variant_is_named(saved, memory, message) -> None:
    problems = compare(saved, memory, "--load ckpt")
    assert problems == [] if message is None else message in problems[0], problems


def test_state_of_u_that_is_missing_is_named() -> None:
    saved = _saved("shared", "shared.u")
    assert saved_tables(saved) == ["shared", "shared.u"]
    state = {state_key(t, "exp_avg"): (64, 16) for t in ("shared", "shared.u")}
    state |= {state_key("shared", "exp_avg_sq"): (64, 16)}
    args = argparse.Namespace(params_dtype=torch.float32)
    (problem,) = state_problems(saved | state, _memory(), args, "--load ckpt")
    assert "needs exp_avg_sq of shape [64, 16] for table shared.u, but" in problem
    assert "holds exp_avg;" in problem
    of_u = {state_key("shared.u", "exp_avg"): (64, 16)}
    (problem,) = state_problems(saved | of_u, _memory(), args, "--load ckpt")
    assert "for table shared, but --load ckpt holds no state" in problem
    state |= {state_key("shared.u", "exp_avg_sq"): (64, 16)}
    assert state_problems(saved | state, _memory(), args, "--load ckpt") == []


@pytest.mark.parametrize("mode", ["column", "2d"])
def test_columns_are_refused(mode: str) -> None:
    message = f"--memory-mode {mode} splits rows, but --memory-variant peer .* --memory-mode row"
    with pytest.raises(ConfigurationError, match=message):
        _memory(memory_mode=mode)
    assert _memory(memory_mode="auto").layout.mode == "row"


def test_widths_of_a_layer() -> None:
    assert (_memory().value_dim, _memory().key_dim) == (16, 256)
    with pytest.raises(ConfigurationError, match="--memory-variant peer has no projection"):
        _memory(memory_value_dim=8)
