"""Verdicts of the part for Transformer Engine.

tests/megatron/test_transformer_engine.py tests its command lines where Transformer Engine is
installed.
"""

import inspect
from pathlib import Path

import pytest

from tests.gpu import transformer_engine as part
from tests.gpu.engine_run import LINEARS, MEMORIES
from tests.gpu.report import Report
from tests.gpu.training_runs import Log, Run

ITERATION = (
    " iteration {n}/ 8 | consumed samples: {n} | elapsed time per iteration (ms): 9.0 |"
    " learning rate: 1.0E-03 | global batch size: 8 | lm loss: {loss} | loss scale: 1.0 |"
    " grad norm: 1.000 |"
)
BF16 = "torch.bfloat16"
CASE = part.Case("case", ())
LIKE = part.Case("other", (), like="case", tolerance=0.01)


def said(linears: str = BF16, table: str = BF16) -> str:
    return f"{LINEARS}: {linears}\n{MEMORIES}: {BF16}, table {table}, read-out {BF16}\n"


def log(losses: list[object], first: int = 1, says: str = "", statuses: tuple = (0,)) -> Log:
    lines = [ITERATION.format(n=first + at, loss=loss) for at, loss in enumerate(losses)]
    stdout = (says or said()) + "\n".join(lines) + "\n"
    given = {"run": Run("run", 1, ()), "statuses": list(statuses), "stdout": stdout}
    given |= {"seconds": 1.0, "ended_at": [1.0], "error_at": None}
    return Log(**{name: given[name] for name in inspect.signature(Log).parameters if name in given})


@pytest.mark.parametrize(
    ("case", "found", "like", "wrong"),
    [
        pytest.param(CASE, log([7, 6, 5]), None, "", id="trains"),
        pytest.param(CASE, log([7, 6, 7]), None, "did not fall", id="does not"),
        pytest.param(CASE, log([]), None, "no loss", id="silent"),
        pytest.param(CASE, log([7, 6, "nan"]), None, "did not fall", id="no number"),
        pytest.param(
            CASE, log([7, 6, 5], statuses=(1,)), None, "ended with status [1]", id="failed"
        ),
        pytest.param(CASE, log([7, 6, 5], says=said("torch.float32")), None, "linears", id="wide"),
        pytest.param(CASE, log([7, 6, 5], says=said(table="x")), None, "memories", id="table"),
        pytest.param(CASE, log([7, 6, 5], says="nothing\n"), None, "linears", id="unseen"),
        pytest.param(LIKE, log([7, 6.6, 5.04]), log([7, 6.5, 5]), "", id="close"),
        pytest.param(LIKE, log([7, 1, 5]), log([7, 6.5, 5]), "", id="the second is a mean"),
        pytest.param(LIKE, log([7, 6, 5.06]), log([7, 6, 5]), "not those of case", id="apart"),
        pytest.param(LIKE, log([7, 6, 5]), log([], statuses=(1,)), "not those of", id="no other"),
    ],
)
def test_verdicts(case, found, like, wrong) -> None:
    verdict = part.verdict(case, found, like)["verdict"]
    assert wrong in verdict if wrong else verdict == "passed"


def test_fp8_has_to_be_seen_in_linears_and_not_in_memories() -> None:
    case = part.Case("case", (), precision=part.IN_FP8["delayed"])
    assert part.verdict(case, log([7, 6, 5]), None)["verdict"] != "passed"
    seen = said(part.IN_FP8["delayed"])
    assert part.verdict(case, log([7, 6, 5], says=seen), None)["verdict"] == "passed"


def test_every_case_gets_a_row_after_what_it_waits_for(monkeypatch, tmp_path) -> None:
    started: list[str] = []

    def launch(run: Run, folder: Path, timeout: float) -> Log:
        words = list(map(str, run.words))
        if "--load" in words:
            # the run that saved the checkpoint has ended
            assert Path(words[words.index("--load") + 1]).name in started
        started.append(run.name)
        case = next(case for case in part.CASES if case.name == run.name)
        return log([7, 6, 5], first=5 if case.loads else 1, says=said(case.precision))

    monkeypatch.setattr(part, "launch", launch)
    rows = part._trained(Report("te", tmp_path, 1), tmp_path / "te")
    assert [row["name"] for row in rows] == [case.name for case in part.CASES]
    assert sorted(started) == sorted(case.name for case in part.CASES)
    names = [case.name for case in part.CASES]
    for at, case in enumerate(part.CASES):
        assert all(name in names[:at] for name in (case.like, case.loads) if name)
