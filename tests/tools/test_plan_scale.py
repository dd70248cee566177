"""The table of plans in examples/README.md, and what the text beside it says."""

import re

import pytest

from megamem.__main__ import parse
from megamem.planner.cost import layout_cost
from megamem.planner.plan import all_costs, fastest
from megamem.spec import Grid, Layout
from megamem.tools import plan_scale
from megamem.tools.plan import job_from_args
from tests.helpers.megatron_runs import ROOT

README = (ROOT / "examples/README.md").read_text()


def test_the_table_is_that_of_the_planner() -> None:
    assert plan_scale.rewrite(README) == README


@pytest.mark.parametrize(("model", "tensor_ranks"), [("1.3b", "1"), ("8b", "8")])
def test_jobs_are_those_of_the_presets(model: str, tensor_ranks: str) -> None:
    words = ("--preset", model, "--memory-num-keys", "4096", "--world-size", "64")
    asked = job_from_args(parse("plan", [*words, "--tensor-model-parallel-size", tensor_ranks]))
    job = plan_scale.job_of(model, 4096, 64)
    assert job.cluster.batch == asked.cluster.batch
    best, wanted = (fastest(each, all_costs(each)) for each in (job, asked))
    assert best is not None and wanted is not None
    assert (best.layout, best.pieces, best.sent) == (wanted.layout, wanted.pieces, wanted.sent)
    assert best.seconds["h100"] == wanted.seconds["h100"]


def test_the_aim_and_what_is_reached() -> None:
    """The numbers of the text are those of the two grids that it names."""
    text = README.partition("**The table of 128 billion parameters")[2].partition("\n\n")[0]
    said = [float(number) for number in re.findall(r"(?<![\dx])\d[\d,]*", text.replace(",", ""))]
    job = plan_scale.job_of("1.3b", 8192, 128)
    before, now = (
        layout_cost(job.in_pieces(pieces), Layout.of_grid(grid)).seconds["h100"]
        for grid, pieces in ((Grid(16, 1, 1, 8), 1), (Grid(2, 8, 8, 1), 4))
    )
    rest = now.table - now.exchange
    keys = sum(s.per_step for s in now.stages if s.name.startswith("product keys"))
    (gradient,) = (s.per_step for s in now.stages if s.name == "row gradient")
    for seconds in (
        *(before.inside + before.across, before.table + before.dense, before.table),
        *(now.inside + now.across, now.hidden, now.table, now.table + now.dense),
        *(rest, keys, gradient, before.across, now.across),
    ):
        assert round(seconds * 1e3) in said, (seconds, said)
    for share in (before.share, now.share, rest / (rest + now.dense)):
        assert round(share * 100) in said, (share, said)
