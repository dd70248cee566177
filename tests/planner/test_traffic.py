"""Bytes sent, compared with tables that were computed by hand, to the digits given here.

Unless stated otherwise, rows are bf16, with 128 lookups per token of the minimal size, 6 bytes.
test_sent.py counts the bytes that ranks send.
"""

from dataclasses import replace

import pytest

from megamem.parallel.traffic import (
    LEAST,
    Packing,
    Traffic,
    grids,
    sent_packing,
    traffic,
)
from megamem.spec import Grid
from tests.planner.jobs import LOOKUPS, TOKENS, WIDTH

KIB = 1024


def _kib(sent: Traffic) -> tuple[str, ...]:
    return tuple(
        f"{n / KIB:.0f}" if n > 1e5 else f"{n / KIB:.1f}" for n in (sent.forward, sent.backward)
    )


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
    rows, columns = Grid(local_rows=ranks), Grid(local_columns=ranks)
    assert _kib(traffic(rows, WIDTH, LOOKUPS, packing=LEAST)) == row
    assert _kib(traffic(columns, WIDTH, LOOKUPS, packing=LEAST)) == column


@pytest.mark.parametrize(
    ("width", "row", "column"),
    [(1024, ("14.7", "14.4"), ("7.0", "5.2")), (4096, ("56.7", "56.4"), ("12.2", "10.5"))],
)
def test_bytes_per_token_of_other_widths(width: int, row: tuple, column: tuple) -> None:
    assert _kib(traffic(Grid(local_rows=8), width, LOOKUPS, packing=LEAST)) == row
    assert _kib(traffic(Grid(local_columns=8), width, LOOKUPS, packing=LEAST)) == column


def test_fixed_sizes_cost_little_more_up_to_8_ranks() -> None:
    sent = traffic(Grid(local_rows=8), WIDTH, LOOKUPS, wire="allgather", packing=LEAST)
    assert f"{sent.forward / KIB:.0f}" == "33"


@pytest.mark.parametrize(
    ("ranks", "row", "column"), [(2, "0.21", "0.13"), (8, "1.37", "0.38"), (64, "10.5", "2.1")]
)
def test_exchange_times_at_350_gb_per_second(ranks: int, row: str, column: str) -> None:
    for grid, printed in ((Grid(local_rows=ranks), row), (Grid(local_columns=ranks), column)):
        ms = traffic(grid, WIDTH, LOOKUPS, packing=LEAST).seconds(TOKENS, 350e9, 45e9) * 1e3
        assert f"{ms:.{len(printed.partition('.')[2])}f}" == printed


# nodes of 8, lookups of 8 bytes: (columns over nodes, rows inside), (columns over all), each with
# KiB between nodes and inside, forward and backward
ACROSS = {
    2: ((3.0, 2.5, 29, 28), (3.0, 2.5, 16, 9)),
    8: ((10.5, 7.0, 29, 28), (10.5, 7.0, 56, 28)),
    16: ((18.8, 11.2, 29, 28), (18.8, 11.2, 112, 56)),
    64: ((66.9, 35.4, 29, 28), (66.9, 35.4, 448, 224)),
}


@pytest.mark.parametrize("nodes", ACROSS)
def test_columns_over_nodes(nodes: int) -> None:
    """Between nodes, both grids send each lookup to every node and bring V (n - 1) / n home."""
    packing = Packing(8, 8, count=0, empty_bags=False)
    rows, columns = ACROSS[nodes]
    for grid, expected in ((Grid(1, nodes, 8, 1), rows), (Grid(1, nodes, 1, 8), columns)):
        sent = traffic(grid, WIDTH, LOOKUPS, packing=packing)
        across = (sent.forward_across / KIB, sent.backward_across / KIB)
        assert across == pytest.approx(expected[:2], abs=0.051)
        if grid.local_rows > 1:
            inside = (sent.forward_inside / KIB, sent.backward_inside / KIB)
            assert inside == pytest.approx(expected[2:], abs=0.7)
        else:
            # lookups of the n - 1 other nodes and of this one go to 7 ranks, slices come from 7
            inside = nodes * 7 * LOOKUPS * 8 + 7 / 8 * WIDTH * 2
            assert sent.forward_inside == pytest.approx(inside)
            assert sent.forward_inside / KIB == pytest.approx(expected[2], rel=0.15)


