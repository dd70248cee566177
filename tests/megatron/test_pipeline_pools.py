"""A table that layers on several pipeline stages share.

Stages draw other initial weights than one process, so every run starts from one checkpoint. Only a
few steps are compared, because a lookup whose scores nearly tie is later decided by rounding.
"""

from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import saved_tensors
from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_tiny_training import DO, OVERLAP, PP2, TP2

# both chunks of the first rank of two with two virtual stages have memory layers
MEMORY = (
    *("--memory-layers", 0, 2, 3),
    *("--memory-num-keys", 9),
    *("--memory-heads", 2),
    *("--memory-topk", 4),
    *("--memory-lr", 3e-3),
)
LONG = ("--train-iters", 5, "--lr-decay-iters", 5, "--micro-batch-size", 1)
SAVING = ("--save-interval", 2, "--exit-interval", 2)
PP4 = ("--pipeline-model-parallel-size", 4)
VP2 = (*PP2, "--num-virtual-stages-per-pipeline-rank", 2)
WIDE = ("--memory-group-size", 2)
RESHARDED = (*DO, "--dist-ckpt-optim-fully-reshardable")

pytestmark = pytest.mark.gloo


def _start(folder: Path, *flags: object) -> Path:
    run_training("start", 1, *MEMORY, *LONG, *SAVING, "--save", folder, *flags)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the distributed optimizer, which does not load a checkpoint without it."""
    return _start(tmp_path_factory.mktemp("sharded"), *RESHARDED)


def _resume(folder: Path, ranks: int, *flags: object) -> TrainingLog:
    return run_training("resume", ranks, *MEMORY, *LONG, "--load", folder, *flags)


@pytest.fixture(scope="module")
def alone(start: Path) -> TrainingLog:
    return _resume(start, 1)


@pytest.fixture(scope="module")
def sharded_alone(sharded: Path) -> TrainingLog:
    return _resume(sharded, 1, *RESHARDED)


def _same_steps(log: TrainingLog, other: TrainingLog) -> None:
    assert log.iterations == [3, 4, 5]
    assert log.losses == pytest.approx(other.losses, rel=2e-6)
    assert log.grad_norms == pytest.approx(other.grad_norms, abs=1.1e-3)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, PP2, id="two stages"),
        pytest.param(4, (*PP4, "--memory-reduce-rows", "touched"), id="four stages"),
        pytest.param(2, (*VP2, "--calculate-per-token-loss"), id="virtual stages, per-token loss"),
        pytest.param(4, (*PP2, *TP2), id="two stages of two tensor-parallel ranks"),
    ],
)
def test_stages_take_the_steps_of_one_process(alone, start, ranks, flags) -> None:
    _same_steps(_resume(start, ranks, *flags), alone)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((*PP2, *WIDE, *OVERLAP), id="rows over the ranks of a stage"),
        pytest.param((*VP2, "--memory-group-size", 1), id="replicas on both stages"),
    ],
)
def test_with_data_parallel_ranks_and_the_distributed_optimizer(
    sharded_alone, sharded, flags
) -> None:
    _same_steps(_resume(sharded, 4, *RESHARDED, *flags), sharded_alone)


def test_what_stages_save_is_what_one_process_saves(start: Path, tmp_path: Path) -> None:
    """The table, the state of its optimizer and its read counts, each of them once."""
    saving = ("--save", tmp_path / "pp", "--save-interval", 4, "--exit-interval", 4)
    log = _resume(start, 2, *VP2, *saving)
    _resume(start, 1, "--save", tmp_path / "one", *saving[2:])
    of_stages, of_one = (saved_tensors(tmp_path / name / "iter_0000004") for name in ("pp", "one"))
    ours = [key for key in of_one if "memory_values" in key]
    assert len(ours) >= 6 and {key for key in of_stages if "memory_values" in key} == set(ours)
    for key in ours:
        torch.testing.assert_close(of_stages[key], of_one[key], rtol=1e-4, atol=1e-6, msg=key)
    # another pipeline size goes on from there
    last = _resume(tmp_path / "pp", 2, *PP2)
    assert last.iterations == [5] and last.losses[0] == pytest.approx(
        _resume(tmp_path / "one", 1).losses[0], rel=2e-6
    )
    assert log.iterations == [3, 4]
