"""Learning rate and weight decay of the tables under Megatron's scheduler; their gradients."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import training
from torch import nn

from megamem.checkpoint import TABLES
from megamem.config import MemoryConfig
from megamem.megatron.model.carried_spec import carry_spec
from megamem.megatron.optimizer import with_memory
from megamem.megatron.optimizer.with_memory import table_group
from megamem.resolution import resolve
from tests.helpers.megatron_runs import run_training
from tests.helpers.pools import pool_of

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


ULTRAMEM: dict[str, Any] = {"memory_variant": "ultramem", "memory_num_keys": 64}


def _scheduler(group: dict, monkeypatch: pytest.MonkeyPatch, **length: int) -> Any:
    """Megatron's scheduler of a run of this length, in iterations of four samples or in samples."""
    unset = ("lr_wsd_decay_iters", "lr_wsd_decay_samples")
    args = SimpleNamespace(
        **{"train_iters": None, "train_samples": None, **length},
        **dict.fromkeys((*unset, "lr_warmup_fraction", "rampup_batch_size")),
        # the model's rate decays over three quarters of the run
        **{"lr_decay_iters": 6, "lr_decay_samples": 24},
        **{"lr_warmup_iters": 0, "lr_warmup_samples": 0, "lr_warmup_init": 0.0},
        **{"lr": 1e-3, "min_lr": 1e-4, "lr_decay_style": "cosine", "global_batch_size": 4},
        **{"start_weight_decay": 0.1, "end_weight_decay": 0.1},
        **{"weight_decay_incr_style": "constant", "lr_wsd_decay_style": "linear"},
        **{"use_checkpoint_opt_param_scheduler": False, "override_opt_param_scheduler": False},
    )
    monkeypatch.setattr(training, "get_args", lambda: args)
    monkeypatch.setattr(training, "update_train_iters", lambda args: None)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.0}], lr=0.0)
    optimizer.param_groups[0] |= group
    return training.get_optimizer_param_scheduler(optimizer)


def _rates_by_step(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], **length: int
) -> list[float]:
    """The rate of the tables in each of 8 steps, and the one after the last."""
    group = table_group(ARGS, resolve(MemoryConfig(**ULTRAMEM, **config), 16))
    scheduler = _scheduler(group, monkeypatch, **length)
    (own,) = scheduler.optimizer.param_groups
    rates = [own["lr"]]
    for _ in range(8):
        scheduler.step(4)
        rates.append(own["lr"])
    return rates


@pytest.mark.parametrize("length", [{"train_iters": 8}, {"train_samples": 32}], ids=str)
@pytest.mark.parametrize(
    ("times", "until", "factors"),
    [
        # 4 and 1 are those of the released code's scripts, 10 that of the paper
        (4, 1.0, [1 + 3 * (1 - step / 8) for step in range(9)]),
        (10, 1.0, [10, 8.875, 7.75, 6.625, 5.5, 4.375, 3.25, 2.125, 1]),
        (10, 0.5, [10, 7.75, 5.5, 3.25, 1, 1, 1, 1, 1]),
        (10, 0.0, [1] * 9),
        (None, 1.0, [10, 8.875, 7.75, 6.625, 5.5, 4.375, 3.25, 2.125, 1]),
    ],
)
def test_the_tables_rate_is_a_multiple_that_decays_to_the_models(
    times: float | None,
    until: float,
    factors: list[float],
    length: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = {"memory_lr_times": times, "memory_lr_times_until": until}
    rates = _rates_by_step(monkeypatch, more, **length)
    model = _rates_by_step(monkeypatch, {"memory_lr_times": 1}, **length)
    assert model[0] == 1e-3 and model[-1] == pytest.approx(1e-4)
    assert rates == pytest.approx([rate * f for rate, f in zip(model, factors, strict=True)])


@pytest.mark.parametrize("rows", [None, 3], ids=["all rows", "--memory-finetune-rows"])
def test_a_constant_rate_of_the_tables_is_multiplied_as_well(
    rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"memory_lr": 5e-3, "memory_lr_schedule": "constant", "memory_lr_times": 3}
    own |= {"memory_finetune_rows": rows, "memory_optimizer": "sgd"}
    rates = _rates_by_step(monkeypatch, own, train_iters=8)
    assert rates == pytest.approx([5e-3 * (3 - step / 4) for step in range(9)])


def test_a_resumed_scheduler_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    group = table_group(ARGS, resolve(MemoryConfig(**ULTRAMEM), 16))
    whole = _scheduler(group, monkeypatch, train_iters=8)
    for _ in range(3):
        whole.step(4)
    resumed = _scheduler(group, monkeypatch, train_iters=8)
    resumed.load_state_dict(whole.state_dict())
    (first,), (second,) = (each.optimizer.param_groups for each in (whole, resumed))
    assert first["lr"] == second["lr"] > 3e-3


def test_groups_of_the_model_keep_their_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    table_group(ARGS, resolve(MemoryConfig(**ULTRAMEM), 16))
    scheduler = _scheduler({}, monkeypatch, train_iters=8)
    assert scheduler.optimizer.param_groups[0]["lr"] == 1e-3


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


class Chunk(nn.Module):
    """What with_memory() needs of a model in bf16 in Megatron's DistributedDataParallel."""

    def __init__(self, reduces_in_fp32: bool) -> None:
        super().__init__()
        spec = resolve(MemoryConfig(memory_layers=[0], memory_num_keys=4, memory_topk=2), 16)
        self.add_module(TABLES, pool_of(spec, torch.bfloat16).tables)
        self.config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
        carry_spec(self.config, spec)
        self.ddp_config = SimpleNamespace(grad_reduce_in_fp32=reduces_in_fp32)

    def scale_gradients(self, factor: float) -> None:
        """Of the model."""


@pytest.mark.parametrize(
    ("in_fp32", "dtype"),
    [(True, torch.float32), (False, torch.bfloat16)],
    ids=["by default", "--grad-reduce-in-bf16"],
)
def test_the_gradient_of_a_table_has_the_dtype_that_megatron_reduces_in(
    in_fp32: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "get_data_parallel_world_size"
    monkeypatch.setattr(parallel_state, name, lambda **options: 1)
    # both are of ranks, which there are none of
    for part in ("TableMember", "ChainWithTables"):
        monkeypatch.setattr(with_memory, part, lambda tables, *rest, **more: tables)
    chunk: Any = Chunk(in_fp32)
    config = OptimizerConfig(lr=1e-3, params_dtype=torch.bfloat16)
    model: Any = SimpleNamespace(get_loss_scale=None)
    with_memory.with_memory(model, config, [chunk])
    (table,) = with_memory.find_tables([chunk]).values()
    assert table.gradient is not None and table.gradient.buffer.dtype == dtype
