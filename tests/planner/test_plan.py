"""Plans for clusters, and jobs that the planner refuses."""

import time
from dataclasses import replace

import pytest
import torch

from megamem.config import ConfigurationError
from megamem.planner import (
    Cluster,
    gpus_needed,
    group_sizes,
    make_plan,
)
from megamem.planner.hardware import HARDWARE
from megamem.planner.plan import Plan, gpus_for_bytes
from megamem.spec import Layout
from tests.planner.jobs import job_of


def test_the_published_128b_table() -> None:
    """18 bytes for each of 137.4 billion parameters are 2.5 TB, which 51 H100s cannot hold."""
    job = job_of(num_keys=8192, world=128)
    plan = make_plan(job)
    assert plan.parameters["value table"] == 137_438_953_472
    state = 18 * plan.parameters["value table"]
    for gpu, fewest in plan.gpus_needed["adamw"].items():
        alone = gpus_for_bytes(state, 0.6 * HARDWARE[gpu].memory)
        # model, optimizer and lookup buffers need memory, too, and only complete nodes are used
        assert alone < fewest <= 1.5 * alone and fewest % 8 == 0, gpu
    assert plan.recommended is not None
    assert plan.recommended.bytes.total <= job.room
    assert plan.recommended.layout.group_size == 128


def test_gpus_needed_is_the_fewest() -> None:
    job = job_of(num_keys=4096, world=8, gpu="h200")
    fewest = gpus_needed(job)
    assert fewest is not None and fewest > 8

    def plan_on(world: int) -> Plan:
        return make_plan(replace(job, cluster=replace(job.cluster, world_size=world)))

    assert plan_on(fewest).recommended is not None
    assert plan_on(fewest - 8).recommended is None


def test_4096_ranks() -> None:
    started = time.monotonic()
    job = job_of(num_keys=8192, world=4096, cluster={"tensor_model_parallel_size": 8})
    plan = make_plan(job)
    assert time.monotonic() - started < 5
    sizes = {cost.layout.group_size for cost in plan.costs}
    assert sizes == {2**n for n in range(13)}
    for cost in plan.costs:
        assert cost.replicas * cost.layout.group_size == 4096
        assert cost.layout.row_ranks * cost.layout.column_ranks == cost.layout.group_size
    fitting = [c for c in plan.costs if c.bytes.total <= job.room]
    assert fitting and len(fitting) < len(plan.costs)
    assert plan.recommended is not None
    assert plan.recommended.seconds["h100"].table == min(c.seconds["h100"].table for c in fitting)


def test_a_small_table_stays_where_it_is_read() -> None:
    """On one node 1M rows fit in every layout; column mode is faster than replicas or row mode."""
    plan = make_plan(job_of(num_keys=1024, world=8))
    assert plan.recommended is not None
    assert plan.recommended.layout == Layout("column", 8, 8)
    assert "no replicas" in plan.why


def test_asked_layout() -> None:
    def asked(world: int = 64, tp: int = 4, **settings) -> Layout:
        job = job_of(world=world, cluster={"tensor_model_parallel_size": tp}, **settings)
        return make_plan(job).asked.layout

    assert asked() == Layout("row", 4, 1)
    assert asked(memory_mode="column", memory_group_size=16) == Layout("column", 16, 16, 1, 2)
    assert asked(memory_mode="2d", memory_group_size=16) == Layout("2d", 16, 4, 2)
    wide = {"memory_mode": "2d", "memory_group_size": 64, "memory_column_ranks": 8}
    assert asked(**wide) == Layout("2d", 64, 8, 8)
    assert asked(memory_mode="auto", memory_group_size=8) == Layout("column", 8, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_group_size": 12}, "--memory-group-size 12 does not divide .* use one of 1, 2, 4"),
        (
            {"memory_group_size": 16, "memory_mode": "2d", "memory_column_ranks": 3},
            "--memory-column-ranks 3 does not divide --memory-group-size 16; use one of 1, 2, 4",
        ),
        (
            {"memory_group_size": 64, "memory_mode": "column", "memory_value_dim": 264},
            "use --memory-mode 2d with --memory-column-ranks 32 or fewer",
        ),
        ({"memory_layers": [3, 30]}, "--memory-layers 30 is beyond --num-layers 22"),
        ({"memory_layers": []}, "name them with --memory-layers"),
    ],
)
def test_impossible_jobs(settings: dict, message: str) -> None:
    settings = {"cluster": {"tensor_model_parallel_size": 4}} | settings
    with pytest.raises(ConfigurationError, match=message):
        make_plan(job_of(**settings))


def test_what_is_missing_is_said_with_what_would_fit() -> None:
    job = job_of(num_keys=8192, world=8)
    plan = make_plan(job)
    assert plan.recommended is None and plan.why.startswith("No layout fits: 8 x H100")
    assert plan.shown.bytes.total == min(cost.bytes.total for cost in plan.costs) > job.room
    assert f"--world-size {gpus_needed(job)}" in plan.why
    assert "--memory-optimizer" not in plan.why
    # 64 GPUs are nearly enough: without one of the moments the table fits
    job = job_of(num_keys=8192, world=64)
    assert "or --memory-optimizer rowwise_adamw" in make_plan(job).why
    assert make_plan(job.with_optimizer("rowwise_adamw")).recommended is not None


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"world_size": 12, "tensor_model_parallel_size": 8}, "12 is not a multiple of 8.*use 8"),
        ({"world_size": 0}, "--world-size 0 must be at least 1"),
        (
            {"world_size": 8, "expert_model_parallel_size": 16},
            "--world-size 8 is not a multiple of 16, which --expert-model-parallel-size 16 x",
        ),
        (
            {"world_size": 8, "micro_batch_size": 2, "global_batch_size": 40},
            "--global-batch-size 40 is not a multiple .* use 48",
        ),
    ],
)
def test_impossible_clusters(cluster: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Cluster(**cluster)


def test_group_sizes_divide_a_stage() -> None:
    cluster = Cluster(
        world_size=96,
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=2,
        context_parallel_size=2,
    )
    assert group_sizes(cluster) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]


def test_no_rank_is_needed() -> None:
    make_plan(job_of())
    assert not torch.distributed.is_initialized()
