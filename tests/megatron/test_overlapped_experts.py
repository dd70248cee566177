"""The exchange of experts overlapped with computation, beside memory layers."""

import re
from typing import Any

import pytest

from tests.helpers.megatron_runs import ROOT, TrainingLog, run_training
from tests.megatron.test_kept_experts import EXPERTS, READS

OVERLAP = "--overlap-moe-expert-parallel-comm"
MODEL = (
    *("--moe-layer-freq", "([0]*1+[1]*3)", "--memory-layers", 1, 2, *READS, *EXPERTS),
    # three microbatches on each rank, whose forwards and backwards are interleaved
    *("--expert-model-parallel-size", 2, "--global-batch-size", 12),
)


def _run(*flags: object, **how: Any) -> TrainingLog:
    return run_training("experts", 2, *MODEL, *flags, **how)


@pytest.mark.gloo
@pytest.mark.parametrize(
    "kept",
    [
        pytest.param((), id="replaced", marks=pytest.mark.slow),
        pytest.param(("--memory-keep-ffn",), id="kept"),
    ],
)
def test_interleaved_microbatches_take_the_steps_of_others(kept: tuple) -> None:
    """Also with weight gradients in a step of their own, which begins after the backward.

    All of it: pytest -m "slow or not slow" tests/megatron/test_overlapped_experts.py.
    """
    usual = _run(*kept)
    assert usual.losses[-1] < usual.losses[0] - 0.1
    log = _run(*kept, script=ROOT / "tests/helpers/interleaved_in_fp32.py")
    assert log.losses == pytest.approx(usual.losses, rel=2e-6)
    assert log.grad_norms == pytest.approx(usual.grad_norms, abs=1.1e-3)
    turns = re.findall(r"^(backward|weights) of layer (\d)", log.stdout, re.MULTILINE)
    assert turns == [("backward", "2"), ("weights", "2"), ("backward", "1"), ("weights", "1")] * 15


@pytest.mark.gloo
def test_the_flag_in_bf16() -> None:
    usual, log = _run("--bf16"), _run("--bf16", OVERLAP)
    # the forward is the same, and Megatron prints the second loss as a mean of two
    assert log.losses[0] == usual.losses[0]
    assert log.losses == pytest.approx(usual.losses, rel=1e-2)
    assert log.losses[-1] < log.losses[0] - 0.1
