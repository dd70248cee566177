"""Estimated times of stages, compared with what an H100 took: within 25 % each, and in total."""

import json
from pathlib import Path

import pytest

from megamem.ops.forms import FORMS
from megamem.planner.cost import layout_cost
from megamem.planner.hardware import HARDWARE
from megamem.planner.sizes import memory_flops_per_token, score_flops_per_token
from megamem.planner.stages import (
    NORM,
    RATES,
    ROW_GRADIENT,
    ROWS,
    SORT,
    TOPK,
    TOPK_BACK,
    TOPK_TORCH,
    UPDATE,
    Stage,
    Work,
    backward_bytes,
)
from megamem.planner.states import table_state
from megamem.spec import Layout
from tests.planner.jobs import LOOKUPS, TOKENS, job_of

RESULTS = Path(__file__).parents[1] / "bench" / "results"
STAGES = json.loads((RESULTS / "h100-a4677c2-stages.json").read_text())
BENCH = [json.loads(line) for line in (RESULTS / "h100-a4677c2.jsonl").read_text().splitlines()]
H100, NEAR = HARDWARE["h100"], 0.25
ALONE = Layout("row", 1, 1)


def _measured(stage: str) -> float:
    """Milliseconds of a row of the record of stages."""
    (row,) = (row for row in STAGES["rows"] if row["stage"] == stage)
    return row["ms"]


def _form(op: str, form: str, num_keys: int) -> float:
    """Milliseconds of one form of an op."""
    (row,) = (
        row
        for row in STAGES["forms"]
        if (row["op"], row["form"], row["shape"].get("N")) == (op, form, num_keys)
    )
    return row["ms"]


def _estimated(**settings) -> dict[str, Stage]:
    """The stages of one layer of the 1.3B base model with a million rows, on one GPU."""
    job = job_of(world=1, memory_layers=[3], **settings)
    return {stage.name: stage for stage in layout_cost(job, ALONE).seconds["h100"].stages}


def _ms(stage: Stage) -> float:
    return stage.seconds * 1e3


@pytest.mark.parametrize(
    ("stage", "measured"),
    [
        (TOPK_BACK, "product_topk, backward"),
        (ROWS, "embedding_bag, forward"),
        (ROW_GRADIENT, "embedding_bag, backward: row gradient, added in fp32"),
        (SORT, "embedding_bag, backward: sort of the lookups"),
        (NORM, "step: gradient norm of 2.1 G numbers"),
        (UPDATE, "step: AdamW of 2.1 G numbers, fp32"),
    ],
)
def test_stages_take_what_they_took(stage: str, measured: str) -> None:
    assert _ms(_estimated()[stage]) == pytest.approx(_measured(measured), rel=NEAR)


@pytest.mark.parametrize("num_keys", [128, 1024, 4096, 16384])
@pytest.mark.parametrize(("stage", "form"), [(TOPK, "two_looks"), (TOPK_TORCH, "torch")])
def test_top_k_takes_what_it_took_at_every_size(num_keys: int, stage: str, form: str) -> None:
    # the sub-keys of the record are half as wide as those of the model
    settings = {"memory_key_dim": 512}
    found = _estimated(num_keys=num_keys, **settings)
    assert TOPK in found and TOPK_TORCH not in found
    if stage == TOPK_TORCH:
        found = _estimated(num_keys=num_keys, cluster={"half_precision": False}, **settings)
    assert _ms(found[stage]) == pytest.approx(_form("product_topk", form, num_keys), rel=NEAR)


def test_the_backward_of_narrow_sub_keys_takes_what_it_took() -> None:
    (forward,), (both,) = _bench("product_topk forward"), _bench("product_topk forward + backward")
    found = _estimated(num_keys=forward["shape"]["N"], memory_key_dim=2 * forward["shape"]["C"])
    assert _ms(found[TOPK_BACK]) == pytest.approx(both["ms"] - forward["ms"], rel=NEAR)


