"""The conclusions that the parts of tests/gpu.sh draw from results."""

import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.gpu import bench, machine, report, tests, tune
from tests.gpu.layer import Sizes, build
from tests.gpu.ranks import CLOSE, largest_difference
from tests.gpu.sync_sites import SyncSites
from tests.gpu.training_runs import Run, launch

TRUTH = {1: 7.0, 2: 6.9, 3: 6.5, 4: 6.3, 5: 6.2, 6: 6.1}


@pytest.mark.parametrize(
    ("changed", "first", "expected"),
    [
        pytest.param({}, 1, (0.0, True), id="equal"),
        pytest.param({3: 6.5001}, 1, (1e-4, False), id="apart early"),
        pytest.param({6: 6.101}, 1, (1e-3, True), id="apart late"),
        pytest.param({6: 6.11}, 1, (1e-2, False), id="apart late, too far"),
        pytest.param({6: float("nan")}, 1, (float("nan"), False), id="NaN"),
        # the second loss that a run logs is the mean of its first two
        pytest.param({5: 6.25}, 4, (0.0, True), id="resumed"),
        pytest.param({4: 6.31}, 4, (1e-2, False), id="resumed wrongly"),
        pytest.param({6: None}, 1, (None, False), id="a step is missing"),
    ],
)
def test_losses_are_close_or_not(changed: dict, first: int, expected: tuple) -> None:
    losses = {n: x for n, x in (TRUTH | changed).items() if x is not None and n >= first}
    difference, right = largest_difference(losses, TRUTH, first, CLOSE)
    assert difference == (expected[0] and pytest.approx(expected[0], nan_ok=True))
    assert right is expected[1]


RANK = """
import os, sys, time
if os.environ["RANK"] == "1":
    print("ValueError: no such table")
    sys.exit(3)
time.sleep(600)
"""


def test_the_summary_of_the_candidates() -> None:
    def outcome(op: str, form: str, ms: float | None, **more: object) -> dict:
        return {"op": op, "form": form, "ms": ms, "numbers": {}, "wrong": "", "chosen": 0, **more}

    measured = [
        outcome("a", "old", 2.5),
        outcome("a", "new", 1.25, numbers={"tile": 8}, chosen=True),
        outcome("a", "bad", None, wrong="3 numbers are wrong"),
        outcome("b", "old", 1.0, chosen=True),
    ]
    assert tune.summary_of(measured) == (
        "3 of 4 candidates correct; a new tile=8 1.25 ms instead of 2.5; wrong: a bad"
    )
    measured[0] |= {"ms": None, "wrong": "it fails"}
    assert "a new tile=8 1.25 ms; wrong: a old, a bad" in tune.summary_of(measured)


def test_a_rank_that_fails_ends_its_run(tmp_path: Path) -> None:
    (tmp_path / "fake_rank.py").write_text(RANK)
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    log = launch(Run("TP2", 2, (), "fake_rank", environment), tmp_path / "logs", timeout=60)
    # the other rank was ended, as it would have waited for the failed one
    assert log.statuses == [None, 3] and log.seconds < 30
    assert log.failure == "TP2 ended with status [None, 3]: ValueError: no such table"


def test_ranks_of_one_gpu_are_two_hosts_to_nccl(tmp_path: Path) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NCCL_HOSTID", "NCCL_SOCKET_IFNAME", "MASTER_PORT")
    shown = f"import os; print(*[os.environ[name] for name in {names}])"
    (tmp_path / "fake_rank.py").write_text(shown)
    environment = {"PYTHONPATH": str(tmp_path)}
    log = launch(Run("show", 2, (), "fake_rank", environment), tmp_path / "logs", timeout=60)
    assert log.statuses == [0, 0]
    first, second = (line.split() for line in sorted(log.stdout.splitlines()))
    assert first[:3] == ["0", "2", "0"] and second[:3] == ["1", "2", "0"]
    assert first[3] != second[3] and first[4:] == second[4:] and first[4] == "lo"


def test_figures_are_read_from_megatrons_log(tmp_path: Path) -> None:
    line = (
        " [2026-11-26 15:00:00] iteration        {n}/       6 | consumed samples:           8 | "
        "elapsed time per iteration (ms): 534.{n} | learning rate: 1.0E-03 | global batch size: "
        "    8 | lm loss: 6.{n}E+00 | loss scale: 1.0 | grad norm: 1.234 | number of skipped "
        "iterations:   0 | number of nan iterations:   0 |"
    )
    said = [line.format(n=1), "[Rank 0] x memory (MB) | max allocated: 2048.00 |", line.format(n=2)]
    (tmp_path / "fake_rank.py").write_text(f"print({chr(10).join(said)!r})")
    environment = {"PYTHONPATH": str(tmp_path)}
    log = launch(Run("figures", 1, (), "fake_rank", environment), tmp_path, timeout=60)
    assert log.losses == {1: 6.1, 2: 6.2} and log.milliseconds == [534.1, 534.2]
    assert log.peak_gib == 2.0 and not log.failure


