"""The scale h100: its size, its estimated cost, and its calls on a machine with next to nothing."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
from rich.console import Console

FOLDER = Path(__file__).parents[2] / "examples" / "facts"
# scripts of one folder import each other by bare name, as they do when run
sys.path.insert(0, str(FOLDER))

import compare  # noqa: E402
from build_corpus import build  # noqa: E402
from corpus import Settings, built  # noqa: E402
from experiment import estimate  # noqa: E402
from experiment.plan import SCALES, Plan, Scale, divided, flops_per_token  # noqa: E402
from experiment.runs import OneProcessRunner, best_rates  # noqa: E402

H100, LONG = SCALES["h100"], SCALES["long"]
# pieces of its tokenizer
VOCABULARY = 2048
PLAN = Plan(H100, VOCABULARY)
FIRST = {family: rates[0] for family, rates in H100.sweep.items()}
MIDDLE = (1.0, 1.0)
QUESTIONS = H100.corpus.probe_facts + H100.corpus.held_out
# packages of a machine that has torch, triton, pytest, numpy and the wheel of megatron-core alone
THERE = (
    *("torch", "torchgen", "functorch", "triton", "nvidia", "numpy", "megatron", "megamem"),
    *("pytest", "pluggy", "iniconfig", "packaging", "pygments"),
    *("filelock", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe"),
    *("fsspec", "setuptools"),
)
BARE = f"""
import sys
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions

FOUND = {{name: by for name, by in packages_distributions().items() if name[0] != "_"}}
HIDDEN = {{*FOUND}} - {set(THERE)}
UNLISTED = {{by for name in HIDDEN for by in FOUND[name]}}
UNLISTED -= {{by for name in {{*FOUND}} - HIDDEN for by in FOUND[name]}}

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in HIDDEN
        return None if hidden else PathFinder.find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):
        found = PathFinder.find_distributions(*context)
        return (one for one in found if one.metadata["Name"] not in UNLISTED)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""
# one pair of rates for each model, so that the whole of it takes less than a minute
QUICK = f"""
import sys
from dataclasses import replace
sys.path.insert(0, {str(FOLDER)!r})
import compare
from experiment.plan import SCALES
SCALES["h100"] = replace(SCALES["h100"], sweep={{"dense": [(1, 1)], "memory+": [(1, 1)]}})
sys.exit(compare.main(sys.argv[1:]))
"""


def _outside_embeddings(scale: Scale) -> int:
    dense = Plan(scale, VOCABULARY).run("main", scale.models[0], 1, MIDDLE)
    return dense.parameters - 2 * VOCABULARY * dense.flags["hidden_size"]


def test_it_is_long_in_larger() -> None:
    """As many tokens and parameters of dense for a fact, and a table of 1M rows."""
    facts = [scale.corpus.facts for scale in (LONG, H100)]
    tokens = [
        scale.flags["train_iters"] * scale.flags["global_batch_size"] * scale.flags["seq_length"]
        for scale in (LONG, H100)
    ]
    assert tokens[1] / facts[1] == pytest.approx(tokens[0] / facts[0], rel=0.01)
    dense = [_outside_embeddings(scale) for scale in (LONG, H100)]
    assert dense[1] / facts[1] == pytest.approx(dense[0] / facts[0], rel=0.05)
    assert [model.rows for model in H100.models] == [0, 2**20]
    costs = {run.flops for run in PLAN.part("main", FIRST)}
    assert max(costs) / min(costs) < 1.01


def test_every_call_is_estimated_to_end_within_five_minutes() -> None:
    main = PLAN.part("main", FIRST)
    models = [estimate.run_seconds(run, VOCABULARY, QUESTIONS) for run in main]
    sweep = estimate.sweep_seconds(PLAN.sweep(["main"]), VOCABULARY, QUESTIONS)
    assert 60 < models[0] < models[1] < 270 and 60 < sweep < 270
    assert sum(models) + sweep < 13 * 60
    # and fits: the table, its gradient and state, beside the little model
    cost = estimate.cost(main[1].flags, VOCABULARY)
    assert cost is not None and 2 < cost.bytes.total / 2**30 < 78
    assert cost.bytes.weights == 2 * main[1].table


