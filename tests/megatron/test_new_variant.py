"""A new variant takes a file and two lines; it trains sharded, is saved, planned and reported."""

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megamem.checkpoint import state_key, table_key
from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.layers.variants import table_names
from megamem.megatron.reports import sizes
from megamem.planner import make_plan
from megamem.planner.sizes import memory_layer_parameters, table_parameters
from megamem.resolution import resolve
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.distributed import run_distributed
from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.helpers.new_variant import register, registered
from tests.layers.test_memory import Case, _matches_one_process, _spec
from tests.megatron.test_resume import LONG, _ends_alike
from tests.megatron.test_tiny_training import MEMORY, SP, TP2, _same_steps
from tests.planner.jobs import job_of

SQUARED = {"memory_variant": "squared", "memory_value_dim": None}
FLAGS = (*MEMORY, *LONG, "--memory-variant", "squared")
MODULE = "tests.helpers.new_variant"


@pytest.fixture(autouse=True)
def variant() -> Iterator[None]:
    with registered():
        yield


def _cases_match() -> None:
    register()
    world = dist.get_world_size()
    for wire, sharded, buffer in product(("alltoall", "allgather"), (False, True), (False, True)):
        _matches_one_process(Case(_spec(**SQUARED, memory_wire=wire), sharded, buffer=buffer))
    _matches_one_process(Case(_spec(**SQUARED), True, True, column_ranks=world))


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_equal_one_process(world_size: int) -> None:
    run_distributed(_cases_match, world_size)


def test_it_is_planned() -> None:
    """The numbers are those of its modules and of its two tables."""
    spec = resolve(MemoryConfig(memory_layers=[0, 1], memory_pool="layer", **SQUARED), 64)
    assert table_names(spec) == ["layer_0", "layer_0.s", "layer_1", "layer_1.s"]
    pool = MemoryPool(spec, device="meta")
    layer = MemoryLayer(spec, pool, device="meta")
    assert memory_layer_parameters(spec) == sum(p.numel() for p in layer.parameters())
    assert table_parameters(spec) == 2 * sum(p.numel() for p in pool.tables.parameters())
    plain, squared = (job_of(memory_variant=v, world=8) for v in ("memory", "squared"))
    one, two = (make_plan(job).asked.bytes for job in (plain, squared))
    assert two.table == 2 * one.table and two.buffers > one.buffers
    assert "3 heads" not in sizes.summary(spec) and "2 tables (v, s) each" in sizes.summary(spec)


@pytest.fixture(scope="module")
def alone() -> TrainingLog:
    return run_training("one process", 1, *FLAGS, module=MODULE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingLog, Path]:
    """A run of two tensor-parallel ranks that saves checkpoints, with its folder."""
    folder = tmp_path_factory.mktemp("saved")
    saving = ("--save", folder, "--save-interval", 4, "--memory-metrics", "on")
    return run_training("tp sp", 2, *FLAGS, *TP2, *SP, *saving, module=MODULE), folder


@pytest.mark.gloo
def test_it_trains_sharded_and_is_reported(
    alone: TrainingLog, saved: tuple[TrainingLog, Path]
) -> None:
    log, folder = saved
    assert alone.losses[-1] < alone.losses[0] - 0.1
    assert "layers 0, 1 are squared: 2 heads x 4 rows, 2 shared tables (v, s)" in alone.stdout
    _same_steps(log, alone)
    assert log.stdout.count("memory: rows used") == 8
    found = saved_tensors(folder / "iter_0000004")
    for table in ("shared", "shared.s"):
        for key in (table_key(table), state_key(table, "exp_avg_sq")):
            assert found[key].shape == (81, 64) and found[key].any(1).sum() > 40
        assert found[state_key(table, "hits")].any()
    assert not torch.equal(found[table_key("shared")], found[table_key("shared.s")])


@pytest.mark.gloo
def test_it_resumes_under_another_layout(
    alone: TrainingLog, saved: tuple[TrainingLog, Path]
) -> None:
    columns = ("--memory-mode", "column", "--memory-group-size", 2)
    log = run_training(
        "resume", 2, *FLAGS, *columns, "--load", saved[1], "--ckpt-step", 4, module=MODULE
    )
    assert log.iterations == [5, 6, 7, 8]
    _ends_alike(log, alone)


@pytest.mark.gloo
def test_its_checkpoint_is_no_other_variants(saved: tuple[TrainingLog, Path]) -> None:
    plain = ("--memory-variant", "memory", "--load", saved[1])
    log = run_training("other", 1, *MEMORY, *LONG, *plain, module=MODULE, check=False)
    assert log.returncode == 2
    assert re.search(r"--memory-variant memory differs from \w+ in --load", log.stdout)
