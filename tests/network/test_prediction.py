"""What tests/network.sh compares its measurements with, and how it reads and judges them.

The measurements themselves take minutes and root: `bash tests/network.sh`.
"""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.network.cases import CASES, LAYOUTS, Case, Sizes
from tests.network.hosts import ROOT, sent_bytes
from tests.network.prediction import Rates, rate_key, seconds, way
from tests.network.report import Row, problems, rows_of
from tests.network.training import Training, difference, steps_in

KEYS = [
    rate_key(link, kind, ranks)
    for link in ("across", "inside")
    for kind in ("all-to-all", "all-gather")
    for ranks in (2, 4)
]
ONE_TOKEN = Sizes(tokens=1)


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        # 128 lookups of 7 bytes across and 8 inside, rows of 4096 bytes
        pytest.param(
            Case("A", LAYOUTS["A"]),
            # to 3 nodes of 4: 96 lookups, 3 counts, 3 sums; for 2 columns: all, 4 counts, half
            (96 * 7 + 3 + 3 * 4096, 128 * 8 + 4 + 2048),
            (96 * 4 + 3 * 4096, 128 * 4 + 2048),
            id="A",
        ),
        pytest.param(
            Case("B", LAYOUTS["B"]),
            # to the other row: 64 lookups, a count, 4 slices of 1024 x 1; to 3 nodes: all, 2 counts
            (3 * 128 * 7 + 3 * 2 + 3072, 64 * 8 + 1 + 4096),
            (3 * 128 * 4 + 3072, 64 * 4 + 4096),
            id="B",
        ),
        pytest.param(
            Case("C2", LAYOUTS["C2"]),
            (3 * 128 * 7 + 3072, 4 * 128 * 8 + 2048),
            (3 * 128 * 4 + 3072, 4 * 128 * 4 + 2048),
            id="C2",
        ),
        pytest.param(
            Case("A", LAYOUTS["A"], wire="allgather"),
            (3 * 128 * 7 + 3 * 4096, 4 * 128 * 8 + 2048),
            (3 * 128 * 4 + 3 * 4096, 4 * 128 * 4 + 2048),
            id="A, allgather",
        ),
        pytest.param(
            Case("both", (2, 2, 1, 2)),
            # to a node of other rows: 64 lookups, a count, a sum; to one of other columns: all, 2
            # counts, half a sum; inside 2 nodes' lookups and counts, half a sum
            (64 * 7 + 1 + 4096 + 128 * 7 + 2 + 2048, 2 * 128 * 8 + 4 + 2048),
            (64 * 4 + 4096 + 128 * 4 + 2048, 2 * 128 * 4 + 2048),
            id="rows and columns across",
        ),
        pytest.param(
            Case("mixed", (2, 2, 2, 1)),
            # to the other row inside: 64 lookups, a count and a sum for either node
            (64 * 7 + 2 + 4096 + 128 * 7 + 4 + 2048, 64 * 8 + 2 + 2 * 4096),
            (64 * 4 + 4096 + 128 * 4 + 2048, 64 * 4 + 2 * 4096),
            id="rows and columns across, rows inside",
        ),
    ],
)
def test_bytes_of_a_token(case: Case, forward: tuple, backward: tuple) -> None:
    hops = way(case, ONE_TOKEN)
    for direction, wanted in (("forward", forward), ("backward", backward)):
        sent = tuple(hops.host_bytes(link, direction) for link in ("across", "inside"))
        # two ranks to a host
        assert sent == tuple(2 * number for number in wanted), direction