def test_junit_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.xml"
    path.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.ops.test_a" name="test_right"/>
        <testcase classname="tests.ops.test_a" name="test_wrong">
          <failure message="assert 1 == 2&#10; +  where"/></testcase>
        <testcase classname="" name="tests.ops.test_b">
          <error message="collection failure">ModuleNotFoundError</error></testcase>
        <testcase classname="tests.ops.test_a" name="test_left"><skipped message="no"/></testcase>
        </testsuite></testsuites>"""
    )
    counts = tests.Counts.read(path)
    assert (counts.passed, counts.skipped) == (1, 1)
    assert counts.failed == {
        "tests.ops.test_a::test_wrong": "assert 1 == 2",
        "tests.ops.test_b": "collection failure",
    }


def test_files_with_tests_for_a_gpu_are_found() -> None:
    found = tests.files()
    assert {"tests/ops/test_row_adam.py", *tests.LARGE} <= set(found)
    assert "tests/test_layout.py" not in found


def test_a_wait_is_counted_with_its_line(device: str) -> None:
    trained = build(Sizes(16, 64, 16, 2, 4), torch.device(device), torch.float32)
    x = torch.ones(3, device=device)
    with SyncSites(torch.device(device)) as none:
        x.sum()
    with SyncSites(torch.device(device)) as sites:
        x.sum().item()
        for gradient in trained.optimizer.gradients.values():
            gradient.touched_blocks()
    assert none.count == 0
    assert sites.sites["elsewhere"] == 1
    (line,) = [site for site in sites.sites if site != "elsewhere"]
    assert re.fullmatch(r"megamem/row_gradient\.py:\d+ touched_blocks", line)
    assert sites.count == 2


def test_an_exception_is_a_finding_and_keeps_the_rows(tmp_path: Path) -> None:
    def run(found: report.Report) -> None:
        found.add(n=1)
        raise RuntimeError("illegal memory access\nCUDA kernel errors might be")

    assert report.main("one", run, ["--out", str(tmp_path)]) == 1
    text = (tmp_path / "one.json").read_text()
    assert "RuntimeError: illegal memory access" in text and '"n": 1' in text
    assert '"ok": false' in text


def test_a_rival_that_is_faster_is_named() -> None:
    row = {"op": "bag", "distribution": "uniform", "ms": 2.0, "baseline_ms": 4.0}
    assert bench._slowest([row]) == "no rival is faster"
    faster = row | {"op": "topk", "published_ms": 0.5}
    assert bench._slowest([row, faster]) == (
        "rivals are faster in 1 cases, at most the published kernel by 4.00x in topk, uniform"
    )


def test_a_case_that_bench_leaves_out_is_a_problem() -> None:
    said = "adamw_  R=8\nskipped: adamw_ R=2: it needs 90 GiB\nmegamem: error: bag is wrong\n"
    assert bench._problems(said) == [
        "skipped: adamw_ R=2: it needs 90 GiB",
        "megamem: error: bag is wrong",
    ]


def test_wheels_are_unpacked_side_by_side(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with pytest.raises(ValueError, match=r"MEGAMEM_WHEELS=.* has no \*.whl files"):
        machine.unpack_wheels(wheels, site)
    for name in ("one", "two"):
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"unpacked_{name}/__init__.py", "")
    machine.unpack_wheels(wheels, site)
    assert machine.missing(["unpacked_one"]) == ["unpacked_one"]
    sys.path.append(str(site))
    try:
        assert machine.missing(["unpacked_one", "unpacked_two", "no_such.module"]) == [
            "no_such.module"
        ]
    finally:
        sys.path.remove(str(site))
    (wheels / "broken.whl").write_text("this is none")
    with pytest.raises(ValueError, match="broken.whl is not a wheel"):
        machine.unpack_wheels(wheels, site)


def test_the_commit_is_found_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMEM_COMMIT", "0123abc")
    assert machine.commit() == "0123abc"
    monkeypatch.delenv("MEGAMEM_COMMIT")
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "")
    assert machine.commit() == "unknown"
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text(f"# pack-refs\n{'a' * 40} refs/heads/main\n")
    assert machine.commit() == "a" * 10
    (git / "refs" / "heads" / "main").write_text("b" * 40)
    assert machine.commit() == "b" * 10
    (git / "HEAD").write_text("c" * 40)
    assert machine.commit() == "c" * 10
