import argparse
import re
from dataclasses import replace

import pytest

from megamem.config import MemoryConfig
from megamem.layers.variants import table_shapes
from megamem.megatron.startup.saved_model import checkpoint_problems, compare
from megamem.resolution import resolve
from megamem.spec import MemorySpec

CONFIG = MemoryConfig(memory_layers=[1, 2], memory_num_keys=8, memory_topk=2)
MEMORY = resolve(CONFIG, 16)
SAVED = {
    "memory_values.shared.weight": (64, 16),
    "decoder.layers.1.mlp.memory.keys.sub_keys": (2, 4, 8, 4),
    "decoder.layers.2.mlp.memory.keys.sub_keys": (2, 4, 8, 4),
}


def _with(**settings) -> MemorySpec:
    return resolve(replace(CONFIG, **settings), 16)


def test_the_same_settings_fit() -> None:
    assert compare(SAVED, MEMORY, "--load ckpt") == []
    assert compare({"decoder.layers.0.x": (1,)}, None, "--load ckpt") == []


@pytest.mark.parametrize(
    ("saved", "memory", "message"),
    [
        (SAVED, None, "holds memory layers, but --memory-layers is not given"),
        ({"decoder.x": (3,)}, MEMORY, "was saved without memory layers"),
        (SAVED, _with(memory_num_keys=16), "means 256 rows, but --load ckpt holds 64"),
        (SAVED, _with(memory_value_dim=24), "--memory-value-dim 24 means rows of that width"),
        (SAVED, resolve(CONFIG, 32), "--hidden-size 32 means rows of that width"),
        (SAVED, _with(memory_pool="layer"), "holds tables shared, but --memory-pool layer"),
        (SAVED, _with(memory_layers=[1, 3]), "--memory-layers 3 is no memory layer"),
        (SAVED, _with(memory_heads=2), "--memory-heads 2 with --memory-key-dim 8 differs"),
        (SAVED, _with(memory_key_dim=32), "use --memory-heads 4 and --memory-key-dim 8"),
    ],
)
def test_other_settings_are_named(saved, memory, message) -> None:
    problems = compare(saved, memory, "--load ckpt")
    assert any(message in problem for problem in problems), problems


ULTRAMEM = {"memory_pool": "layer", "memory_variant": "ultramem", "memory_value_dim": 16}
V2 = ULTRAMEM | {"memory_variant": "ultramem-v2", "memory_pre_value_dim": 8}


def _shapes(spec: MemorySpec) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of a model holds."""
    found = {f"memory_values.{name}.weight": shape for name, shape in table_shapes(spec).items()}
    ranks = (spec.tucker_rank,) if spec.tucker_rank else ()
    keys = (2, spec.heads, spec.keys_per_side, *ranks, spec.key_dim // 2)
    return found | {f"decoder.layers.{n}.mlp.memory.keys.sub_keys": keys for n in spec.layers}


@pytest.mark.parametrize(
    ("saved", "run", "message"),
    [
        (V2, V2 | {"memory_pre_value_dim": 16}, "--memory-pre-value-dim 16 differs from 8 in"),
        (V2, V2 | {"memory_value_dim": 32}, "--memory-value-dim 32 means rows of that width"),
        (V2, ULTRAMEM, "and tables p by Tucker scores, .*; use --memory-variant ultramem-v2."),
        (
            ULTRAMEM,
            {"memory_pool": "layer"},
            "alone by Tucker scores, but --memory-variant memory. reads values alone; use "
            "--memory-variant ultramem.",
        ),
        (
            {"memory_pool": "layer"},
            ULTRAMEM,
            "values alone, but --memory-variant ultramem reads values alone by Tucker scores; use "
            "--memory-variant memory or memory.",
        ),
        (
            ULTRAMEM | {"memory_tucker_rank": 3},
            ULTRAMEM,
            "--memory-tucker-rank 2 differs from layer 1 of .*; use --memory-tucker-rank 3",
        ),
        (
            ULTRAMEM | {"memory_expansion": 9},
            ULTRAMEM,
            "--memory-expansion 4 differs from .*; use --memory-expansion 9",
        ),
        (V2 | {"memory_share_layers": 2}, V2, "means 64 rows, but --load ckpt holds 128"),
        (ULTRAMEM | {"memory_key_dim": 8}, ULTRAMEM, "use --memory-heads 2 and --memory-key-dim 8"),
    ],
)
def test_shapes_of_ultramem_are_named(saved: dict, run: dict, message: str) -> None:
    held = _shapes(_with(**saved))
    assert compare(held, _with(**saved), "--load ckpt") == []
    problems = compare(held, _with(**run), "--load ckpt")
    assert any(re.search(message, problem) for problem in problems), problems


def test_nothing_to_load_is_no_problem(tmp_path) -> None:
    for load in (None, str(tmp_path / "absent"), str(tmp_path)):
        assert checkpoint_problems(MEMORY, argparse.Namespace(load=load)) == []


def test_a_damaged_checkpoint_is_said_to_be_one(tmp_path) -> None:
    folder = tmp_path / "iter_0000005"
    folder.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / ".metadata").write_bytes(b"not a pickle")
    args = argparse.Namespace(load=str(tmp_path))
    [problem] = checkpoint_problems(MEMORY, args)
    assert "cannot be read" in problem and "--ckpt-step" in problem