def _bench(op: str, **shape: int) -> list[dict]:
    rows = [row for row in BENCH if row["op"] == op]
    return [row for row in rows if shape.items() <= row["shape"].items()]


@pytest.mark.parametrize("width", [256, 1024, 2048, 4096])
def test_rows_of_every_width_take_what_they_took(width: int) -> None:
    found = _estimated(memory_value_dim=width)
    uniform = {"R": 2**20, "V": width}
    (bags,) = [r for r in _bench("embedding_bag forward", **uniform) if _uniform(r)]
    (back,) = [r for r in _bench("embedding_bag backward += fp32", **uniform) if _uniform(r)]
    assert _ms(found[ROWS]) == pytest.approx(bags["ms"], rel=NEAR)
    # the benchmark's backward sorts, too
    assert _ms(found[ROW_GRADIENT]) + _ms(found[SORT]) == pytest.approx(back["ms"], rel=NEAR)


def _uniform(row: dict) -> bool:
    return row["distribution"] == "uniform"


@pytest.mark.parametrize("width", [1024, 2048, 4096])
def test_frequent_rows_take_what_they_took(width: int) -> None:
    """The rate also holds where a fifth of the rows are touched; plans assume uniform reads."""
    rows = _bench("embedding_bag backward += fp32", R=2**20, V=width)
    (zipf,) = [row for row in rows if not _uniform(row)]
    # the benchmark counts a row, its gradient read and written, and a little for bags and indices
    touched = zipf["bytes"] / (10 * width)
    moved = backward_bytes(touched, width, table_state("adamw"))
    work = Work(moved=moved, cached=TOKENS * LOOKUPS * width * 2)
    seconds = RATES[ROW_GRADIENT].seconds(work, H100)
    seconds += RATES[SORT].seconds(Work(lookups=TOKENS * LOOKUPS, launches=1), H100)
    assert seconds * 1e3 == pytest.approx(zipf["ms"], rel=NEAR)


def test_one_rank_of_eight_takes_what_it_took() -> None:
    """8.4 million lookups arrive, of which a million are the rank's own; the same H100."""
    job = job_of(world=8)
    found = {s.name: s for s in layout_cost(job, Layout("row", 8, 1)).seconds["h100"].stages}
    for stage, ms in {ROWS: 1.48, SORT: 0.74, ROW_GRADIENT: 3.14}.items():
        assert _ms(found[stage]) == pytest.approx(ms, rel=NEAR), stage


def test_updates_take_what_they_took() -> None:
    """AdamW in fp32 with all gradients; and with a moment per row, for which blocks were chosen."""
    (fp32,) = [row for row in BENCH if row["op"] == "adamw_ fp32"]
    (chosen,) = STAGES["choices"]
    (row_moment,) = [row for row in BENCH if row["op"] == "adamw_ bf16, moment per row"]
    for moved, ms in ((fp32["bytes"], fp32["ms"]), (row_moment["bytes"], chosen["ms"])):
        assert RATES[UPDATE].seconds(Work(moved=moved), H100) * 1e3 == pytest.approx(ms, rel=NEAR)


def _in_layer(stages: dict[str, Stage], *phases: str) -> float:
    return sum(_ms(stage) for stage in stages.values() if stage.phase in phases)


# two_looks replaced the top-k of the day, with its pairs, after the layer had been measured
TOPK_THEN, TOPK_NOW = 1.86 + 0.25, 0.57


def test_a_layer_takes_what_it_took() -> None:
    job, found = job_of(world=1), _estimated()
    flops = memory_flops_per_token(job.spec) - score_flops_per_token(job.spec)
    matrices = TOKENS * flops / H100.flops * 1e3
    layer = _in_layer(found, "forward", "backward") + matrices
    measured = _measured("layer, forward + backward") - TOPK_THEN + TOPK_NOW
    assert layer == pytest.approx(measured, rel=NEAR)
    forward = _in_layer(found, "forward") + matrices / 3
    measured = _measured("layer, forward") - TOPK_THEN + TOPK_NOW
    assert forward == pytest.approx(measured, rel=NEAR)


