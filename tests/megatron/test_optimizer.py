"""Learning rate and weight decay of the tables under Megatron's scheduler; their gradients."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig
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