def test_small_lookups_between_nodes() -> None:
    """3 bytes of id and 2 of weight, as one row class of a table of 16M rows has 2M of them."""
    packing = sent_packing(2**24, LOOKUPS, 8, "alltoall", weight_bytes=2)
    assert (packing.inside, packing.across, packing.count) == (6, 5, 1)
    sent = traffic(Grid(1, 16, 8, 1), WIDTH, LOOKUPS, packing=packing)
    counts = 15 * 8
    assert (sent.forward_across - counts) / KIB == pytest.approx(13.1, abs=0.06)
    assert sent.backward_across / KIB == pytest.approx(11.2, abs=0.06)
    # ids of the whole table are sent to all, and 64M of them need 4 bytes
    assert sent_packing(2**26, LOOKUPS, 8, "allgather").across == 8
    assert sent_packing(2**26, LOOKUPS, 8, "alltoall").across == 7
    assert sent_packing(2**26, 300, 8, "alltoall").count == 4


def test_blocks_and_cores() -> None:
    """2 x 1 nodes of 2 x 2 ranks, every part by hand, with 4 read-outs of 2 cores per token."""
    packing = sent_packing(2**20, 84, 4, "alltoall", cores=2, blocks=4)
    assert (packing.inside, packing.across, packing.count) == (12, 11, 1)
    assert (packing.gradient, packing.bags) == (8, 4)
    options = {"wire": "alltoall", "tokens": True, "token_width": 384, "packing": packing}
    sent = traffic(Grid(2, 1, 2, 2), 512, 84, **options)
    sums, tokens, counts = 4 * 512 * 2, 384 * 2, 4
    # half of the lookups to another local row, all of them to another local column; to both nodes
    lookups, sizes = 84 * (1 / 2 + 1), 2 * 1 + 2 * 2 * 1
    home = sums * (2 * 1 + 1 / 2) + tokens * 2 * 3
    assert sent.forward_inside == pytest.approx(12 * lookups + counts * sizes + home)
    assert sent.backward_inside == pytest.approx(8 * lookups + home)
    assert sent.forward_across == pytest.approx(11 * 84 / 2 + counts * 2 + sums + tokens)
    assert sent.backward_across == pytest.approx(8 * 84 / 2 + sums + tokens)


def test_ids_of_blocks() -> None:
    """Ids of all blocks are sent to all; an owner gets those of rows, however many blocks."""

    def packing(rows: int, wire: str) -> tuple[int, int]:
        found = sent_packing(rows, LOOKUPS, 2, wire, blocks=4)
        return found.inside - 4, found.across - 4

    assert packing(2**22, "allgather") == (4, 3)
    assert packing(2**22 + 1, "allgather") == (4, 4)
    assert packing(2**29, "allgather") == (8, 8)
    assert packing(2**25, "alltoall") == (4, 3)
    assert packing(2**29, "alltoall") == (4, 4)


def test_the_least_of_a_bag() -> None:
    """A bag of 21 lookups has rows on fewer of 64 ranks than a token of 84 has."""
    least = replace(LEAST, bags=4)
    sent = traffic(Grid(local_rows=64), 512, 84, packing=least)
    owners = 64 * (1 - (63 / 64) ** 21)
    assert sent.backward == pytest.approx(4 * 84 * 63 / 64 + 4 * 1024 * owners * 63 / 64)


def test_sums_inside_the_node_come_first() -> None:
    """64 nodes as 4 x 16: three complete sums leave a node, and not one of each of its ranks."""
    sent = traffic(Grid(4, 16, 8, 1), WIDTH, LOOKUPS, packing=Packing(8, 8, 0))
    assert sent.across / KIB < 72
    flat = traffic(Grid(16, 4, 8, 1), WIDTH, LOOKUPS, packing=Packing(8, 8, 0))
    assert flat.across > 1.5 * sent.across


def test_bytes_between_nodes_are_part_of_the_total() -> None:
    near, far = (traffic(grid, WIDTH, LOOKUPS) for grid in (Grid(1, 1, 16, 1), Grid(2, 1, 8, 1)))
    assert near.across == 0 < far.across
    assert far.total == pytest.approx(far.across + far.inside)


def test_hops_follow_each_other_and_pieces_hide_the_faster_link() -> None:
    sent = Traffic(300.0, 40.0, 50.0, 5.0)
    assert sent.seconds(2, 350, 45) == pytest.approx(2 * (1 + 1))
    assert sent.seconds(2, 350, 90, pieces=4) == pytest.approx(2 * (1 + 0.5 / 4))


def test_grids_of_a_cluster() -> None:
    found = grids(16, 8)
    assert len(found) == len(set(found)) == 2 * 4
    assert {str(grid) for grid in found} >= {"2x1x8x1", "1x2x8x1", "1x2x1x8", "2x1x2x4"}
    assert all(grid.size == 16 and grid.local == 8 for grid in found)
    # nodes that do not divide the group, and a group within a node
    assert {grid.nodes for grid in grids(12, 8)} == {grid.nodes for grid in grids(4, 8)} == {1}
