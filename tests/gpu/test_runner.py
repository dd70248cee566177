"""The command behind tests/gpu.sh: a part that fails, hangs or dies does not stop the others."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import __main__ as command
from tests.gpu.machine import DRY_RUN, ROOT
from tests.gpu.parts import BY_NAME, PARTS, Part, chosen
from tests.gpu.runner import Outcome, Runner
from tests.gpu.table import table

WRITES = """
import json, sys
from pathlib import Path
def write(name, **content):
    folder = Path(sys.argv[sys.argv.index("--out") + 1])
    (folder / f"{name}.json").write_text(json.dumps({"part": name, "rows": [], **content}))
"""
MODULES = {
    "passes": """
import sys
from tests.gpu import report
def run(found):
    found.add(size=found.divided(2048, least=64))
    found.finish(True, "one row")
sys.exit(report.main("passes", run))
""",
    "fails": WRITES
    + """
write("fails", ok=False, skipped="", summary="3 numbers are wrong")
sys.exit(1)
""",
    # with a child process in another session, like the ranks of a training run
    "hangs": WRITES
    + """
import subprocess, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                         start_new_session=True)
write("hangs", ok=False, skipped="", summary="2 rows so far", rows=[{"child": child.pid}, {}])
time.sleep(600)
""",
    "dies": "import os; os.kill(os.getpid(), 11)",
    "skips": WRITES + "write('skips', ok=False, skipped='not here', summary='not here')",
    "lies": WRITES + "write('lies', ok=True, skipped='', summary='all right'); sys.exit(3)",
}


def _part(name: str, limit: float = 60.0, **more: Any) -> Part:
    return Part(name, "", limit, module=f"fake_{name}", **more)


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Part]:
    """Parts that do what their names say."""
    for name, source in MODULES.items():
        (tmp_path / f"fake_{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(tmp_path))))
    limits = {"hangs": 1.5}
    return {name: _part(name, limits.get(name, 60.0)) for name in MODULES}


def _runner(tmp_path: Path, seconds: float = 60.0, **more: Any) -> Runner:
    return Runner(tmp_path / "work", 64, time.monotonic() + seconds, **more)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_part_has_its_turn_whatever_the_others_do(tmp_path: Path, fakes: dict) -> None:
    needy = _part("needy", needs=("no_such_module", "PIL"))
    order = [*(fakes[n] for n in ("fails", "hangs", "dies", "skips", "lies")), needy]
    outcomes = {o.part.name: o for o in _runner(tmp_path).run([*order, fakes["passes"]])}
    verdicts = {name: outcome.verdict for name, outcome in outcomes.items()}
    assert re.fullmatch(r"stopped after \d+ s", verdicts.pop("hangs"))
    assert verdicts == {
        "fails": "failed",
        "dies": "failed: ended with status -11",
        "skips": "skipped",
        "lies": "failed: ended with status 3",
        "needy": "not run: needs no_such_module",
        "passes": "passed",
    }
    assert outcomes["fails"].summary == "3 numbers are wrong"
    # its results up to the time limit are kept, and none of its processes is left
    rows = outcomes["hangs"].content["rows"]
    assert len(rows) == 2 and not _alive(rows[0]["child"])
    assert [o.part.name for o in outcomes.values() if o.failed] == [
        *("fails", "hangs", "dies", "lies", "needy")
    ]


def test_parts_that_time_nothing_run_beside_each_other_on_a_gpu_alone(tmp_path: Path) -> None:
    parts = [_part("a"), _part("b", beside=True), _part("c", beside=True), _part("d")]

    def names(runner: Runner) -> list[list[str]]:
        return [[part.name for part in batch] for batch in runner._batches(parts)]

    assert names(_runner(tmp_path)) == [["a"], ["b", "c"], ["d"]]
    assert names(_runner(tmp_path, dry_run=True)) == [["a"], ["b"], ["c"], ["d"]]


def test_what_the_clock_leaves_out_is_named_and_has_no_result(tmp_path: Path, fakes: dict) -> None:
    runner = _runner(tmp_path, seconds=2.0)
    runner.work.mkdir()
    (runner.work / "passes.json").write_text('{"ok": true, "summary": "of an earlier run"}')
    (outcome,) = runner.run([fakes["passes"]])
    assert outcome.verdict == "not started: the time limit was reached" and outcome.failed
    assert not outcome.summary and not (runner.work / "passes.json").exists()


def test_an_interrupted_run_keeps_what_was_found(
    tmp_path: Path, fakes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = _part("hangs")
    monkeypatch.setattr(command, "chosen", lambda _: [hangs, fakes["passes"]])
    result = tmp_path / "work" / "hangs.json"

    class Folder:
        def __init__(self, **_: Any) -> None: ...
        def __enter__(self) -> str:
            result.parent.mkdir()
            return str(result.parent)

        def __exit__(self, *_: object) -> None: ...

    def stop_soon() -> None:
        while not result.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(command, "TemporaryDirectory", Folder)
    threading.Thread(target=stop_soon, daemon=True).start()
    assert command.main(["--cpu", "--out", str(tmp_path / "out")]) == 1
    first, second = json.loads((tmp_path / "out" / "results.json").read_text())
    assert first["verdict"] == "interrupted" and first["summary"] == "2 rows so far"
    assert second["verdict"] == "not reached: interrupted"
    assert not _alive(first["rows"][0]["child"])


def test_the_command_writes_records_and_one_table(
    tmp_path: Path, fakes: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    parts = [fakes[name] for name in ("passes", "fails", "skips")]
    monkeypatch.setattr(command, "chosen", lambda _: parts)
    monkeypatch.setenv("MEGAMEM_COMMIT", "abc123")
    out = tmp_path / "out"
    assert command.main(["--cpu", "--out", str(out), "--scale", "32"]) == 1
    records = {record["part"]: record for record in json.loads((out / "results.json").read_text())}
    assert list(records) == ["passes", "fails", "skips"]
    passed = records["passes"]
    assert passed["rows"] == [{"size": 64}] and passed["ok"] and passed["verdict"] == "passed"
    assert passed["device"] == DRY_RUN and passed["dry_run"] and passed["scale"] == 32
    assert passed["commit"] == "abc123" and passed["command"].startswith("bash tests/gpu.sh --cpu")
    assert passed["torch"] and passed["triton"] and passed["megatron-core"]
    assert passed["wall_seconds"] > 0 and passed["started"].startswith("20")
    shown = (out / "table.txt").read_text()
    assert shown.strip() in capsys.readouterr().out
    assert "DRY RUN ON CPU, sizes divided by 32: no number below is a measurement" in shown
    assert shown.strip().endswith("1 of 3 parts passed; skipped: skips; NOT passed: fails")
    assert "===== fails" in (out / "logs.txt").read_text()

    # nothing failed, but a part that was named on the command line was skipped
    monkeypatch.setattr(command, "chosen", lambda _: [fakes["skips"]])
    assert command.main(["--cpu", "--out", str(out)]) == 0
    assert command.main(["skips", "--cpu", "--out", str(out)]) == 1


def test_the_table_says_what_ran_where() -> None:
    content = {
        "device": "NVIDIA H100",
        "torch": "2.11.0",
        "commit": "abc123",
        "started": "2026-11-26T12:00:00+00:00",
        "summary": "27 of 27 right",
    }
    one, other = PARTS[1], PARTS[2]
    outcomes = [Outcome(one, "passed", 12.4, content), Outcome(other, "not reached: interrupted")]
    lines = table(outcomes).splitlines()
    assert lines[0] == "NVIDIA H100; torch 2.11.0; commit abc123; 2026-11-26T12:00:00+00:00"
    assert lines[2].split() == [one.name, "passed", "12", "27", "of", "27", "right"]
    assert lines[-1] == f"1 of 2 parts passed; NOT passed: {other.name}"
    assert "DRY RUN" not in "".join(lines)


def test_the_script_lists_its_parts_and_refuses_others() -> None:
    def script(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "tests/gpu.sh", *words], cwd=ROOT, capture_output=True, text=True
        )

    listed = script("--list")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(BY_NAME)
    refused = script("answers", "nonsense")
    assert refused.returncode == 2
    assert "there is no part nonsense; the parts are warm answers" in refused.stderr


def test_parts_run_in_the_order_of_their_worth() -> None:
    assert [part.name for part in chosen(["bench", "answers", "warm"])] == [
        *("warm", "answers", "bench")
    ]
    assert chosen([]) == list(PARTS)
    for part in PARTS:
        assert util.find_spec(part.where), part.where


@pytest.mark.slow
def test_a_whole_dry_run_passes(tmp_path: Path) -> None:
    """`bash tests/run.sh tests/gpu -m slow` runs it in ten minutes on two cores."""
    # with plain torch, as at these sizes Triton's interpreter would take hours
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run(
        ["bash", "tests/gpu.sh", "--cpu", "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    records = json.loads((tmp_path / "results.json").read_text())
    assert [record["part"] for record in records] == list(BY_NAME)
    assert {record["verdict"] for record in records if record["part"] != "te"} == {"passed"}
    assert all(record["dry_run"] for record in records)
