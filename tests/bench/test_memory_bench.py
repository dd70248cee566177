"""The peak memory of ranks is what the planner computes, part by part."""

import json
from functools import cache

import pytest

from megamem.tools import memory_bench
from megamem.tools.memory_bench import PHASES, Record, Sizes, measure
from tests.helpers.commands import command

run_bench = command("bench")
# small, but with lookup buffers that are not negligible beside the table
SMALL = {"num_keys": 64, "width": 128, "key_dim": 32, "tokens": 64, "heads": 2, "topk": 16}


@cache
def _measured(mode: str, ranks: int, **settings: str) -> Record:
    return measure(mode, ranks, Sizes(**SMALL, **settings))


CASES = [("row", 1), ("row", 2), ("column", 2), ("row", 4), ("column", 4)]


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("mode", "ranks"),
    # the other cases are marked slow: each starts as many processes as it has ranks
    [pytest.param(*case, marks=[] if case[1] == 2 else pytest.mark.slow) for case in CASES],
)
def test_peaks_are_as_planned(mode: str, ranks: int) -> None:
    record = _measured(mode, ranks)
    held = record.plan - record.planned["buffers"]
    assert held > 2 * record.planned["buffers"], "the table does not dominate"
    peak = max(record.measured[phase] for phase in ("forward", "backward", "update"))
    assert peak == pytest.approx(record.plan, rel=memory_bench.TOLERANCE)
    # most of the peak is the table, so the buffers are also compared by themselves
    assert record.buffers_ratio == pytest.approx(1, abs=0.15)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ultramem", "ultramem-v2"])
@pytest.mark.parametrize("wire", ["allgather", "alltoall"])
def test_peaks_of_tucker_scores_are_as_planned(variant: str, wire: str, monkeypatch) -> None:
    """With kernels, which are not the default yet; tests/planner looks at one rank."""
    monkeypatch.setenv("MEGAMEM_FORMS", "tucker_topk=triton,tucker_topk_backward=triton")
    record = _measured("row", 2, variant=variant, wire=wire)
    peak = max(record.measured[phase] for phase in ("forward", "backward", "update"))
    assert peak == pytest.approx(record.plan, rel=memory_bench.TOLERANCE)
    assert record.buffers_ratio == pytest.approx(1, abs=0.2)


@pytest.mark.gloo
@pytest.mark.parametrize("optimizer", ["adamw", "lazy_adamw", "rowwise_adamw", "sgd"])
def test_no_phase_copies_a_table(optimizer: str) -> None:
    record = _measured("row", 1, optimizer=optimizer)
    for phase in PHASES:
        assert record.measured[phase] < 1.1 * record.plan, phase


@pytest.mark.gloo
@pytest.mark.slow
def test_exact_sizes_hold_less() -> None:
    """alltoall sends lookups only to their owners: each rank holds fewer, as the plan says."""
    exact, fixed = _measured("row", 4, wire="alltoall"), _measured("row", 4)
    assert exact.planned["buffers"] < 0.75 * fixed.planned["buffers"]
    assert exact.buffers_ratio == pytest.approx(1, abs=0.2)


@pytest.mark.gloo
def test_on_the_command_line(tmp_path, capsys, monkeypatch) -> None:
    path = tmp_path / "peaks.json"
    words = [f"--{name.replace('_', '-')}={size}" for name, size in SMALL.items()]
    status = run_bench(["--memory", "--device=cpu", "--ranks=1", *words, f"--json={path}"])
    (record,) = json.loads(path.read_text())
    assert record["sizes"]["num_keys"] == 64 and record["measured"].keys() == set(PHASES)
    assert record["planned"]["weights"] == 2 * 64**2 * 128
    printed = capsys.readouterr().out
    assert "row over 1" in printed and f"{record['ratio']:.3f}" in printed
    within = abs(record["ratio"] - 1) <= memory_bench.TOLERANCE
    assert status == (0 if within else memory_bench.BEYOND_PLAN)
    # 65 rows per head are more than there are sub-keys
    assert run_bench(["--memory", "--device=cpu", "--ranks=1", "--topk=65", *words[:-1]]) == 2
    assert "--memory-topk 65" in capsys.readouterr().err
