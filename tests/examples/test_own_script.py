"""The examples of the Python API: a Megatron script of one's own, and plain torch."""

import re
from pathlib import Path

import pytest

from megamem.checkpoint import state_key, table_key
from megamem.megatron import compat
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.commands import under_torchrun

ROOT = Path(__file__).parents[2]
OWN = str(ROOT / "examples" / "own_script.py")
MODEL = (
    *("--num-layers", 4, "--hidden-size", 64, "--num-attention-heads", 4, "--seq-length", 32),
    *("--max-position-embeddings", 32, "--position-embedding-type", "rope", "--lr", 2e-3),
    *("--micro-batch-size", 4, "--global-batch-size", 8, "--train-iters", 8),
    *("--attention-dropout", 0, "--hidden-dropout", 0, "--make-vocab-size-divisible-by", 32),
)
MEMORY = ("--memory-layers", 1, 2, "--memory-num-keys", 16, "--memory-topk", 8)
TP2 = ("--tensor-model-parallel-size", 2)

needs_descriptions = pytest.mark.skipif(
    not hasattr(compat.argument_utils, "gpt_config_from_args"),
    reason="Megatron describes models since 0.19; the script says so",
)


def _losses(said: str) -> dict[int, tuple[float, float]]:
    """Iteration -> loss and gradient norm."""
    found = re.findall(r"^iteration (\d+): loss (\S+), norm (\S+)$", said, re.MULTILINE)
    return {int(number): (float(loss), float(norm)) for number, loss, norm in found}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """Eight steps of two tensor-parallel ranks, and their checkpoint after four."""
    folder = tmp_path_factory.mktemp("own")
    four = ("--train-iters", 4, "--lr-decay-iters", 8, "--save", folder)
    first = _losses(under_torchrun(2, OWN, *MODEL, *MEMORY, *TP2, *four))
    rest = ("--lr-decay-iters", 8, "--override-opt-param-scheduler", "--load", folder)
    return first | _losses(under_torchrun(2, OWN, *MODEL, *MEMORY, *TP2, *rest)), folder


@needs_descriptions
@pytest.mark.gloo
def test_ranks_train_as_one_process_and_resume(saved: tuple[dict, Path]) -> None:
    alone = _losses(under_torchrun(1, OWN, *MODEL, *MEMORY))
    assert list(alone) == list(saved[0]) == list(range(1, 9))
    for number, truth in alone.items():
        # a resumed run draws its data from the start again
        if number <= 4:
            assert saved[0][number] == pytest.approx(truth, rel=1e-3), number
    assert saved[0][8][0] < alone[1][0] - 0.2
    found = saved_tensors(saved[1] / "iter_0000004")
    for key in (table_key("shared"), state_key("shared", "exp_avg")):
        assert found[key].shape == (256, 64) and found[key].any()
    assert found[state_key("shared", "hits")].any()


@needs_descriptions
@pytest.mark.gloo
def test_the_launcher_builds_the_same_model() -> None:
    """Digit for digit: patched functions find the memories there, and a plain script gets them."""
    launcher = (1, "-m", "megamem.run", "--cpu", OWN, *MODEL, *MEMORY)
    assert _losses(under_torchrun(*launcher)) == _losses(under_torchrun(1, OWN, *MODEL, *MEMORY))


@needs_descriptions
@pytest.mark.gloo
def test_what_cannot_work_is_refused_in_words() -> None:
    flags = ("--memory-layers", 9, 11, "--memory-lr-schedule", "constant")
    said = under_torchrun(1, OWN, *MODEL, *flags, check=False)
    assert "ConfigurationError: 2 settings cannot work" in said
    assert "--memory-layers 9 11 is out of range" in said
    assert "--memory-lr-schedule constant needs a learning rate" in said


@needs_descriptions
@pytest.mark.gloo
def test_without_the_flag_it_trains_a_plain_gpt() -> None:
    losses = _losses(under_torchrun(1, OWN, *MODEL))
    assert list(losses) == list(range(1, 9)) and losses[8][0] < losses[1][0] - 0.2


@pytest.mark.gloo
def test_plain_torch_trains_and_two_ranks_do_as_one() -> None:
    script = str(ROOT / "examples" / "plain_torch.py")
    alone, both = (re.findall(r"step (\d+): loss (\S+)", under_torchrun(n, script)) for n in (1, 2))
    assert [step for step, _ in alone] == ["0", "5", "10", "15", "20", "25", "30"]
    assert float(alone[-1][1]) < 0.01 < 5 < float(alone[0][1])
    for (_, one), (_, two) in zip(alone, both, strict=True):
        assert float(two) == pytest.approx(float(one), abs=2e-3)