def test_the_estimate_gives_the_step_that_was_measured() -> None:
    """534 ms of dense by construction; 635 with three memory layers, which it was not made from."""
    flags, vocabulary = estimate.MEASURED, estimate.MEASURED_VOCABULARY
    assert estimate.step(flags, vocabulary).device == pytest.approx(0.534)
    table = {"memory_layers": [3, 8, 13], "memory_num_keys": 1024}
    found = estimate.step({**flags, **table, "memory_heads": 4, "memory_topk": 32}, vocabulary)
    assert found.device == pytest.approx(0.635, rel=0.1)
    # twice as much to do takes twice as long on the device, and as long on the host
    dense, memory = PLAN.part("main", FIRST)
    once = estimate.step(memory.flags, VOCABULARY)
    batch = {name: 2 * memory.flags[name] for name in ("micro_batch_size", "global_batch_size")}
    twice = estimate.step({**memory.flags, **batch}, VOCABULARY)
    assert twice.host == once.host and twice.matrices == pytest.approx(2 * once.matrices)
    assert once.table < twice.table < 2 * once.table
    assert estimate.step(dense.flags, VOCABULARY).host < once.host


def test_both_models_are_swept_alike_and_judged_by_loss() -> None:
    runs = PLAN.sweep(["main"])
    tried = {model.name: [r for r in runs if r.model == model] for model in H100.models}
    assert len({len(found) for found in tried.values()}) == 1
    assert {(run.iterations, *run.points) for run in runs} == {(500, 500)}
    records = {
        run.key: {"validation_loss": abs(place - 3) + 1.0, "corpus": {"facts": [place]}}
        for place, run in enumerate(runs)
    }
    assert best_rates(runs, records, by_loss=True)[runs[3].model.family] == runs[3].rates
    # the whole runs are others, so that none is taken for one of the sweep
    assert not {run.key for run in PLAN.part("main", FIRST)} & records.keys()


@pytest.mark.parametrize("by", [2, 16, 64, 100_000])
def test_divided_sizes_are_a_scale_as_well(by: int) -> None:
    scale = divided("h100", by)
    plan = Plan(scale, VOCABULARY)
    runs = [*plan.sweep(["main"]), *plan.part("main", FIRST)]
    wanted = flops_per_token(scale.flags, VOCABULARY)
    assert scale.device == "cpu" and scale.corpus.facts < H100.corpus.facts
    for run in runs:
        assert run.flops == pytest.approx(wanted, rel=0.01)
        assert run.points[-1] == run.iterations == run.flags["eval_interval"]
        assert run.flags["lr_warmup_iters"] < run.iterations
        assert all(point % run.flags["log_interval"] == 0 for point in run.points)
        assert run.flags.get("memory_num_keys", 32) >= run.flags.get("memory_topk", 32)
    assert len(runs[-1].points) == len(PLAN.part("main", FIRST)[0].points)
    assert scale.name != H100.name and scale.name.endswith(f"divided by {by}")


def test_a_corpus_may_have_been_made_elsewhere(tmp_path: Path) -> None:
    settings = Settings(facts=60, held_out=5, vocab_size=400, kind="biographies")
    assert built(tmp_path, settings) is None
    report, _ = build(tmp_path, settings, Console(quiet=True))
    path = tmp_path / "facts.json"
    told = json.loads(path.read_text())
    told["settings"]["packages"] = {"sentencepiece": "of another machine"}
    path.write_text(json.dumps(told))
    assert built(tmp_path, settings) == report
    assert built(tmp_path, replace(settings, seed=5)) is None


