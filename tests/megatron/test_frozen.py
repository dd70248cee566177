"""Scripts that freeze a part of their model, through Megatron's training loop."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megamem.checkpoint import SHARED, table_key
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_tiny_training import DO, SP, TP2, WIDE

MEMORY = ("--memory-layers", 1, 2, "--memory-num-keys", 16, "--memory-heads", 2, "--memory-topk", 4)
WEIGHT = table_key(SHARED)

pytestmark = pytest.mark.gloo


def _run(
    part: str, folder: Path, *flags: object, ranks: int = 1, check: bool = True
) -> TrainingLog:
    """Train with a part frozen, and save after the first and after the last step."""
    saving = ("--save", folder, "--save-interval", 1, "--lr-warmup-iters", 0)
    return run_training(
        f"{part} frozen",
        ranks,
        *(*MEMORY, *saving, "--train-iters", 3, *flags),
        module="tests.helpers.freezes",
        environment={"FREEZE": part},
        check=check,
    )


def _changed(folder: Path) -> tuple[set[str], set[str]]:
    """Names of the weights that the second and third step changed, and of all."""
    first, last = (saved_tensors(folder / f"iter_000000{step}") for step in (1, 3))
    names = {name for name in first if not name.startswith("optimizer.")}
    assert names <= last.keys() and WEIGHT in names

    def differ(name: str) -> bool:
        a, b = first[name], last[name]
        return isinstance(a, Tensor) and not torch.equal(a, b)

    return {name for name in names if differ(name)}, names


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(1, ()), (2, (*TP2, *SP, *WIDE)), (2, (*DO, *WIDE, "--bf16"))],
    ids=["one rank", "tensor parallel", "distributed optimizer"],
)
def test_the_tables_train_where_nothing_else_does(ranks, flags, tmp_path: Path) -> None:
    log = _run("rest", tmp_path, *flags, ranks=ranks)
    assert all(norm > 0 for norm in log.grad_norms)
    changed, names = _changed(tmp_path)
    assert changed == {WEIGHT} and len(names) > 20
    resuming = ("--load", tmp_path, "--override-opt-param-scheduler", "--train-iters", 4)
    assert _run("rest", tmp_path, *flags, *resuming, ranks=ranks).iterations == [4]


def test_frozen_tables_are_refused_unless_their_learning_rate_is_zero(tmp_path: Path) -> None:
    refused = _run("tables", tmp_path, check=False)
    (said,) = [line for line in refused.stdout.splitlines() if "megamem: error" in line]
    assert "False for value table shared" in said and "--memory-lr 0" in said
    assert "Traceback" not in refused.stdout
    _run("tables", tmp_path, "--memory-lr", 0)
    changed, names = _changed(tmp_path)
    assert WEIGHT not in changed and len(changed) > 20
