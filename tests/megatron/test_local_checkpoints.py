"""Checkpoints of --non-persistent-ckpt-type local, of which each rank keeps a file of its own.

bash tests/bridge.sh            makes an environment with nvidia-resiliency-ext, and runs them
"""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.megatron_runs import run_training

MEMORY = ("--memory-layers", 0, 1, "--memory-num-keys", 16, "--memory-topk", 4)
MEMORY += ("--memory-heads", 2)
LOCAL = ("--non-persistent-ckpt-type", "local", "--non-persistent-local-ckpt-algo", "atomic")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("nvidia_resiliency_ext") is None,
        reason="nvidia-resiliency-ext, which saves them, is not installed; see tests/bridge.sh",
    ),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The folder of an iteration 2, and the losses of the run that goes on from there."""
    folder = tmp_path_factory.mktemp("local")
    often = ("--save", folder / "unused", "--save-interval", 100, "--non-persistent-save-interval")
    log = run_training("save", 2, *MEMORY, *_local(folder), *often, 2, "--train-iters", 3)
    return folder, log.losses


def _local(folder: Path) -> tuple[object, ...]:
    return (*LOCAL, "--non-persistent-local-ckpt-dir", folder / "local")


def _load(saved: Path, empty: Path, *flags: object):
    # Megatron looks for local checkpoints only if --load is given
    words = (*_local(saved), "--load", empty, *flags)
    return run_training("load", 2, *words, "--train-iters", 3, check=False)


def test_one_of_the_same_model_is_resumed(saved, tmp_path: Path) -> None:
    log = _load(saved[0], tmp_path, *MEMORY)
    assert log.iterations == [3] and log.losses == saved[1][2:], log.tail()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*MEMORY, "--memory-topk", 2), "--memory-topk 2 differs from 4 in {}; use"),
        ((*MEMORY, "--memory-optimizer", "sgd"), "sgd differs from adamw, whose state {} holds"),
        ((), "{} holds memory layers, but --memory-layers is not given"),
    ],
    ids=["other memory", "other optimizer", "no memory"],
)
def test_one_of_another_model_is_refused(saved, tmp_path: Path, flags, message: str) -> None:
    log = _load(saved[0], tmp_path, *flags)
    named = f"--non-persistent-local-ckpt-dir {saved[0] / 'local'}"
    assert log.returncode != 0 and not log.iterations
    assert message.format(named) in log.stdout, log.tail()
    assert "Traceback" not in re.sub(r"W\d+ .*", "", log.stdout)
