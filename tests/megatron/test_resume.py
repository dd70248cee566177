"""A run that is saved and resumed with another layout ends like an uninterrupted one."""

import re
from pathlib import Path

import pytest

from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_tiny_training import DO, MEMORY, PP2, SP, TP2, WIDE

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
    # without the first two, because Megatron prints the second as a mean
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


def test_resume_in_another_mode_and_group(tmp_path: Path) -> None:
    whole = run_training("uninterrupted", 1, *MEMORY, *LONG)
    _save(tmp_path, *WIDE, "--memory-mode", "column")
    _ends_alike(_resume(tmp_path, 2, *TP2, *SP), whole)


def test_a_rank_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    saving = ("--save", tmp_path, "--save-interval", 3)
    killed = run_training(
        "killed",
        2,
        *(*MEMORY, *LONG, *WIDE, *saving),
        check=False,
        module="tests.helpers.faulty",
        environment={"FAULT": "kill-while-saving 2"},
    )
    assert killed.returncode != 0 and killed.iterations[-1] == 6
    assert (tmp_path / "iter_0000006").is_dir(), "it died before it wrote anything"
    whole = run_training("uninterrupted", 1, *MEMORY, *LONG)
    again = _resume(tmp_path, 2, *WIDE)
    assert again.iterations[0] == 4
    _ends_alike(again, whole)


def test_finetuning_starts_with_new_optimizer_state(saved: Path) -> None:
    log = _resume(saved, 1, "--finetune", "--no-load-optim")
    assert log.iterations[0] == 1
    whole = run_training("uninterrupted", 1, *MEMORY, *LONG)
    assert log.losses[0] < whole.losses[0] - 0.1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--memory-num-keys", 10), "--memory-num-keys 10 differs from 9 in --load"),
        (("--memory-value-dim", 32), "--memory-value-dim 32 differs from 64 in --load"),
        (("--memory-placement-seed", 5), "--memory-placement-seed 5 differs from 0 in --load"),
        (
            ("--memory-optimizer", "lazy_adamw"),
            "needs touches of shape .* holds exp_avg",
        ),
    ],
    ids=["rows", "width", "placement", "optimizer"],
)
def test_a_table_of_another_shape_is_refused(saved: Path, flags: tuple, message: str) -> None:
    log = _resume(saved, 2, *TP2, *flags, check=False)
    assert log.returncode != 0
    said = [line for line in log.stdout.splitlines() if "megamem: error:" in line]
    assert len(said) == 1
    # a width that follows from another one is named with it
    assert re.search(message, log.stdout)