def test_a_step_takes_what_it_took() -> None:
    """Three layers and two microbatches, norm and update; the plan once said 57 ms."""
    job = job_of(world=1, cluster={"global_batch_size": 8})
    step = layout_cost(job, ALONE).seconds["h100"]
    assert {stage.calls for stage in step.stages} == {1, 6}
    layer = _measured("layer, forward + backward") - TOPK_THEN + TOPK_NOW
    flops = memory_flops_per_token(job.spec) - score_flops_per_token(job.spec)
    matrices = TOKENS * flops / H100.flops * 1e3
    once = _measured("step: gradient norm of 2.1 G numbers")
    once += _measured("step: AdamW of 2.1 G numbers, fp32")
    assert step.table * 1e3 == pytest.approx(6 * (layer - matrices) + once, rel=NEAR)
    assert step.table * 1e3 == pytest.approx(95, rel=NEAR)
    # Megatron's step with three memory layers in place of feed-forwards, which took 2.5 ms each
    added = _measured("Megatron step, the same with 3 memory layers")
    added -= _measured("Megatron step, 16 layers of 2048, 16k tokens, dense")
    added += 6 * (2.5 - TOPK_THEN + TOPK_NOW)
    assert step.table * 1e3 + 6 * matrices == pytest.approx(added, rel=NEAR)


def test_other_gpus_are_estimated_by_their_copy_rate() -> None:
    job = job_of(world=1)
    steps = layout_cost(job, ALONE).seconds
    norms = [next(s for s in steps[gpu].stages if s.name == NORM).seconds for gpu in HARDWARE]
    rates = [hardware.copy for hardware in HARDWARE.values()]
    products = [norm * rate for norm, rate in zip(norms, rates, strict=True)]
    assert products == pytest.approx([products[0]] * 3)


def test_only_forms_that_are_the_default_are_estimated() -> None:
    """Whoever changes a default brings a measurement of it, from which the rate here follows."""
    estimated = {
        "product_topk": "two_looks",
        "product_topk_backward": "bags",
        "embedding_bag": "triton",
        "row_gradient": "add",
        "sort_lookups": "torch",
        "row_adam": "list",
        "squared_norm": "torch",
    }
    assert {op: next(iter(FORMS[op])) for op in estimated} == estimated
    for rate in RATES.values():
        assert not rate.record or (RESULTS / rate.record).exists()


def test_a_variant_with_two_tables_reads_and_sorts_for_both() -> None:
    memory = _estimated(memory_variant="memory", memory_value_dim=None)
    peer = _estimated(memory_variant="peer", memory_value_dim=None)
    assert peer[ROWS].seconds == pytest.approx(2 * memory[ROWS].seconds)
    assert peer[SORT].seconds == pytest.approx(3 * memory[SORT].seconds)
    assert "rows: dot products" in peer and "rows: dot products" not in memory
    assert "gate" not in memory


def test_the_cache_holds_the_gradients_of_one_rank_but_not_of_eight() -> None:
    """Their gathers are then three times as slow; the rows are read as before."""
    seconds = {}
    for ranks in (1, 8):
        job = job_of(world=ranks)
        for stage in layout_cost(job, Layout("column", ranks, ranks)).seconds["h100"].stages:
            if stage.name == ROW_GRADIENT:
                seconds[ranks] = stage.seconds
    assert seconds[8] > 1.5 * seconds[1] / 8


def test_sums_of_one_rank_cost_nothing() -> None:
    assert "partial sums" not in _estimated()
    job = job_of(world=8)
    found = layout_cost(job, Layout("row", 8, 1)).seconds["h100"].stages
    assert "partial sums" in {stage.name for stage in found}
