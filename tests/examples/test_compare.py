"""The comparison at its smallest scale, end to end, and what happens to runs that were cut off."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
from rich.console import Console

from tests.helpers.megatron_runs import launch_warm

FOLDER = Path(__file__).parents[2] / "examples" / "facts"
# scripts of one folder import each other by bare name, as they do when run
sys.path.insert(0, str(FOLDER))

import build_corpus  # noqa: E402
import compare  # noqa: E402
from experiment import runs  # noqa: E402
from experiment.plan import SCALES, Model, Plan, Run  # noqa: E402
from experiment.runs import OneProcessRunner, RunFailed, Runner, read_events  # noqa: E402

SMOKE, MIDDLE = SCALES["smoke"], (1.0, 1.0)
BEST = dict.fromkeys(SMOKE.sweep, MIDDLE)
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


def _models(results: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    return {name: results["runs"][key] for name, (key,) in results["parts"][part].items()}


def test_every_run_is_recorded(results: dict[str, Any], output: Path) -> None:
    assert results["waiting"] == 0 and results["scale"]["seeds"] == [1]
    main, continual = _models(results, "main"), _models(results, "continual")
    assert list(main) == ["dense", "memory+ 0.25k", "memory+ 1k"]
    assert list(continual) == ["memory+ 1k", "full finetuning x0.5"]
    assert all(results["made_with"].values())
    for run in results["runs"].values():
        assert run["commit"] and run["seed"] == 1
        assert run["peak_bytes"] > 50 * 2**20 and run["tokens_per_second"] > 0
        assert 0 < run["validation_loss"] < 6
    flops = {run["flops_per_token"] for run in results["runs"].values()}
    assert max(flops) / min(flops) < 1.01
    # what the plan said is what was built
    plan = Plan(SMOKE, results["corpus"]["vocab_size"])
    planned = {run.model.name: run.parameters for run in plan.part("main", BEST)}
    assert {name: run["parameters"] for name, run in main.items()} == planned
    logs = [*(output / "runs").glob("*/train.log")]
    # a run that serves several parts is trained once
    assert len(logs) == len(results["runs"]) == 4


def test_the_record_is_what_the_log_says(results: dict[str, Any], output: Path) -> None:
    """Megatron writes its numbers to events and, rounded, to the log."""
    for key, run in results["runs"].items():
        log = (output / "runs" / key / "train.log").read_text()
        said = rf"validation loss at iteration {run['iterations']} on validation set \| lm loss "
        (loss,) = re.findall(said + r"value: (\S+)", log)
        assert run["validation_loss"] == pytest.approx(float(loss), rel=1e-6)
        each = re.findall(r"iteration +(\d+)/.*?elapsed time per iteration \(ms\): ([\d.]+)", log)
        took = {int(iteration): float(ms) for iteration, ms in each}
        assert took.pop(1) > 0 and max(took) == run["iterations"]
        interval = min(took)
        seconds = interval / 1000 * sum(took.values())
        assert run["seconds"][-1] == pytest.approx(seconds, rel=0.01)


def test_facts_are_learnt_and_asked_on_the_way(results: dict[str, Any]) -> None:
    steps, new = SMOKE.flags["train_iters"], SMOKE.new["flags"]["train_iters"]
    for run in results["runs"].values():
        taught = "new" in run
        assert run["points"] == ([new] if taught else [steps // 2, steps])
        facts = run["corpus"]["facts"]
        assert len(facts) == len(run["points"])
        if not taught:
            assert facts[1] > facts[0] or run["corpus"]["accuracy"] > 0.9
            assert facts[1] > 0.2 * SMOKE.corpus.facts
            assert 0 < run["seconds"][0] < run["seconds"][1]


def test_teaching_goes_on_from_the_trained_model(results: dict[str, Any], output: Path) -> None:
    (taught,) = [key for key, run in results["runs"].items() if "new" in run]
    record = json.loads((output / "runs" / taught / "record.json").read_text())
    assert record["start"] == results["parts"]["continual"]["memory+ 1k"][0]
    log = (output / "runs" / taught / "train.log").read_text()
    assert f"{record['start']}/checkpoints" in log and LOADED.search(log)
    assert record["new"]["facts"][-1] > 0


def test_all_models_saw_the_same_batches(results: dict[str, Any]) -> None:
    main = {run["data_order"] for run in _models(results, "main").values()}
    taught = {run["data_order"] for run in results["runs"].values() if "new" in run}
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


def _trained(results: dict[str, Any]) -> Run:
    """The run whose checkpoint stays, as others start from it."""
    trained, *_ = Plan(SMOKE, results["corpus"]["vocab_size"]).part("continual", BEST)
    assert trained.key in results["runs"]
    return trained


def test_a_checkpoint_that_is_not_there_is_named(output: Path, results: dict[str, Any]) -> None:
    runner = Runner(output, "cpu", 1, 0.0, Console(quiet=True))
    command = runner.command(_trained(results), "corpus")
    ran = subprocess.run([*command, "7"], capture_output=True, text=True, env=_environment())
    assert ran.returncode == 2
    wanted = f"--probe-iterations {SMOKE.flags['train_iters'] // 2}"
    assert re.search(rf"error: {wanted}: --load .* has no checkpoint of it", ran.stderr)


@pytest.mark.gloo
def test_two_ranks_that_share_the_vocabulary_answer_as_one(
    output: Path, results: dict[str, Any], tmp_path: Path
) -> None:
    run, runner = _trained(results), Runner(output, "cpu", 1, 0.0, Console(quiet=True))
    _, _, _, launcher, script, *flags = runner.command(run, "corpus")
    flags += ["--probe-iterations", str(run.iterations), "--phrasing", "both"]
    flags += ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    launch_warm("probe", 2, launcher, script, *flags, "--probe-output", tmp_path / "probe.json")
    told = [
        json.loads(path.read_text())["probes"][-2:]
        for path in (output / "runs" / run.key / "probe-corpus.json", tmp_path / "probe.json")
    ]
    assert told[0] == told[1] and told[0][0]["totals"][0]["right"] > 10


def test_one_process_trains_and_asks_as_two_do(
    output: Path, results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: asking in the middle of training changes nothing of it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = _trained(results)
    (tmp_path / "corpus").symlink_to(output / "corpus")
    runner = OneProcessRunner(tmp_path, "cpu", 1, float("inf"), Console(quiet=True))
    assert runner.execute("main", [run])
    (record,) = runner.records([run]).values()
    other = json.loads((output / "runs" / run.key / "record.json").read_text())
    same = ("corpus", "points", "parameters", "data_order", "flags", "iterations", "rows")
    assert {name: record[name] for name in same} == {name: other[name] for name in same}
    assert record["corpus"]["facts"][-1] > 10
    for name in ("loss", "validation_loss"):
        assert record[name] == pytest.approx(other[name], rel=1e-6)


def test_times_are_not_kept_where_they_say_nothing(
    output: Path, results: dict[str, Any], tmp_path: Path
) -> None:
    """With --untimed; all that was learnt is kept as ever."""
    run = _trained(results)
    (tmp_path / "corpus").symlink_to(output / "corpus")
    shutil.copytree(output / "runs" / run.key, tmp_path / "runs" / run.key)
    kept = tmp_path / "runs" / run.key / "record.json"
    before = json.loads(kept.read_text())
    kept.unlink()
    assert compare.parse_args(["--scale", "smoke", "--untimed"]).untimed
    # trained and asked already, so that only the record is written
    runner = Runner(tmp_path, "cpu", 1, float("inf"), Console(quiet=True), timed=False)
    assert runner.execute("main", [run])
    after = json.loads(kept.read_text())
    assert before["tokens_per_second"] > 0 and len(before["seconds"]) == 2
    # the index, of which the order is a hash, is gone by now
    timeless = {"tokens_per_second": None, "seconds": None, "data_order": ""}
    assert after == {**before, **timeless, "commit": after["commit"]}


def _long_run(plan: Plan) -> Run:
    run = plan.run("main", Model("dense", "dense"), 7, MIDDLE)
    run.flags.update(train_iters=900, save_interval=300, eval_interval=900)
    return run


def _once(folder: Path, iteration: int, runner: Runner, action: Callable[[], object]) -> Thread:
    """Does something to the run at work once its training has come to an iteration."""

    def watch() -> None:
        (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
        while max(read_events(folder / "tensorboard").get("lm loss", ()), default=0) < iteration:
            time.sleep(0.1)
        action()

    thread = Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_run_that_is_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once stopped by the clock, which saves; once killed, which does not; then finished."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    console = Console(quiet=True)
    counts, _ = build_corpus.build(tmp_path / "corpus", SMOKE.corpus, console)
    run = _long_run(Plan(SMOKE, counts["vocab_size"]))
    folder = tmp_path / "runs" / run.key
    log = folder / "train.log"
    runner = Runner(tmp_path, "cpu", 1, time.monotonic() + PATIENCE, console)

    def processes() -> list[psutil.Process]:
        every = psutil.process_iter(["cmdline"])
        return [process for process in every if run.key in " ".join(process.info["cmdline"] or ())]

    watch = _once(folder, 30, runner, lambda: setattr(runner, "deadline", 0.0))
    assert not runner.execute("main", [run])
    watch.join()
    saved = int((folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert 30 <= saved < 300 and not (folder / "record.json").exists()

    runner.deadline = time.monotonic() + PATIENCE
    watch = _once(folder, 330, runner, lambda: [process.kill() for process in processes()])
    with pytest.raises(RunFailed, match=r"seed 7 ended with -9 before it was finished"):
        runner.execute("main", [run])
    watch.join()

    assert runner.execute("main", [run])
    assert [int(found) for found in LOADED.findall(log.read_text())] == [saved, 300]
    record = json.loads((folder / "record.json").read_text())
    assert record["points"] == [300, 600, 900] and len(record["corpus"]["facts"]) == 3
    assert not [*folder.glob("checkpoints/iter_*"), *folder.glob("cache")]
    assert not processes()


def test_a_run_that_fails_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = _long_run(Plan(SMOKE, 500))
    # there is no corpus
    runner = Runner(tmp_path, "cpu", 1, time.monotonic() + PATIENCE, Console(quiet=True))
    with pytest.raises(
        RunFailed,
        match=r"(?s)ended with 1 before it .*; the end of .*train.log:.*tokenizer.model is invalid",
    ):
        runner.execute("main", [run])


def test_what_a_killed_experiment_left_at_work_is_ended(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)", "megamem.run"]
    folders = (tmp_path / "here" / "checkpoints", tmp_path / "there" / "checkpoints")
    leftover, stranger = (subprocess.Popen([*sleep, "--load", str(folder)]) for folder in folders)
    # of the same folder, but no run
    reader = subprocess.Popen([*sleep[:3], str(folders[0])])
    try:
        runs._end_leftover(tmp_path / "here")
        assert not psutil.pid_exists(leftover.pid)
        assert stranger.poll() is None and reader.poll() is None
    finally:
        for process in (leftover, stranger, reader):
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
