"""The comparison at its smallest scale, end to end, and what happens to runs that were cut off."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from rich.progress import Progress

FOLDER = Path(__file__).parents[2] / "examples" / "facts"
# scripts of one folder import each other by bare name, as they do when run
sys.path.insert(0, str(FOLDER))

import compare  # noqa: E402
from experiment import corpora, runs, scales  # noqa: E402
from experiment.models import Model  # noqa: E402
from experiment.plan import MIDDLE, Plan, Run, stamp_of  # noqa: E402
from experiment.runs import Job, RunFailed, Runner  # noqa: E402

SMOKE, FAMILIES = scales.SMOKE, scales.FAMILIES
# seconds; of a run that hangs, not of one that a busy machine holds up
PATIENCE = 3600.0
LOADED = re.compile(r"successfully loaded checkpoint from .*? at iteration (\d+)")


def _environment() -> dict[str, str]:
    # the interpreter of the tests' own kernels is not part of a run
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def _compare(output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "compare.py"), "--scale", "smoke"]
    command += ["--output", str(output), *flags]
    return subprocess.run(
        command, capture_output=True, text=True, env={**_environment(), "COLUMNS": "200"}
    )


def _written(output: Path) -> dict[Path, int]:
    """When each file of the runs was last written."""
    files = (path for path in (output / "runs").rglob("*") if path.is_file())
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    ran = _compare(folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


@pytest.fixture(scope="module")
def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def test_every_run_is_recorded(results: dict[str, Any], output: Path) -> None:
    assert results["waiting"] == 0
    names = [(run["group"], run["model"]) for run in results["runs"]]
    models = ["dense", "memory+ 0.25k", "memory+ 1k"]
    assert [name for group, name in names if group == "main"] == models
    assert ("continual", "full finetuning x0.5") in names
    for run in results["runs"]:
        assert run["commit"] and run["torch"] and run["flags"]["seed"] == run["seed"] == 1
        assert run["peak_bytes"] > 50 * 2**20 and run["tokens_per_second"] > 0
        assert run["loss"] < 6 and run["validation_loss"] > 0
    flops = {run["flops_per_token"] for run in results["runs"]}
    assert max(flops) / min(flops) < 1.01
    # what the plan said is what was built
    plan = Plan(SMOKE, results["corpus"]["vocab_size"], "corpus")
    planned = {run.model.name: run.parameters for run in plan.main(dict.fromkeys(FAMILIES, MIDDLE))}
    built = {run["model"]: run["parameters"] for run in results["runs"] if run["group"] == "main"}
    assert built == planned
    logs = [*(output / "runs").glob("*/train.log")]
    # a run that serves several parts is trained once
    assert len(logs) == len({run["key"] for run in results["runs"]}) == 4


def test_facts_are_learnt_and_asked_on_the_way(results: dict[str, Any]) -> None:
    for run in results["runs"]:
        taught = bool(run["start"])
        at = [SMOKE.new_iterations] if taught else [SMOKE.iterations // 2, SMOKE.iterations]
        for probes in run["probes"].values():
            asked = [(probe["iteration"], probe["phrasing"]) for probe in probes]
            # in unseen words at the end alone
            assert asked == [*((n, "question") for n in at), (at[-1], "unseen")]
        if not taught:
            assert sorted(run["probes"]) == ["corpus"]
            first, last = (p for p in run["probes"]["corpus"] if p["phrasing"] == "question")
            assert last["facts"] > first["facts"] or last["accuracy"] > 0.9
            assert last["facts"] > 0.2 * SMOKE.corpus.facts
            assert 0 < first["seconds"] < last["seconds"]
            assert last["tokens"] == SMOKE.iterations * SMOKE.tokens_per_iteration


def test_teaching_goes_on_from_the_trained_model(results: dict[str, Any], output: Path) -> None:
    (taught,) = [run for run in results["runs"] if run["start"]]
    log = (output / "runs" / taught["key"] / "train.log").read_text()
    assert f"{taught['start']}/checkpoints" in log and LOADED.search(log)
    assert sorted(taught["probes"]) == ["corpus", "new"]
    new = [p for p in taught["probes"]["new"] if p["phrasing"] == "question"]
    assert new[-1]["facts"] > 0


def test_all_models_saw_the_same_batches(results: dict[str, Any]) -> None:
    main = {run["data_order"] for run in results["runs"] if run["group"] == "main"}
    taught = {run["data_order"] for run in results["runs"] if run["start"]}
    assert len(main) == len(taught) == 1 and all(main | taught) and main != taught


def test_tables_and_pictures_are_there(output: Path) -> None:
    text = (output / "results.md").read_text()
    for title in ("Facts known at equal FLOPs", "Sweep of learning rates", "Continual learning"):
        assert f"## {title}" in text
    pictures = ("rows", "tokens", "time")
    assert all((output / f"facts_by_{name}.png").stat().st_size > 5000 for name in pictures)


def test_finished_runs_are_not_run_again(output: Path, results: dict[str, Any]) -> None:
    before = _written(output)
    ran = _compare(output, "--only", "main")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "main: 3 of 3 runs are finished already" in ran.stdout
    assert _written(output) == before


def test_a_checkpoint_that_is_not_there_is_named(output: Path, results: dict[str, Any]) -> None:
    plan = Plan(SMOKE, results["corpus"]["vocab_size"], stamp_of(SMOKE.corpus))
    trained, _ = plan.continual(dict.fromkeys(FAMILIES, MIDDLE))
    assert trained.key in {run["key"] for run in results["runs"]}
    runner = Runner(output, "cpu", 1, 0.0, Console(quiet=True))
    command = runner._probe_command(replace(trained, points=(SMOKE.iterations, 7)), "corpus")
    ran = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert ran.returncode == 2
    assert re.search(r"error: --probe-iterations 7: --load .* has no checkpoint of it", ran.stderr)


class Impatient(Runner):
    """Does something to the run at work once its training has come to an iteration."""

    at, kill = 0, False

    def _watch(self, job: Job, progress: Progress) -> None:
        super()._watch(job, progress)
        if job.process is not None and job.shown is not None and job.shown[0] >= self.at:
            if self.kill:
                job.process.send_signal(signal.SIGKILL)
                job.process.wait()
            else:
                self.deadline = 0.0


def _long_run(plan: Plan) -> Run:
    run = plan.run("main", Model("dense", "dense"), 7, MIDDLE)
    run.flags.update(train_iters=900, save_interval=300, eval_interval=900)
    return replace(run, points=(300, 900))


@pytest.mark.slow
def test_a_run_that_is_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once stopped by the clock, which saves; once killed, which does not; then finished."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    console = Console(quiet=True)
    counts = corpora.build_facts(tmp_path, SMOKE, console)
    run = _long_run(Plan(SMOKE, counts.vocab_size, "corpus"))
    log = tmp_path / "runs" / run.key / "train.log"

    impatient = Impatient(tmp_path, "cpu", 1, time.monotonic() + PATIENCE, console)
    impatient.at = 30
    assert not impatient.execute("main", [run])
    saved = int((log.parent / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert 30 <= saved < 300 and not (log.parent / "record.json").exists()

    impatient.deadline, impatient.at, impatient.kill = time.monotonic() + PATIENCE, 330, True
    with pytest.raises(RunFailed, match=r"seed 7 ended with -9"):
        impatient.execute("main", [run])

    assert Runner(tmp_path, "cpu", 1, time.monotonic() + PATIENCE, console).execute("main", [run])
    assert [int(found) for found in LOADED.findall(log.read_text())] == [saved, 300]
    record = json.loads((log.parent / "record.json").read_text())
    assert [p["iteration"] for p in record["probes"]["corpus"]] == [300, 900, 900]
    assert not [*log.parent.glob("checkpoints/iter_*"), *log.parent.glob("cache")]
    left = [
        p for p in psutil.process_iter(["cmdline"]) if run.key in " ".join(p.info["cmdline"] or ())
    ]
    assert not left


def test_a_run_that_fails_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = _long_run(Plan(SMOKE, 500, "corpus"))
    # there is no corpus
    runner = Runner(tmp_path, "cpu", 1, time.monotonic() + PATIENCE, Console(quiet=True))
    with pytest.raises(
        RunFailed,
        match=r"(?s)ended with 1; the end of .*train.log:.*/corpus/tokenizer.model is invalid",
    ):
        runner.execute("main", [run])


def test_what_a_killed_experiment_left_at_work_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    leftover, stranger = (subprocess.Popen([*command, name]) for name in (tmp_path.name, "other"))
    try:
        for process in (stranger, leftover):
            (tmp_path / "pid").write_text(str(process.pid))
            runs._end_leftover(tmp_path)
        assert not psutil.pid_exists(leftover.pid)
        # its number was another process's by now
        assert stranger.poll() is None
    finally:
        for process in (leftover, stranger):
            process.kill()
            process.wait()


def test_two_experiments_do_not_share_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert compare.main(["--scale", "smoke", "--output", str(tmp_path)]) == 2
    assert "another compare.py is at work" in capsys.readouterr().out.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
