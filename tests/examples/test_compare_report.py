"""What the comparison makes of logs and probes: numbers that can be checked by hand."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "facts"
# scripts of one folder import each other by bare name, as they do when run
sys.path.insert(0, str(FOLDER))

from build_corpus import Report  # noqa: E402
from corpus import RelationCount  # noqa: E402
from experiment import logs, plots, records, report, scales  # noqa: E402
from experiment.plan import Plan  # noqa: E402

LINE = (
    " [2026-01-01 00:00:00] iteration {n:8d}/     100 | consumed samples: 1 | elapsed time per "
    "iteration (ms): {ms} | learning rate: 1E-03 | lm loss: {loss:E} | grad norm: 1.0 |\n"
)


def _scores(*rows: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [
        {"relation": name, "asked": asked, "right": right, "accuracy": right / asked}
        for name, asked, right in rows
    ]


PROBE = {
    "iteration": 5,
    "phrasing": "question",
    # of two relations, 30 of 100 and 60 of 100 right; 1 of 20 and 4 of 20 guessed
    "scores": _scores(("a", 100, 30), ("b", 100, 60)),
    "control": _scores(("a", 20, 1), ("b", 20, 4)),
}


def test_known_facts_are_those_beyond_guessing() -> None:
    found = records.known(PROBE, facts=1000, bits_by_relation={"a": 800.0, "b": 200.0})
    assert found.accuracy == pytest.approx(0.45) and found.guessing == pytest.approx(0.125)
    assert found.facts == pytest.approx(325)
    # (0.30 - 0.05) * 800 + (0.60 - 0.20) * 200
    assert found.bits == pytest.approx(280)


def test_a_relation_without_control_is_guessed_like_the_others() -> None:
    probe = {**PROBE, "control": _scores(("a", 20, 1))}
    found = records.known(probe, facts=1000, bits_by_relation={"a": 800.0, "b": 200.0})
    assert found.guessing == pytest.approx(0.05)
    assert found.bits == pytest.approx(0.25 * 800 + 0.55 * 200)
    assert records.known(probe, facts=10, bits_by_relation=None).bits is None
    # without any, nothing is taken off
    assert records.known({**PROBE, "control": []}, 1000, None).facts == pytest.approx(450)


def test_a_log_of_one_start() -> None:
    text = "".join(LINE.format(n=n, ms=ms, loss=n / 10) for n, ms in ((10, 90), (20, 20), (30, 40)))
    text += "max allocated: 12.5 | max allocated: 3.0\n"
    text += " validation loss at iteration 30 on validation set | lm loss value: 2.5E+00 |\n"
    text += " > number of parameters on (tensor, pipeline) model parallel rank (0, 0): 4321\n"
    log = logs.read(text)
    assert [(p.iteration, p.loss) for p in log.points] == [(10, 1.0), (20, 2.0), (30, 3.0)]
    assert [log.seconds_at(n) for n in (10, 20, 30, 40)] == pytest.approx([0.9, 1.1, 1.5, None])
    # the first logged iterations are warm-up
    assert log.ms_per_iteration == 30
    assert (log.validation_loss, log.parameters, log.allocated) == (2.5, 4321, int(12.5 * 2**20))
    assert logs.last_iteration(text) == (30, 3.0)


def test_a_log_of_two_starts() -> None:
    """What was trained after the checkpoint and lost does not count; its repetition does."""
    first = [(10, 20), (20, 20), (30, 20)]
    second = [(20, 90), (30, 40), (40, 40)]
    text = "".join(LINE.format(n=n, ms=ms, loss=1) for n, ms in first)
    text += "".join(LINE.format(n=n, ms=ms, loss=2) for n, ms in second)
    log = logs.read(text)
    assert [p.iteration for p in log.points] == [10, 20, 30, 40]
    assert [p.loss for p in log.points] == [1, 2, 2, 2]
    assert log.seconds_at(40) == pytest.approx(0.2 + 0.9 + 0.4 + 0.4)
    # the first of the second start is warm-up too
    assert log.ms_per_iteration == 30
    # while the second start has not come as far as the first one, that is void
    text = "".join(LINE.format(n=n, ms=20, loss=1) for n in (10, 20, 30, 25))
    log = logs.read(text)
    assert [p.iteration for p in log.points] == [10, 20, 25]
    assert log.seconds_at(25) == pytest.approx(0.5)


def test_nothing_logged_is_nothing_known() -> None:
    log = logs.read("Traceback ...")
    assert log.points == () and log.ms_per_iteration is None and logs.last_iteration("") is None


def _record(run: Any, facts: float, old: float | None = None) -> dict[str, Any]:
    def probes(known: float, phrasing: str) -> list[dict[str, Any]]:
        return [
            {
                "iteration": at * 10,
                "tokens": at * 1000,
                "seconds": at * 2.0,
                "phrasing": phrasing,
                "accuracy": known * at / 200 + 0.1,
                "guessing": 0.1,
                "facts": known * at / 2,
                "bits": known * at * 5,
            }
            for at in (1, 2)
        ]

    corpora = {run.corpus: facts} | ({"corpus": old} if old is not None else {})
    return {
        "key": run.key,
        "model": run.model.name,
        "family": run.model.family,
        "seed": run.seed,
        "rates": list(run.rates),
        "flags": run.flags,
        "start": run.start,
        "commit": "abc",
        "device": "CPU",
        "torch": "2",
        "megatron-core": "0",
        "megamem": "0",
        "rows": run.model.rows,
        "parameters": run.parameters,
        "parameters_of_tables": run.table,
        "flops_per_token": run.flops,
        "tokens_per_second": 1000.0 if run.model.family == "dense" else 500.0,
        "peak_bytes": 3 * 2**20,
        "validation_loss": 2.0,
        "data_order": f"order of seed {run.seed}",
        "probes": {
            name: probes(known, "question") + probes(known / 2, "unseen")
            for name, known in corpora.items()
        },
    }


DEEPER = ("6 layers, memories 2", "6 layers, memories 4")
LONGER = ("adamw, twice the steps", "lazy_adamw, twice the steps")


@pytest.fixture
def results() -> dict[str, Any]:
    changed = {
        "ablations": ("no gate", "lazy_adamw", *DEEPER, *LONGER),
        "ablation_seeds": 2,
        "deep": 6,
        "deep_layers": ((1, 4), (1, 2, 3, 4)),
    }
    scale = scales.choose(
        "smoke", families=scales.FAMILIES, seeds=(1, 2, 3), keys=(16, 32, 64), **changed
    )
    plan = Plan(scale, 500, "corpus")
    best = dict.fromkeys(scales.FAMILIES, (1.0, 1.0))
    main, ablations = plan.main(best), plan.ablations(best)
    trained, *taught = plan.continual(best)
    known = {"dense": 10.0, "dense 2x": 20.0, "moe": 15.0, "peer": 30.0, "memory": 35.0}
    found = {
        run.key: _record(run, known.get(run.model.family, 40.0) + run.model.rows / 100 + run.seed)
        for run in [*main, *ablations]
    }
    found |= {run.key: _record(run, facts=12.0, old=17.08) for run in taught}
    relations = (RelationCount("a", 40, 9, 99.0, "uniform"),)
    counts = Report(1, 1, 1, 1, 500, 40, 40, 0, 99.0, relations)
    planned = [*main, *ablations, trained, *taught]
    return report.collect(scale, counts, planned, found)


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
    ablation = report.ablation_sheet(results)
    base, *others = ablation.rows
    assert base[3] == "52 +- 1" and base[-1] == "3" and len(others) == 2
    # 51.24 and 52.24 of two seeds, beside the first row at the seeds that both have
    assert all(row[3:5] == ("52 +- 1", "+0.0%") for row in others)
    assert [row[-1] for row in others] == ["2", "3"]
    # a deeper model is compared with those as deep
    assert [row[0] for row in ablation.rows] == ["memory+ 1k", "no gate", "lazy_adamw"]
    deeper = report.depth_sheet(results)
    assert [row[0] for row in deeper.rows] == list(DEEPER)
    assert len({row[1] for row in deeper.rows}) == 2 and deeper.rows[1][4] == "+0.0%"
    # and a longer run with those as long
    longer = report.longer_sheet(results)
    assert [row[0] for row in longer.rows] == list(LONGER) and longer.rows[1][4] == "+0.0%"
    alone = [run for run in results["runs"] if run["model"] != LONGER[1]]
    (row,) = report.longer_sheet({**results, "runs": alone}).rows
    assert row[0] == LONGER[0] and row[4] == ""
    # 51.24 facts were known, 17.08 still are
    (taught,) = report.continual_sheet(results).rows
    assert taught[1:] == ("12", "6", "17", "34 (66.7%)")
    curve = report.curve_sheet(results)
    assert curve.columns == ("model", "1,000", "2,000") and curve.rows[0][1] == "6 +- 0"


def test_an_unequal_order_of_data_is_shouted(results: dict[str, Any]) -> None:
    results["runs"][0]["data_order"] = "another"
    assert "ORDER OF THE DATA DIFFERS" in report.markdown(results)


def test_unfinished_runs_are_counted_not_shown(results: dict[str, Any]) -> None:
    results["runs"] = [run for run in results["runs"] if run["model"] != "dense"]
    results["waiting"] = 2
    text = report.markdown(results)
    assert "2 runs of the plan are not finished yet" in text and "| dense |" not in text
    # without dense there is nothing to compare speeds with
    assert report.main_sheet(results).rows[0][5] == ""


def test_every_picture_is_drawn(results: dict[str, Any], tmp_path: Path) -> None:
    names = plots.draw(results, tmp_path)
    assert sorted(names) == [
        *("bits_per_parameter.png", "facts_by_rows.png", "facts_by_time.png"),
        "facts_by_tokens.png",
    ]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    one_size = [run for run in results["runs"] if run["rows"] in (0, 1024)]
    assert len({run["model"] for run in one_size}) > 3
    assert sorted(plots.draw({**results, "runs": one_size}, tmp_path)) == sorted(
        set(names) - {"facts_by_rows.png"}
    )
    assert plots.draw({**results, "runs": []}, tmp_path) == []


def test_results_can_be_read_back(results: dict[str, Any], tmp_path: Path) -> None:
    report.write(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (
        report.markdown(json.loads((tmp_path / "results.json").read_text()))
        == (tmp_path / "results.md").read_text()
    )