def _call_there(*flags: str, bare: Path) -> subprocess.CompletedProcess[str]:
    """A call on a machine that has next to nothing."""
    (bare / "sitecustomize.py").write_text(BARE)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(bare)
    command = [sys.executable, "-c", QUICK, *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_calls_of_a_machine_with_torch_and_megatron_alone(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The corpus is carried there, each model is a call, and one file is brought back."""
    bare, first = tmp_path_factory.mktemp("bare"), {name: [MIDDLE] for name in H100.sweep}
    monkeypatch.setitem(SCALES, "h100", replace(H100, sweep=first))
    command = ["--scale", "h100", "--divide", "1000", "--output", str(tmp_path)]
    ran = _call_there(*command, "--only", "sweep", bare=bare)
    assert ran.returncode == 2
    assert "is not installed, with which the corpus is built; carry" in ran.stdout
    assert compare.main([*command, "--only", "corpus"]) == 0

    for flags, finished in (("--only", "sweep"), 2), (("--model", "dense"), 3), ((), 4):
        ran = _call_there(*command, "--jobs", "2", *flags, bare=bare)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        records = json.loads((tmp_path / "records.json").read_text())
        assert len(records) == finished and all(record["complete"] for record in records.values())
    assert (tmp_path / "records.json").stat().st_size < 100_000
    assert not [*tmp_path.glob("*.png")]

    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "results.json").unlink()
    assert compare.main([*command, "--only", "report"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["waiting"] == 0 and not (tmp_path / "runs").exists()
    assert len([*tmp_path.glob("*.png")]) == 4
    assert "| valid. loss |" in (tmp_path / "results.md").read_text()
    main = {name: records[key] for name, (key,) in results["parts"]["main"].items()}
    assert list(main) == [model.name for model in H100.models]
    plan = Plan(divided("h100", 1000), results["corpus"]["vocab_size"])
    for run in plan.part("main", FIRST):
        record = main[run.model.name]
        assert record["parameters"] == run.parameters and record["flags"] == run.flags
        assert len(record["points"]) == len(record["corpus"]["facts"]) == len(record["seconds"])
        assert record["seconds"] == sorted(record["seconds"]) and record["seconds"][0] > 0
        assert len(record["losses"]) == run.iterations // run.flags["log_interval"]
        assert record["losses"][-1] < record["losses"][0]
        assert record["commit"] and record["command"].endswith(str(run.iterations))
    assert len({record["data_order"] for record in main.values()} - {""}) == 1


def test_a_run_that_is_cut_off_leaves_what_it_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    scale, console = divided("h100", 1000), Console(width=200)
    counts, _ = build(tmp_path / "corpus", scale.corpus, console)
    run = Plan(scale, counts["vocab_size"]).run("main", scale.models[0], 1, MIDDLE)
    run.flags.update(train_iters=10_000, eval_interval=10_000)
    runner = OneProcessRunner(tmp_path, "cpu", 1, float("inf"), console)
    told = runner.folder(run.key) / "told.json"

    def stop_once_it_told() -> None:
        while not told.is_file():
            pass
        runner.deadline = 0.0

    watch = Thread(target=stop_once_it_told)
    watch.start()
    assert not runner.execute("main", [run])
    watch.join()
    (record,) = json.loads((tmp_path / "records.json").read_text()).values()
    assert not record["complete"] and record["flags"] == run.flags
    told_of = len(record["points"])
    assert 0 < told_of == len(record["corpus"]["facts"]) == len(record["losses"]) < 10_000
    assert runner.records([run]) == {}
    assert "was cut off; kept is what it told at" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--scale h100: there is no GPU here; --divide 64 tries it on the CPU, with sizes"),
        (["--only", "sweep"], "--scale h100: there is no GPU here"),
        (["--divide", "0"], "--divide 0: choose more than 0"),
        (["--divide", "64", "--model", "x"], "has dense, memory+ 1m"),
        (["--divide", "64", "--only", "continual"], "has nothing for it; choose main"),
    ],
)
def test_what_cannot_run_here_is_refused_in_one_line(
    flags: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare, "_has_gpu", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        compare.parse_args(["--scale", "h100", *flags])
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_only_what_trains_needs_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_has_gpu", lambda: False)
    for flags in (["--only", "corpus"], ["--only", "report"], ["--list"]):
        assert compare.parse_args(["--scale", "h100", *flags]).scale == H100
    monkeypatch.setattr(compare, "_has_gpu", lambda: True)
    assert compare.parse_args(["--scale", "h100"]).scale == H100
