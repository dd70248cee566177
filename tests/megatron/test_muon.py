"""Muon and others of Megatron's optimizers for the model; tables have an optimizer of their own."""

from pathlib import Path

import pytest

from megamem.megatron import compat
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_tiny_training import DO, MEMORY, SP, TP2, WIDE

# Newton-Schulz in fp32, and of complete matrices, so that no layout computes anything else
MUON = ("--optimizer", "muon", "--muon-fp32-matmul-prec", "high", "--muon-tp-mode", "duplicated")
BF16 = ("--bf16",)

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def alone() -> TrainingLog:
    return run_training("alone", 1, *MEMORY, *MUON)


@pytest.fixture(scope="module")
def alone_in_bf16() -> TrainingLog:
    return run_training("alone in bf16", 1, *MEMORY, *MUON, *BF16)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="replicas"),
        pytest.param(WIDE, id="rows over two ranks"),
        pytest.param(TP2, id="tensor-parallel"),
        pytest.param((*TP2, *SP), id="sequence-parallel"),
    ],
)
def test_two_ranks_take_the_steps_of_one(alone: TrainingLog, flags: tuple) -> None:
    log = run_training("two", 2, *MEMORY, *MUON, *flags)
    assert log.losses == pytest.approx(alone.losses, rel=1e-5)
    assert log.grad_norms == pytest.approx(alone.grad_norms, abs=1.1e-3)


@pytest.mark.parametrize("flags", [(), WIDE], ids=["replicas", "rows over two ranks"])
def test_each_rank_updates_some_of_the_matrices(alone_in_bf16: TrainingLog, flags: tuple) -> None:
    """The layer-wise distributed optimizer, of which Megatron has no fp32 form."""
    log = run_training("layer-wise", 2, *MEMORY, *MUON, *BF16, *DO, *flags)
    assert log.losses == pytest.approx(alone_in_bf16.losses, rel=2e-3)
    assert log.grad_norms == pytest.approx(alone_in_bf16.grad_norms, rel=2e-2)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((*MUON, *BF16), id="muon"),
        pytest.param((*MUON, *BF16, *DO), id="layer-wise muon"),
        pytest.param(("--optimizer", "lion"), id="lion"),
    ],
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(flags: tuple, tmp_path: Path) -> None:
    saving = ("--save", tmp_path, "--save-interval", 3)
    whole = run_training("whole", 2, *MEMORY, *flags, *saving)
    assert whole.losses[-1] < whole.losses[0]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    rest = run_training("rest", 2, *MEMORY, *flags, "--load", tmp_path)
    assert rest.iterations == [4, 5]
    assert rest.grad_norms == whole.grad_norms[3:] and rest.losses[0] == whole.losses[3]


@pytest.mark.skipif(compat.MAKES_MUON is not None, reason="0.17 has no --optimizer soap")
def test_soap_takes_the_steps_of_one_process_on_two_ranks() -> None:
    """It is not saved, because Megatron cannot: its state has other shapes than the weights."""
    one, two = (run_training("soap", ranks, *MEMORY, "--optimizer", "soap") for ranks in (1, 2))
    assert one.losses[-1] < one.losses[0]
    # it enlarges differences in rounding, so the last step is not compared
    assert two.losses[:4] == pytest.approx(one.losses[:4], rel=1e-4)


def test_which_optimizer_has_what(tmp_path: Path) -> None:
    """Matrices are Muon's, sub-keys and norms Adam's, and tables neither's."""
    saving = ("--save", tmp_path, "--save-interval", 1, "--exit-interval", 1)
    run_training("saved", 1, *MEMORY, "--memory-qk-norm", *MUON, *saving)
    saved = saved_tensors(tmp_path / "iter_0000001")
    momentum = {key for key in saved if "momentum_buffer" in key}
    moments = {key for key in saved if "exp_avg_sq" in key}
    assert any("memory.query" in key for key in momentum)
    assert all(saved[key].dim() == 2 for key in momentum)
    assert any("sub_keys" in key for key in moments)
    matrices = [key for key in moments if saved[key].dim() == 2]
    assert all("embedding" in key or "memory_values" in key for key in matrices), matrices
    assert any("memory_values" in key for key in matrices)
    assert not any("memory_values" in key for key in momentum)
