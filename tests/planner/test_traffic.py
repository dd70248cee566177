"""Bytes sent, compared with tables that were computed by hand, to the digits given here.

Unless stated otherwise, rows are bf16, with 128 lookups per token of the minimal size, 6 bytes.
test_sent.py counts the bytes that ranks send.
"""

import pytest

from megamem.parallel.traffic import (
    LEAST,
    choose_layout,
    column_traffic,
    row_traffic,
    traffic,
)
from tests.planner.jobs import LOOKUPS, TOKENS, WIDTH

KIB = 1024


@pytest.mark.parametrize(
    ("ranks", "row", "column"),
    [
        (2, ("4.4", "4.2"), ("2.8", "2.5")),
        (4, ("12.6", "12.4"), ("5.2", "4.5")),
        (8, ("28.7", "28.4"), ("8.8", "7.0")),
        (16, ("60.7", "60.5"), ("15.0", "11.2")),
        (32, ("123", "122"), ("27.1", "19.4")),
        (64, ("219", "219"), ("51.2", "35.4")),
    ],
)
def test_bytes_per_token(ranks: int, row: tuple, column: tuple) -> None:
    def printed(numbers: tuple[float, float]) -> tuple[str, ...]:
        return tuple(f"{n / KIB:.0f}" if n > 1e5 else f"{n / KIB:.1f}" for n in numbers)

    assert printed(row_traffic(WIDTH, LOOKUPS, ranks, packing=LEAST)) == row
    assert printed(column_traffic(WIDTH, LOOKUPS, ranks, packing=LEAST)) == column


@pytest.mark.parametrize(
    ("width", "row", "column"),
    [(1024, ("14.7", "14.4"), ("7.0", "5.2")), (4096, ("56.7", "56.4"), ("12.2", "10.5"))],
)
def test_bytes_per_token_of_other_widths(width: int, row: tuple, column: tuple) -> None:
    assert tuple(f"{n / KIB:.1f}" for n in row_traffic(width, LOOKUPS, 8, packing=LEAST)) == row
    assert (
        tuple(f"{n / KIB:.1f}" for n in column_traffic(width, LOOKUPS, 8, packing=LEAST)) == column
    )


def test_fixed_sizes_cost_little_more_up_to_8_ranks() -> None:
    forward, _ = row_traffic(WIDTH, LOOKUPS, 8, wire="allgather", packing=LEAST)
    assert f"{forward / KIB:.0f}" == "33"


@pytest.mark.parametrize(
    ("ranks", "row", "column"), [(2, "0.21", "0.13"), (8, "1.37", "0.38"), (64, "10.5", "2.1")]
)
def test_exchange_times_at_350_gb_per_second(ranks: int, row: str, column: str) -> None:
    for mode, printed in (("row", row), ("column", column)):
        ms = traffic(mode, WIDTH, LOOKUPS, ranks, packing=LEAST).seconds(TOKENS, 350e9, 45e9) * 1e3
        assert f"{ms:.{len(printed.partition('.')[2])}f}" == printed


def test_two_dimensions_end_in_row_and_column() -> None:
    """2d with one column rank is row mode; with as many as ranks it is column mode."""
    for width in (256, 2048):
        for mode, cut in (("row", 1), ("column", 16)):
            ours = traffic("2d", width, LOOKUPS, 16, column_ranks=cut)
            other = traffic(mode, width, LOOKUPS, 16)
            assert ours.forward == pytest.approx(other.forward)
            assert ours.backward == pytest.approx(other.backward)


def test_two_dimensions_send_complete_sums_between_nodes() -> None:
    """8 nodes of 8 ranks: 7 partial sums of 4 KiB and the lookups of 8 ranks leave the node."""
    sent = traffic("2d", WIDTH, LOOKUPS, 64, column_ranks=8, ranks_per_node=8, packing=LEAST)
    assert sent.forward_across == pytest.approx(28 * KIB + 8 * 6 * LOOKUPS * 7 / 8)
    assert sent.forward_inside == pytest.approx(column_traffic(WIDTH, LOOKUPS, 8, packing=LEAST)[0])
    assert sent.across < traffic("row", WIDTH, LOOKUPS, 64, ranks_per_node=8).across / 4


def test_bytes_between_nodes_are_part_of_the_total() -> None:
    near, far = (traffic("row", WIDTH, LOOKUPS, 16, ranks_per_node=n) for n in (16, 8))
    assert near.across == 0
    assert far.total == pytest.approx(near.total)
    assert far.across == pytest.approx(near.total * 8 / 15)


@pytest.mark.parametrize(
    ("width", "lookups", "ranks", "wire", "mode"),
    [
        (2048, 128, 1, "auto", "row"),
        (2048, 128, 8, "auto", "column"),
        # the mode depends on bytes per row compared with 6 bytes per lookup
        (400, 128, 2, "alltoall", "column"),
        (256, 128, 2, "alltoall", "row"),
        (128, 32, 2, "alltoall", "column"),
        (64, 32, 2, "alltoall", "row"),
        # at fixed sizes every rank sends every sum
        (256, 128, 2, "auto", "column"),
        # a slice of 64 bytes is too narrow for column mode
        (2048, 128, 64, "auto", "2d"),
        # there are two blocks of 8 columns for three ranks
        (16, 2, 3, "auto", "row"),
    ],
)
def test_choose_layout(width: int, lookups: int, ranks: int, wire: str, mode: str) -> None:
    choice = choose_layout(width, lookups, ranks, wire=wire)
    assert choice.mode == mode, choice
    cut = choice.column_ranks
    assert {"row": cut == 1, "column": cut == ranks, "2d": 1 < cut < ranks}[mode]
