"""What Megatron does with all parameters of a model, where tables differ between data ranks."""

import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megamem.checkpoint import TABLES
from megamem.config import MemoryConfig
from megamem.layers.memory_pool import MemoryPool
from megamem.megatron.model.hidden_tables import (
    compares_replicas,
    sum_of_squares,
    without_tables,
)
from megamem.parallel.memory_group import form, partition
from megamem.resolution import resolve
from megamem.spec import Grid
from tests.helpers.distributed import run_distributed
from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_tiny_training import DO, MEMORY, PP2, TP2, WIDE

SHOWN = ("--log-params-norm", "--log-num-zeros-in-grad")
ONE = {"memory_layers": [0], "memory_num_keys": 3, "memory_topk": 2}
RANDOM, EQUAL = "--data-parallel-random-init", "--check-weight-hash-across-dp-replicas-interval"


def _norms(log: TrainingLog) -> list[float]:
    return [float(norm) for norm in re.findall(r"params norm: (\S+)", log.stdout)]


def _zeros(log: TrainingLog) -> list[float]:
    return [float(zeros) for zeros in re.findall(r"num zeros: (\S+)", log.stdout)]


@pytest.fixture(scope="module")
def alone() -> TrainingLog:
    return run_training("one process", 1, *MEMORY, *SHOWN)


@pytest.mark.gloo
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(WIDE, id="rows over dp", marks=pytest.mark.slow),
        pytest.param((*WIDE, *DO, RANDOM, EQUAL, 2), id="rows over dp, random initialization"),
        pytest.param((*TP2, "--memory-group-size", 1, EQUAL, 2), id="replicas inside tp"),
    ],
)
def test_norms_and_zeros_are_those_of_one_process(alone: TrainingLog, flags: tuple) -> None:
    """All of it: pytest -m "slow or not slow" tests/megatron/test_wide_groups.py."""
    log = run_training("two ranks", 2, *MEMORY, *SHOWN, *flags)
    assert log.losses == pytest.approx(alone.losses, rel=2e-6)
    # Megatron prints three digits after the point
    assert _norms(log) == pytest.approx(_norms(alone), abs=1.1e-3) and len(_norms(log)) == 5
    assert _zeros(log) == _zeros(alone) and len(_zeros(log)) == 5


@pytest.mark.gloo
def test_a_pool_of_two_stages_is_counted_once(alone: TrainingLog) -> None:
    """One process, with as many memory layers, has other weights, but as large ones."""
    layers = ("--memory-layers", 0, 3)
    staged = run_training("two stages", 2, *MEMORY, *layers, *SHOWN, *PP2)
    assert _norms(staged) == pytest.approx(_norms(alone), rel=2e-3)


def _model(replicas: bool) -> tuple[nn.Module, MemoryPool]:
    """A model with a table of 5 rows on each of two ranks, or of 9 on both of them."""
    ranks = [[0, 1]]
    group = form(partition(ranks, Grid(local_rows=1 if replicas else 2)))
    layout = {"memory_group_size": 1 if replicas else 2}
    spec = resolve(
        MemoryConfig(**ONE, **layout),
        16,
        stage_ranks=2,
    )
    pool = MemoryPool(spec, group=group)
    for table in pool:
        table.leave_to_optimizer()
    model = nn.Module()
    model.first = nn.Linear(2, 2)
    model.add_module(TABLES, pool.tables)
    model.last = nn.Linear(2, 2)
    return model, pool


def _replicas_that_differ() -> None:
    model, pool = _model(replicas=True)
    seen: list[list[str]] = []

    def of_megatron(chunks: list[nn.Module], cross_check: bool = False) -> bool:
        seen.append([name for chunk in chunks for name, _ in chunk.named_parameters()])
        return True

    check, names = compares_replicas(of_megatron), [name for name, _ in model.named_parameters()]
    assert check([model], cross_check=True)
    assert seen == [[name for name in names if TABLES not in name]] and len(names) == 5
    # the order of parameters is what it was
    assert [name for name, _ in model.named_parameters()] == names
    if dist.get_rank() == 1:
        pool.values.weight[8, 3] += 1e-6
    assert not check([model], cross_check=True)


@pytest.mark.gloo
def test_replicas_that_differ_are_found() -> None:
    """`--check-weight-hash-across-dp-replicas-interval`; Megatron ends the run if it is False."""
    run_distributed(_replicas_that_differ, 2)


def _shards_stay_apart() -> None:
    model, pool = _model(replicas=False)
    before = pool.values.weight.clone()

    def broadcast_params(self: nn.Module) -> None:
        for parameter in self.parameters():
            dist.broadcast(parameter.data, src=0)

    without_tables(broadcast_params)(model)
    assert torch.equal(pool.values.weight, before)
    with mock.patch.object(torch.cuda, "current_device", lambda: "cpu"):
        squares = sum_of_squares(pool)
    dist.all_reduce(squares)
    whole = MemoryPool(resolve(MemoryConfig(**ONE), 16)).values.weight.detach()
    assert float(squares) == pytest.approx(float(whole.double().square().sum()), rel=1e-6)


@pytest.mark.gloo
def test_a_broadcast_leaves_shards_as_they_are() -> None:
    run_distributed(_shards_stay_apart, 2)
