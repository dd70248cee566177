"""Losses, convolution, dropout and learning rates of UltraMem in Megatron's training loop."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.pipeline_parallel import schedules

from megamem.megatron.model.loss_scale import megatrons_loss_scale
from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_tiny_training import (
    DO,
    FULL,
    OVERLAP,
    PP2,
    SELECTIVE,
    SP,
    TP2,
    _same_steps,
)
from tests.megatron.test_ultramem import VARIANTS

PER_TOKEN = ("--calculate-per-token-loss",)
CORES = ("--memory-core-aux-weight", 1)
RECIPE = (
    *VARIANTS["ultramem"],
    *CORES,
    *("--memory-balance-weight", 0.1),
    *("--memory-query-conv", 3),
    *("--memory-lr-times", 10),
)


@pytest.fixture(scope="module")
def alone() -> TrainingLog:
    """One process, in two microbatches a step."""
    return run_training("one process", 1, *RECIPE)


@pytest.mark.gloo
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((*TP2, *PER_TOKEN), id="tp, per-token loss"),
        pytest.param((*TP2, *SP, *SELECTIVE), id="tp, sequence parallel, selective recompute"),
        pytest.param((*DO, *OVERLAP, *FULL), id="dp, distributed optimizer, full recompute"),
        pytest.param(
            (*TP2, *SP, *PER_TOKEN, *FULL), marks=pytest.mark.slow, id="tp, sp, per token"
        ),
        pytest.param((*OVERLAP, *PER_TOKEN), marks=pytest.mark.slow, id="dp, per-token loss"),
    ],
)
def test_two_ranks_take_the_steps_of_one(alone: TrainingLog, flags: tuple) -> None:
    """Losses are added once, whatever is recomputed, and however gradients are averaged.

    The slow cases: `pytest -m slow tests/megatron/test_ultramem_recipe.py`.
    """
    _same_steps(run_training("two ranks", 2, *RECIPE, *flags), alone)


def _started(**config: object) -> None:
    """End a forward of a microbatch, as Megatron does on a stage that is not the last."""
    given = {"timers": None, "num_moe_experts": None, "mtp_num_layers": None}
    given |= {"grad_scale_func": None, "calculate_per_token_loss": False, **config}
    schedules.forward_step_calc_loss(
        model=None,
        output_tensor=torch.zeros(1),
        loss_func=None,
        config=SimpleNamespace(**given),
        vp_stage=None,
        collect_non_loss_data=False,
        num_microbatches=8,
        forward_data_store=[],
        cp_group_size=2,
        is_last_stage=False,
    )


def test_losses_get_the_scale_of_the_models_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    scale = megatrons_loss_scale()
    _started()
    assert scale.of(tokens=32) == 1 / 8
    _started(grad_scale_func=lambda x: 1024 * x)
    assert scale.of(tokens=32) == 1024 / 8
    _started(grad_scale_func=lambda x: 1024 * x, calculate_per_token_loss=True)
    assert scale.of(tokens=32) == 1024 * 32


@pytest.mark.gloo
@pytest.mark.slow
def test_stages_take_the_steps_of_one_process(tmp_path: Path) -> None:
    """Run it by `pytest -m slow tests/megatron/test_ultramem_recipe.py`."""
    long = ("--micro-batch-size", 1, "--lr-warmup-iters", 0)
    saving = ("--save", tmp_path, "--save-interval", 2, "--exit-interval", 2)
    run_training("start", 1, *RECIPE, *long, *saving)
    alone = run_training("one process", 1, *RECIPE, *long, "--load", tmp_path)
    log = run_training("two stages", 2, *RECIPE, *long, *PP2, "--load", tmp_path)
    assert log.iterations == [3, 4, 5]
    _same_steps(log, alone)


@pytest.mark.gloo
@pytest.mark.slow
def test_the_loss_scale_of_fp16_changes_nothing() -> None:
    """Run it by `pytest -m slow tests/megatron/test_ultramem_recipe.py`."""
    flags = (*VARIANTS["ultramem"], "--fp16", *CORES, "--memory-balance-weight", 0.1)
    low, high = (run_training("fp16", 1, *flags, "--loss-scale", scale) for scale in (2**8, 2**12))
    assert low.losses == pytest.approx(high.losses, rel=1e-3)
    # later, rounding decides some lookups whose scores nearly tie
    assert low.grad_norms[:2] == pytest.approx(high.grad_norms[:2], rel=1e-2)
    without = run_training("fp16", 1, *VARIANTS["ultramem"], "--fp16", "--loss-scale", 2**8)
    assert low.grad_norms[0] > 1.2 * without.grad_norms[0]


@pytest.mark.gloo
@pytest.mark.slow
def test_microbatches_of_any_size_add_the_loss_of_the_cores_once() -> None:
    """Run it by `pytest -m slow tests/megatron/test_ultramem_recipe.py`."""
    one, four = (
        run_training("cores", 1, *VARIANTS["ultramem"], *CORES, "--micro-batch-size", size)
        for size in (4, 1)
    )
    _same_steps(one, four)
    without = run_training("without", 1, *VARIANTS["ultramem"], "--memory-core-aux-weight", 0)
    assert one.grad_norms[0] > 1.2 * without.grad_norms[0]


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("flags", [TP2, (*TP2, *SP)], ids=["tp", "tp, sequence parallel"])
def test_what_is_dropped_is_dropped_again_by_recomputation(flags: tuple) -> None:
    """Run it by `pytest -m slow tests/megatron/test_ultramem_recipe.py`."""
    flags = (*RECIPE, *flags)
    dropout = ("--memory-dropout", 0.3)
    kept, recomputed = (run_training("dropout", 2, *flags, *dropout, *how) for how in ((), FULL))
    _same_steps(recomputed, kept)
    assert kept.losses != pytest.approx(run_training("none", 2, *flags).losses, rel=1e-5)
