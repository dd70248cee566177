"""What stands in the README is what results.json says, and only finished results get there."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "facts"
# scripts of one folder import each other by bare name, as they do when run
sys.path.insert(0, str(FOLDER))

import compare  # noqa: E402
import publish  # noqa: E402
from experiment import plots, report  # noqa: E402
from experiment.plan import SCALES, Plan, unique  # noqa: E402
from experiment.runs import Runner, best_rates  # noqa: E402
from rich.console import Console  # noqa: E402

TOLD = publish.published()
RESULTS = [pytest.param(results, id=name) for name, results in TOLD.items()]


def test_the_page_has_the_tables_of_the_results() -> None:
    assert "cpu" in TOLD
    again = "run: python examples/facts/publish.py runs/compare-SCALE"
    assert publish.PAGE.read_text() == publish.page(TOLD), again


@pytest.mark.parametrize("results", RESULTS)
def test_the_results_are_whole(results: dict[str, Any], tmp_path: Path) -> None:
    """Every model at every seed, in one order of data, and every picture."""
    assert results["waiting"] == 0
    scale, groups = results["scale"], report.runs_of(results, "main")
    assert list(groups) == [model.name for model in SCALES[scale["name"]].models]
    # what it stands for is what the scale is now
    for name in ("flags", "memory", "new"):
        assert scale[name] == getattr(SCALES[scale["name"]], name)
    for model in SCALES[scale["name"]].models:
        seeds = SCALES[scale["name"]].seeds_of(model)
        assert [run["seed"] for run in groups[model.name]] == seeds, model.name
    assert "DIFFERS" not in report.markdown(results)
    page = (FOLDER / "README.md").read_text()
    pictures = sorted((publish.RESULTS / scale["name"]).glob("*.png"))
    sizes = {runs[0]["rows"] for runs in groups.values() if runs[0]["rows"]}
    losses = any("losses" in run for runs in groups.values() for run in runs)
    assert len(pictures) == (4 if len(sizes) > 1 else 3) + losses
    assert sorted(plots.draw(results, tmp_path)) == [picture.name for picture in pictures]
    for picture in pictures:
        assert f"({picture.relative_to(FOLDER)})" in page, picture.name


@pytest.mark.parametrize("place", range(len(TOLD)), ids=list(TOLD))
def test_the_headline_divides_by_dense(place: int) -> None:
    results = list(TOLD.values())[place]
    groups = report.runs_of(results, "main")
    rows = {row[0]: row for row in publish.headline(list(TOLD.values())).rows}
    known, ratio = 3 + 2 * place, 4 + 2 * place
    assert {name for name, row in rows.items() if row[known]} == set(groups)
    assert rows["dense"][1] == "1.00" and rows["dense"][ratio] == "**1.0**"
    for name, runs in groups.items():
        facts = mean(report.known(runs))
        assert rows[name][known].startswith(f"{facts:,.0f}")
        by_dense = facts / mean(report.known(groups["dense"]))
        assert rows[name][ratio] == f"**{by_dense:.1f}**"
    told = publish.first_screen([results])
    seeds = len(results["scale"]["seeds"])
    assert f"{seeds} seed" in told and f"--scale {results['scale']['name']}" in told


@pytest.mark.parametrize("results", RESULTS)
def test_a_key_is_a_run_of_the_plan(results: dict[str, Any]) -> None:
    """So --list says what every number was trained with."""
    scale = SCALES[results["scale"]["name"]]
    scale = replace(scale, ablation_seeds=results["scale"]["ablation_seeds"])
    plan = Plan(scale, results["corpus"]["vocab_size"])
    sweep = plan.sweep(compare.PARTS)
    runs = results["runs"]
    best = best_rates(sweep, runs)
    every = unique([*sweep, *(run for part in compare.PARTS for run in plan.part(part, best))])
    planned = {run.key: run for run in every}
    # the plan may have grown since
    assert runs.keys() <= planned.keys()
    for key, told in runs.items():
        run = planned[key]
        assert (told["parameters"], told["table_parameters"]) == (run.parameters, run.table)
        assert (told["lr"], told["flops_per_token"]) == (run.flags["lr"], run.flops)


@pytest.mark.parametrize("results", RESULTS)
def test_published_runs_are_finished_where_they_are_restored(
    results: dict[str, Any], tmp_path: Path
) -> None:
    """So that models can be added to a scale: the report of what is restored is what is published.

    The keys are in the plan (test_a_key_is_a_run_of_the_plan), so no run is left out.
    """
    name = results["scale"]["name"]
    assert publish.main([str(tmp_path), "--restore", name]) == 0
    scale = replace(SCALES[name], ablation_seeds=results["scale"]["ablation_seeds"])
    plan = Plan(scale, results["corpus"]["vocab_size"])
    runner = Runner(tmp_path, "cpu", 1, 0.0, Console(quiet=True))
    sweep = plan.sweep(compare.PARTS)
    best = best_rates(sweep, runner.records(sweep))
    planned = [*sweep, *(run for part in compare.PARTS for run in plan.part(part, best))]
    counts = {"facts_real": results["corpus"]["facts"], "facts_generated": 0}
    told = {"bits": "answer_bits", "tokens": "tokens_train", "vocab_size": "vocab_size"}
    counts |= {key: results["corpus"][name] for name, key in told.items()}
    again = json.loads(json.dumps(report.collect(scale, counts, planned, runner.records(planned))))
    assert again["runs"] == results["runs"] and again["made_with"] == results["made_with"]
    for part, groups in results["parts"].items():
        for model, keys in groups.items():
            assert again["parts"][part][model] == keys, model


def test_runs_of_several_devices_are_not_restored(tmp_path: Path) -> None:
    results = {**TOLD["cpu"], "made_with": {**TOLD["cpu"]["made_with"], "device": ["a", "b"]}}
    with pytest.raises(ValueError, match="the runs of cpu differ in device"):
        publish.restore(results, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_record_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (key, *_) = TOLD["cpu"]["runs"]
    path = tmp_path / "runs" / key / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert key in publish.restore(TOLD["cpu"], tmp_path) and path.read_text() == "{}"


def test_only_what_is_between_the_markers_changes() -> None:
    page = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n"
    assert publish.rewrite(page, "x", "new") == page.replace("old", "new")
    for broken in ("a", "<!-- x: begin -->", "<!-- x: end --><!-- y: begin -->"):
        with pytest.raises(ValueError, match="put both where the table belongs"):
            publish.rewrite(broken, "x", "new")


def test_what_is_not_finished_is_not_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = publish.PAGE.read_text()
    assert publish.main([str(tmp_path)]) == 2
    assert "no results.json; run compare.py" in capsys.readouterr().err
    told = {"scale": {"name": "cpu", "ablation_seeds": 2}, "waiting": 3}
    (tmp_path / "results.json").write_text(json.dumps(told))
    assert publish.main([str(tmp_path)]) == 2
    again = "python examples/facts/compare.py --scale cpu --ablation-seeds 2 --output"
    assert f"3 runs are not finished; {again} {tmp_path}" in capsys.readouterr().err
    assert publish.PAGE.read_text() == before
