"""A run that is saved and resumed ends where an uninterrupted one does, under any other layout."""

import re
from pathlib import Path

import pytest

from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.integration.test_tiny_training import DO, MEMORY, PP2, SP, TP2

LONG = ("--train-iters", 8, "--lr-decay-iters", 8)

pytestmark = pytest.mark.gloo


def _save(folder: Path, *flags: object, ranks: int = 2) -> None:
    saving = ("--save", folder, "--save-interval", 4, "--exit-interval", 4)
    log = run_training("save", ranks, *MEMORY, *LONG, *saving, *flags)
    assert log.iterations == [1, 2, 3, 4]


def _resume(folder: Path, ranks: int, *flags: object, check: bool = True) -> TrainingLog:
    return run_training("resume", ranks, *MEMORY, *LONG, "--load", folder, *flags, check=check)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two tensor-parallel ranks, which hold 40 and 41 rows."""
    folder = tmp_path_factory.mktemp("saved")
    _save(folder, *TP2, *SP)
    return folder


def _ends_alike(log: TrainingLog, other: TrainingLog) -> None:
    # not the first two, whose second is a mean
    assert log.losses[-2:] == pytest.approx(other.losses[-2:], rel=2e-6)
    assert log.grad_norms[-3:] == pytest.approx(other.grad_norms[-3:], abs=1.1e-3)


def test_resume_on_one_rank_and_on_two(saved: Path) -> None:
    whole = run_training("uninterrupted", 1, *MEMORY, *LONG)
    one = _resume(saved, 1)
    assert one.iterations == [5, 6, 7, 8]
    _ends_alike(one, whole)
    _ends_alike(_resume(saved, 2, *TP2), whole)
    _ends_alike(_resume(saved, 2, *PP2), whole)


def test_resume_with_the_distributed_optimizer_under_another_size(tmp_path: Path) -> None:
    flags = (*DO, "--dist-ckpt-optim-fully-reshardable")
    whole = run_training("uninterrupted", 1, *MEMORY, *LONG, *flags)
    _save(tmp_path, *flags, *TP2)
    _ends_alike(_resume(tmp_path, 2, *flags), whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--memory-num-keys", 10), "--memory-num-keys 10 asks for 100 rows, but .* holds 81"),
        (("--memory-value-dim", 32), "--memory-value-dim 32 differs from the width 64"),
    ],
    ids=["rows", "width"],
)
def test_a_table_of_another_shape_is_refused(saved: Path, flags: tuple, message: str) -> None:
    log = _resume(saved, 2, *TP2, *flags, check=False)
    assert log.returncode != 0
    said = [line for line in log.stdout.splitlines() if "megamem: error:" in line]
    assert len(said) == 1
    assert re.search(message, said[0])
