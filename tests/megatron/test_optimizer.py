"""Learning rate and weight decay of the tables under Megatron's scheduler."""

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megamem.config import MemoryConfig
from megamem.megatron.optimizer.with_memory import table_group
from megamem.resolution import resolve
from tests.helpers.megatron_runs import run_training

ARGS = OptimizerConfig(lr=1e-3, min_lr=1e-4)


def _rates(config: MemoryConfig, style: str) -> list[tuple[float, float]]:
    """(learning rate, weight decay) of the tables after warm-up, half-way and at the end."""
    weight = torch.nn.Parameter(torch.zeros(1))
    group: dict = {"params": [weight], **table_group(ARGS, resolve(config, 16))}
    scheduler = OptimizerParamScheduler(
        torch.optim.SGD([weight], lr=1.0),
        init_lr=0.0,
        max_lr=ARGS.lr,
        min_lr=ARGS.min_lr,
        lr_warmup_steps=10,
        lr_decay_steps=110,
        lr_decay_style=style,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=110,
        wd_incr_style="constant",
        wsd_decay_steps=50,
        lr_wsd_decay_style="linear",
    )
    found = []
    for steps in (10, 60, 110):
        scheduler.num_steps = steps
        found.append((scheduler.get_lr(group), scheduler.get_wd(group) * group.get("wd_mult", 1)))
    return found


@pytest.mark.parametrize("style", ["linear", "cosine", "WSD", "constant", "inverse-square-root"])
def test_a_constant_rate_never_falls(style: str) -> None:
    config = MemoryConfig(memory_lr=5e-3, memory_lr_schedule="constant")
    assert [rate for rate, _ in _rates(config, style)] == pytest.approx([5e-3] * 3)


@pytest.mark.parametrize("style", ["linear", "cosine", "WSD"])
def test_a_scheduled_rate_is_the_models_times_a_factor(style: str) -> None:
    table = _rates(MemoryConfig(memory_lr=5e-3), style)
    model = _rates(MemoryConfig(), style)
    assert [rate for rate, _ in table] == pytest.approx([5 * rate for rate, _ in model])


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_weight_decay_is_the_tables_own(decay: float) -> None:
    rates = _rates(MemoryConfig(memory_weight_decay=decay), "linear")
    assert [found for _, found in rates] == [decay] * 3


def test_without_settings_the_table_follows_the_model() -> None:
    group = table_group(ARGS, resolve(MemoryConfig(), 16))
    assert not {"max_lr", "min_lr", "start_wd", "end_wd"} & group.keys()


FP16 = ("--memory-layers", 1, "--memory-num-keys", 16, "--memory-topk", 4, "--fp16")


@pytest.mark.gloo
def test_that_a_loss_scale_is_too_large_is_logged_once_on_one_rank() -> None:
    """Every run in fp16 skips batches until the scale that it starts with is low enough."""
    log = run_training("fp16", 2, *FP16, "--tensor-model-parallel-size", 2)
    assert sum(log.skipped) > 2
    (said,) = [line for line in log.stdout.splitlines() if "not finite" in line]
    assert "at a loss scale of 4.29497e+09" in said and "logged once" in said


@pytest.mark.gloo
def test_a_gradient_that_no_loss_scale_mends_is_named_each_time() -> None:
    lowest = ("--initial-loss-scale", 1, "--min-loss-scale", 1)
    log = run_training(
        "fp16 with a nan",
        2,
        *(*FP16, *lowest, "--tensor-model-parallel-size", 2),
        module="tests.helpers.faulty",
        environment={"FAULT": "nan 1 3"},
    )
    assert log.skipped == [0, 0, 1, 0, 0]
    assert log.stdout.count("rank 1: the gradient of value table shared is not finite") == 1
