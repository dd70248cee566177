"""Every flag set of examples/cluster: planned, compared with the paper, built without memory."""

import json
import re
import subprocess
import sys

import pytest

from megamem.__main__ import parse
from megamem.planner import Plan, make_plan
from megamem.planner.cost import layout_cost
from megamem.planner.plan import fits
from megamem.planner.sizes import dense_parts
from megamem.tools.plan import job_from_args
from tests.examples.cluster_scripts import SIZES, Started, fewest, on, stand_ins
from tests.helpers.megatron_runs import ROOT

ROWS = {"1m": 2**20, "4m": 2**22, "16m": 2**24, "64m": 2**26}
# millions of parameters, as the paper's tables have them
PUBLISHED = {
    ("134m", "dense"): 134.1,
    ("134m", "1m"): 937.1,
    ("373m", "dense"): 373.9,
    ("1.3b", "dense"): 1261.5,
    ("1.3b", "4m"): 9823.2,
    ("1.3b", "16m"): 35618.1,
    ("1.3b", "64m"): 138747.7,
}
SETS = [(model, rows) for model, sizes in SIZES.items() for rows in ["dense", *sizes]]
WITH_MEMORY = [(model, rows) for model, rows in SETS if rows != "dense"]
PASSED_ON = ("CUDA_DEVICE_MAX_CONNECTIONS",)


@pytest.fixture
def cluster(tmp_path):
    return stand_ins(tmp_path)


def plan_of(started: Started, world: int) -> Plan:
    return make_plan(job_from_args(parse("plan", ["--world-size", str(world), *started.flags])))


@pytest.mark.parametrize(("model", "rows"), WITH_MEMORY)
def test_planner_agrees_that_the_table_fits(cluster, model, rows):
    """It does as asked for on as many GPUs as the model's file says, and on half of them not."""
    for lean in (False, True):
        least = fewest(model, rows, lean)
        started = cluster("torchrun.sh", model, rows, LEAN=int(lean), **on(least))
        plan = plan_of(started, least)
        assert fits(plan.job, plan.asked), plan.asked.bytes.total
        assert plan.job.spec.num_rows == ROWS[rows]
        assert plan.job.state.total == (10 if lean else 18)
        # nor would half of them do
        half = least // 2
        if half >= plan.job.cluster.tensor_model_parallel_size:
            fewer = ["--world-size", half, *started.flags, "--memory-group-size", half]
            job = job_from_args(parse("plan", [str(word) for word in fewer]))
            assert not fits(job, layout_cost(job, job.spec.layout))


@pytest.mark.parametrize(("model", "rows"), SETS)
def test_planned_parameters_are_the_published_ones(cluster, model, rows):
    started = cluster("torchrun.sh", model, rows, **on(fewest(model, rows)))
    if rows == "dense":
        shape = job_from_args(parse("plan", started.flags)).shape
        parts = dense_parts(shape)
        total = shape.num_layers * (parts.layer + parts.ffn) + parts.final_norm
        total += parts.embeddings + parts.output
    else:
        total = plan_of(started, fewest(model, rows)).parameters["total"]
    assert total / 1e6 == pytest.approx(PUBLISHED.get((model, rows), total / 1e6), abs=0.05)


def test_plain_memory_is_two_flags_away(cluster):
    readme = (ROOT / "examples/README.md").read_text()
    model, rows, *flags = re.search(r"`(1\.3b 1m --memory-variant .*?)`", readme)[1].split()
    started = cluster("torchrun.sh", model, rows, *flags, GPUS=8)
    assert plan_of(started, 8).parameters["total"] / 1e6 == pytest.approx(3377.6, abs=0.05)


def test_table_in_the_readme_is_that_of_the_files(cluster):
    readme = (ROOT / "examples/README.md").read_text()
    for model, sizes in SIZES.items():
        row = re.search(rf"^\| `{model}` \|(.*)\|$", readme, re.MULTILINE)[1]
        *counts, least, lean = [cell.strip() for cell in row.split("|")]
        assert least == " / ".join(str(fewest(model, rows)) for rows in sizes)
        assert lean == " / ".join(str(fewest(model, rows, lean=True)) for rows in sizes)
        for rows, cell in zip(["1m", "4m", "16m", "64m"], counts[1:], strict=True):
            assert bool(cell) is (rows in sizes)
            if cell:
                started = cluster("torchrun.sh", model, rows, **on(fewest(model, rows)))
                total = plan_of(started, fewest(model, rows)).parameters["total"] / 1e9
                assert total == pytest.approx(float(cell), abs=0.06 if total > 10 else 0.006)


def test_recipe_is_the_papers(cluster):
    started = cluster("torchrun.sh", "1.3b", "1m", GPUS=8)
    recipe = {
        "--lr": 1e-4,
        "--memory-lr": 1e-3,
        "--min-lr": 1e-6,
        "--lr-warmup-iters": 4000,
        "--train-iters": 128000,
        "--clip-grad": 1.0,
        "--memory-clip-grad": 1.0,
        "--adam-beta1": 0.9,
        "--adam-beta2": 0.95,
        "--adam-eps": 1e-8,
        "--weight-decay": 0.1,
        "--memory-weight-decay": 0.1,
        "--memory-heads": 4,
        "--memory-topk": 32,
    }
    assert {flag: float(started.value(flag)) for flag in recipe} == recipe
    assert started.value("--lr-decay-style") == "linear"
    # a trillion tokens
    tokens = 128000 * int(started.value("--global-batch-size")) * int(started.value("--seq-length"))
    assert 1.0e12 < tokens < 1.1e12
    layers = started.words[started.words.index("--memory-layers") + 1 :][:4]
    assert layers == ["3", "11", "19", "--memory-num-keys"]
    assert started.value("--memory-optimizer") == "adamw"


def test_every_flag_set_builds_on_the_meta_device(cluster):
    """Megatron's parser, its checks and ours, and rank 0 of the model at its full size."""
    jobs, expected = [], {}
    for model, rows in SETS:
        for lean in (False, True) if rows == "64m" else (False,):
            least = fewest(model, rows, lean)
            started = cluster("torchrun.sh", model, rows, LEAN=int(lean), **on(least))
            name = f"{model}-{rows}{'-lean' if lean else ''}"
            environment = {name: started.environment[name] for name in PASSED_ON}
            jobs.append([name, least, environment, started.flags])
            expected[name] = plan_of(started, least) if rows != "dense" else None
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.examples.dry_build"],
        input=json.dumps(jobs),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    built = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [job["name"] for job in built] == list(expected)
    for job in built:
        model, rows, *_ = job["name"].split("-")
        plan = expected[job["name"]]
        if plan is None:
            assert not job["tables"] and set(job["layers"]) == {"MLP"}
            if fewest(model, rows) == 1:
                assert job["parameters"] / 1e6 == pytest.approx(
                    PUBLISHED.get((model, rows), job["parameters"] / 1e6), abs=0.05
                )
            continue
        places = [n for n, kind in enumerate(job["layers"]) if kind == "MemoryMLP"]
        assert places == list(plan.job.spec.layers)
        (shape,) = job["tables"].values()
        layout, spec = plan.asked.layout, plan.job.spec
        assert shape == [
            spec.num_rows // layout.row_ranks,
            spec.value_dim // layout.column_ranks,
        ]
        # what the rank holds beside its piece of the table
        if plan.job.cluster.tensor_model_parallel_size == 1:
            beside = plan.parameters["total"] - plan.parameters["value table"]
            assert job["parameters"] - shape[0] * shape[1] == beside