def _rates(across: float, inside: float, latency: float = 0.0) -> Rates:
    return Rates(
        {key: across if "across" in key else inside for key in KEYS},
        dict.fromkeys(KEYS, latency),
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_piece_takes_its_hops_one_after_the_other(name: str) -> None:
    case, sizes = Case(name, LAYOUTS[name]), Sizes(bag_seconds=3.0)
    found = seconds(case, sizes, _rates(20e6, 500e6))
    for direction, took in zip(("forward", "backward"), found, strict=True):
        hops = way(case, sizes)
        across, inside = (hops.host_bytes(link, direction) for link in ("across", "inside"))
        assert took == pytest.approx(3.0 + across / 20e6 + inside / 500e6)


def test_a_hop_takes_its_latency_once() -> None:
    case, sizes = Case("C2", LAYOUTS["C2"]), Sizes()
    found = [seconds(case, sizes, _rates(20e6, 500e6, latency)) for latency in (0.0, 0.1)]
    # lookups across and inside, sums across and inside
    assert [late - soon for soon, late in zip(*found, strict=True)] == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("bag", [0.05, 0.3, 2.0])
def test_pieces_hide_time_but_no_more_than_there_is(name: str, bag: float) -> None:
    sizes, rates = Sizes(bag_seconds=bag), _rates(20e6, 500e6)
    one, four = (seconds(Case(name, LAYOUTS[name], pieces), sizes, rates) for pieces in (1, 4))
    hops = way(Case(name, LAYOUTS[name]), sizes)
    for direction, whole, cut in zip(("forward", "backward"), one, four, strict=True):
        busiest = max(bag, hops.host_bytes("across", direction) / 20e6)
        assert busiest < cut < whole, direction


COUNTERS = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo
    lo: 2004123    1200    0    0    0     0          0         0  2004999    1200    0    0    0
  eth0:12413987    9000    1    2    3     4          5         6 12452001    9100    0    0    0
"""


def test_counters_of_devices_are_what_they_have_sent() -> None:
    assert sent_bytes(COUNTERS) == {"lo": 2004999, "eth0": 12452001}


def _content(**changed: float) -> dict:
    """Measurements that are exactly as predicted, but for factors of the last case."""
    sizes, rates = Sizes(), _rates(20e6, 500e6)
    rows = []
    for case in CASES:
        hops, took = way(case, sizes), seconds(case, sizes, rates)
        factor = changed if case == CASES[-1] else {}
        row: dict = {"case": vars(case)}
        for direction, whole in zip(("forward", "backward"), took, strict=True):
            row[direction] = {
                "across": hops.host_bytes("across", direction) * factor.get("across", 1),
                "inside": hops.host_bytes("inside", direction) * factor.get("inside", 1),
                "seconds": (whole - sizes.bag_seconds) * factor.get("time", 1) + sizes.bag_seconds,
            }
        rows.append(row)
    return {"sizes": vars(sizes), "rates": vars(rates), "rows": rows}


@pytest.mark.parametrize("what", ["across", "inside", "time"])
def test_what_is_not_as_predicted_is_a_problem(what: str) -> None:
    limit = 0.25 if what == "time" else 0.10
    for factor in (1 - limit, 1 + limit):
        inner, outer = 1 + 0.9 * (factor - 1), 1 + 1.1 * (factor - 1)
        assert not list(problems(rows_of(_content(**{what: inner})), []))
        found = list(problems(rows_of(_content(**{what: outer})), []))
        assert len(found) == (1 if what == "time" else 2)
        assert all(problem.startswith("A 4x1x1x2, pieces 1, allgather") for problem in found)


def test_times_are_those_that_reading_rows_does_not_take() -> None:
    rows: list[Row] = rows_of(_content())
    hops, case = way(CASES[0], Sizes()), rows[0]
    across, inside = hops.host_bytes("across", "forward"), hops.host_bytes("inside", "forward")
    assert case.seconds["forward"] == pytest.approx([across / 20e6 + inside / 500e6] * 2)


LOG = (
    " [time] iteration        {}/       5 | lm loss: {:.6E} | loss scale: 1.0 | grad norm: {:.3f} |"
)
STEPS = [(4.861753, 1.234), (4.787075, 2.345)]


def test_training_that_differs_from_one_process_is_a_problem() -> None:
    text = "\n".join(LOG.format(number, *step) for number, step in enumerate(STEPS, 1))
    steps = steps_in(text)
    assert steps == STEPS and not difference(steps, STEPS)
    assert not difference([STEPS[0], (4.787079, 2.346)], STEPS)
    for other in ((4.787095, 2.345), (4.787075, 2.347), (float("nan"), 2.345)):
        assert difference([STEPS[0], other], STEPS).startswith("iteration 2: ")
    assert difference(STEPS[:1], STEPS) == "1 iterations, not 2"
    assert difference([], []) == "0 iterations, not 0"
    run = Training("B", steps, "iteration 2", 1.0)
    good = replace(run, problem="")
    assert list(problems(rows_of(_content()), [run, good])) == ["training, B: iteration 2"]


def test_the_script_says_what_it_lacks(tmp_path: Path) -> None:
    for tool in ("dirname", "uname", "ip", "unshare", "setpriv"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "/bin/true")
    bash = shutil.which("bash")
    assert bash
    ran = subprocess.run(
        [bash, ROOT / "tests/network.sh"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stdout) == (77, "")
    assert ran.stderr == (
        "tests/network.sh: nothing was measured, as hosts cannot be made here: there is no `tc`; "
        "install iproute2 and util-linux\n"
    )
