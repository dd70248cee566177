"""What the comparison makes of logs and probes: numbers that can be checked by hand."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

FOLDER = Path(__file__).parents[2] / "examples" / "facts"
# scripts of one folder import each other by bare name, as they do when run
sys.path.insert(0, str(FOLDER))

from experiment import plots, report, runs  # noqa: E402
from experiment.plan import TABLES, Plan, Run, read_scale  # noqa: E402


def _scores(*rows: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [
        {"relation": name, "asked": asked, "right": right, "accuracy": right / asked}
        for name, asked, right in rows
    ]


def _probe(scores: list[dict[str, Any]], control: list[dict[str, Any]]) -> dict[str, Any]:
    sums = [
        {name: sum(row[name] for row in rows) for name in ("asked", "right")}
        for rows in (scores, control)
        if rows
    ]
    totals = [{**row, "accuracy": row["right"] / row["asked"]} for row in sums]
    return {
        "iteration": 5,
        "phrasing": "question",
        "scores": scores,
        "control": control,
        "totals": totals,
    }


# of two relations, 30 of 100 and 60 of 100 right; 1 of 20 and 4 of 20 guessed
SCORES = _scores(("a", 100, 30), ("b", 100, 60))
PROBE = _probe(SCORES, _scores(("a", 20, 1), ("b", 20, 4)))


def test_known_facts_are_those_beyond_guessing() -> None:
    found = runs.known(PROBE, facts=1000, bits_by_relation={"a": 800.0, "b": 200.0})
    # (0.30 - 0.05) * 800 + (0.60 - 0.20) * 200 bits
    assert found == {"accuracy": 0.45, "guessing": 0.125, "facts": 325.0, "bits": 280.0}


def test_a_relation_without_control_is_guessed_like_the_others() -> None:
    probe = _probe(SCORES, _scores(("a", 20, 1)))
    found = runs.known(probe, facts=1000, bits_by_relation={"a": 800.0, "b": 200.0})
    assert found["guessing"] == 0.05
    assert found["bits"] == pytest.approx(0.25 * 800 + 0.55 * 200)
    assert runs.known(probe, facts=10, bits_by_relation=None)["bits"] is None
    # without any, nothing is taken off
    assert runs.known(_probe(SCORES, []), 1000, None)["facts"] == 450.0


def _log(folder: Path, start: str, *points: tuple[int, float]) -> None:
    """The events of one start of a training."""
    with SummaryWriter(str(folder), filename_suffix=start) as writer:
        for iteration, seconds in points:
            writer.add_scalar("iteration-time", seconds, iteration)
            writer.add_scalar("lm loss", iteration / 10, iteration)


def test_events_of_one_start(tmp_path: Path) -> None:
    assert runs.read_events(tmp_path) == {}
    _log(tmp_path, "1", (10, 0.09), (20, 0.02), (30, 0.04))
    events = runs.read_events(tmp_path)
    assert events["lm loss"] == {10: 1.0, 20: 2.0, 30: 3.0}
    times = events["iteration-time"]
    seconds = [runs.seconds_at(iteration, times) for iteration in (0, 10, 20, 30)]
    assert seconds == [0, 0.9, 1.1, 1.5]


def test_events_of_two_starts(tmp_path: Path) -> None:
    """What was trained after the checkpoint and lost does not count; its repetition does."""
    _log(tmp_path, "1", (10, 0.02), (20, 0.02), (30, 0.02))
    assert len(runs.read_events(tmp_path)["iteration-time"]) == 3
    # a later start has a later file
    time.sleep(1.1)
    _log(tmp_path, "2", (20, 0.09), (30, 0.04), (40, 0.04))
    times = runs.read_events(tmp_path)["iteration-time"]
    assert times == pytest.approx({10: 0.02, 20: 0.09, 30: 0.04, 40: 0.04})
    assert runs.seconds_at(40, times) == pytest.approx(0.2 + 0.9 + 0.4 + 0.4)
    # an interval of which nothing was logged counts as the one after it
    assert runs.seconds_at(40, {10: 0.02, 40: 0.04}) == pytest.approx(0.2 + 1.2)


def _record(run: Run, facts: float, old: float | None = None) -> dict[str, Any]:
    def asked(known: float) -> dict[str, Any]:
        return {
            "facts": [known / 2, known],
            "unseen": known / 2,
            "accuracy": known / 100 + 0.1,
            "guessing": 0.1,
            "bits": known * 10,
        }

    corpora = {run.corpus: facts} | ({"corpus": old} if old is not None else {})
    return {
        "family": run.model.family,
        "seed": run.seed,
        "flags": run.flags,
        "lr": run.flags["lr"],
        "memory_lr": run.flags.get("memory_lr"),
        "layers": run.flags["num_layers"],
        "iterations": run.iterations,
        "commit": "abc",
        "device": "CPU",
        "torch": "2",
        "megatron-core": "0",
        "megamem": "0",
        "rows": run.model.rows,
        "parameters": run.parameters,
        "table_parameters": run.table,
        "flops_per_token": run.flops,
        "tokens_per_second": 1000.0 if run.model.family == "dense" else 500.0,
        "peak_bytes": 3 * 2**20,
        "validation_loss": 2.0,
        "data_order": f"order of seed {run.seed}",
        "points": [10, 20],
        "seconds": [2.0, 4.0],
        **{name: asked(known) for name, known in corpora.items()},
    }


DEEPER = ("6 layers, memories 2", "6 layers, memories 4")
LONGER = ("adamw, twice the steps", "lazy_adamw, twice the steps")


FAMILIES = ("dense", "dense 2x", "moe", "peer", "memory", "memory+")


@pytest.fixture
def results() -> dict[str, Any]:
    one = {"memory_layers": [1]}
    models: dict[str, dict[str, Any]] = {
        "dense": {"family": "dense"},
        "dense 2x": {"family": "dense 2x", "flops": 2},
        "moe 8": {"family": "moe"},
        "peer": {"family": "peer", "memory_variant": "peer", "memory_num_keys": 22, **one},
        "memory 1k": {"family": "memory", "memory_variant": "memory", **one},
        "memory+ 0.25k": {"memory_num_keys": 16},
        "memory+ 1k": {},
        "memory+ 4k": {"memory_num_keys": 64},
    }
    chosen = ("no gate", "lazy_adamw", *LONGER)
    ablations = {name: TABLES["cpu"]["ablations"][name] for name in chosen}
    deeper = {
        name: {"num_layers": 6, "memory_layers": layers}
        for name, layers in zip(DEEPER, ([1, 4], [1, 2, 3, 4]), strict=True)
    }
    own = {**TABLES["smoke"], "models": models, "ablations": {**ablations, **deeper}}
    scale = read_scale("smoke", TABLES["cpu"], {**own, "seeds": [1, 2, 3], "ablation_seeds": 2})
    plan = Plan(scale, 500)
    best = dict.fromkeys(FAMILIES, (1.0, 1.0))
    main, changed = plan.part("main", best), plan.part("ablations", best)
    trained, *taught = plan.part("continual", best)
    known = {"dense": 10.0, "dense 2x": 20.0, "moe": 15.0, "peer": 30.0, "memory": 35.0}
    found = {
        run.key: _record(run, known.get(run.model.family, 40.0) + run.model.rows / 100 + run.seed)
        for run in [*main, *changed]
    }
    found |= {run.key: _record(run, facts=12.0, old=17.08) for run in taught}
    counts = {"facts_real": 40, "facts_generated": 0, "answer_bits": 99.0}
    counts |= {"tokens_train": 1, "vocab_size": 500}
    return report.collect(scale, counts, [*main, *changed, trained, *taught], found)


def _only(results: dict[str, Any], *models: str) -> dict[str, Any]:
    """Without the runs of other models."""
    parts = {
        part: {name: keys for name, keys in groups.items() if name in models}
        for part, groups in results["parts"].items()
    }
    return {**results, "parts": parts}


def test_tables_say_what_the_records_do(results: dict[str, Any]) -> None:
    text = report.markdown(results)
    main = report.main_sheet(results)
    dense, grown = main.rows[0], main.rows[-1]
    # 11, 12 and 13 facts of three seeds; asked in unseen words, half
    assert dense[0] == "dense" and "12 +- 1" in dense and "6 +- 0" in dense
    assert dense[5] == "1.00" and grown[5] == "0.50" and dense[6] == "3"
    # 40 + 40.96 facts and the seed
    assert grown[0] == "memory+ 4k" and grown[1] == "4,096" and "83 +- 1" in grown
    assert "same sequences in the same order" in text and "DIFFERS" not in text
    ablation, longer, deeper = report.ablation_sheets(results)
    base, *others = ablation.rows
    assert base[3] == "52 +- 1" and base[-1] == "3" and len(others) == 2
    # 51.24 and 52.24 of two seeds, beside the first row at the seeds that both have
    assert all(row[3:5] == ("52 +- 1", "+0.0%") for row in others)
    assert [row[-1] for row in others] == ["2", "3"]
    # a deeper model is compared with those as deep
    assert [row[0] for row in ablation.rows] == ["memory+ 1k", "no gate", "lazy_adamw"]
    assert [row[0] for row in deeper.rows] == list(DEEPER)
    assert len({row[1] for row in deeper.rows}) == 2 and deeper.rows[1][4] == "+0.0%"
    # and a longer run with those as long
    assert [row[0] for row in longer.rows] == list(LONGER) and longer.rows[1][4] == "+0.0%"
    (row,) = report.ablation_sheets(_only(results, "memory+ 1k", LONGER[0]))[1].rows
    assert row[0] == LONGER[0] and row[4] == ""
    # 51.24 facts were known, 17.08 still are
    (taught,) = report.continual_sheet(results).rows
    assert taught[1:] == ("12", "6", "17", "34 (66.7%)")
    curve = report.curve_sheet(results)
    # of 8 x 64 tokens a step
    assert curve.columns == ("model", "5,120", "10,240") and curve.rows[0][1] == "6 +- 0"


def test_a_few_facts_have_no_percentages(results: dict[str, Any]) -> None:
    for run in results["runs"].values():
        run["corpus"]["facts"] = [known / 10 for known in run["corpus"]["facts"]]
    base, *others = report.ablation_sheets(results)[0].rows
    assert {row[4] for row in others} == {"+0 facts"} and base[3] == "5 +- 0"
    (taught,) = report.continual_sheet(results).rows
    assert taught[-1] == "3"


def test_an_unequal_order_of_data_is_shouted(results: dict[str, Any]) -> None:
    next(iter(results["runs"].values()))["data_order"] = "another"
    assert "ORDER OF THE DATA DIFFERS" in report.markdown(results)


def test_unfinished_runs_are_counted_not_shown(results: dict[str, Any]) -> None:
    results = _only(results, "moe 8", "memory 1k")
    results["waiting"] = 2
    text = report.markdown(results)
    assert "2 runs of the plan are not finished yet" in text and "| dense |" not in text
    # without dense there is nothing to compare speeds with
    assert report.main_sheet(results).rows[0][5] == ""


def test_models_without_times_have_no_speed(results: dict[str, Any], tmp_path: Path) -> None:
    """Their losses and facts are shown, and the picture of times leaves them out."""
    rows = report.main_sheet(results).rows
    assert report.UNTIMED not in report.markdown(results) and rows[2][5] == "0.50"
    for run in report.runs_of(results, "main")["moe 8"]:
        run["tokens_per_second"] = run["seconds"] = None
    after = report.main_sheet(results).rows
    assert after[2][0] == "moe 8" and after[2][5] == ""
    assert [row for row in after if row[0] != "moe 8"] == [r for r in rows if r[0] != "moe 8"]
    assert after[2][7:] == rows[2][7:] and report.UNTIMED in report.markdown(results)
    times: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        line = plots._line
        patch.setattr(plots, "_line", lambda *of: (times.append(of[2]), line(*of)))
        assert "facts_by_time.png" in plots.draw(results, tmp_path)
    assert times.count("moe 8") == 1 and times.count("dense") == 2
    # times are in units of those of dense
    for run in report.runs_of(results, "main")["dense"]:
        run["tokens_per_second"] = run["seconds"] = None
    assert {row[5] for row in report.main_sheet(results).rows} == {""}
    assert "facts_by_time.png" not in plots.draw(results, tmp_path)


def test_every_picture_is_drawn(results: dict[str, Any], tmp_path: Path) -> None:
    names = plots.draw(results, tmp_path)
    assert sorted(names) == [
        *("bits_per_parameter.png", "facts_by_rows.png", "facts_by_time.png"),
        "facts_by_tokens.png",
    ]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    one_size = _only(results, "dense", "moe 8", "memory 1k", "memory+ 1k")
    assert sorted(plots.draw(one_size, tmp_path)) == sorted(set(names) - {"facts_by_rows.png"})
    assert plots.draw(_only(results), tmp_path) == []


def test_results_can_be_read_back(results: dict[str, Any], tmp_path: Path) -> None:
    report.write(results, tmp_path)
    lines = (tmp_path / "results.json").read_text().splitlines()
    # a line a run
    assert sum('"validation_loss": 2.0' in line for line in lines) == len(results["runs"]) > 20
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (
        report.markdown(json.loads((tmp_path / "results.json").read_text()))
        == (tmp_path / "results.md").read_text()
    )
