"""The wire and the grid that `auto` chooses, and the cost from which it chooses them."""

from dataclasses import replace

import pytest

from megamem.parallel import exchange_cost
from megamem.parallel.blocks import Blocks
from megamem.parallel.choices import EXCHANGE_ROOM, choose_layout, choose_wire
from megamem.parallel.exchange_cost import Exchange, HomeWork, home_work, received_lookups
from megamem.parallel.memory_group import LOCAL_COLUMN, LOCAL_ROW, NODE_COLUMN, NODE_ROW
from megamem.parallel.traffic import grids, sent_packing, traffic
from megamem.spec import Grid, Layout, Wire

PAPER = Exchange(width=2048, lookups=128)
"""The 1.3B base model of "Memory Layers at Scale", with 8192 tokens."""


def test_the_wire_asked_for_is_used() -> None:
    for grid in (Grid(), Grid(local_rows=2), Grid(1, 16, 8, 1)):
        assert choose_wire("alltoall", grid, PAPER) == "alltoall"
        assert choose_wire("allgather", grid, PAPER) == "allgather"


@pytest.mark.parametrize(
    ("sizes", "tokens", "wire"),
    [
        ((1, 1, 1, 1), 8192, "allgather"),
        ((1, 16, 1, 8), 8192, "allgather"),
        # one node, as it was measured; with few tokens the host's wait is most of the time
        ((1, 1, 2, 1), 8192, "allgather"),
        ((1, 1, 8, 1), 64, "allgather"),
        ((1, 1, 8, 1), 8192, "allgather"),
        ((1, 1, 4, 2), 8192, "allgather"),
        ((1, 1, 16, 1), 8192, "alltoall"),
        ((2, 1, 8, 1), 8192, "alltoall"),
        # eight row ranks of sixteen nodes would get the lookups of 128 ranks
        ((1, 16, 8, 1), 8192, "alltoall"),
        ((1, 16, 8, 1), 64, "allgather"),
        ((16, 1, 1, 8), 8192, "alltoall"),
    ],
)
def test_the_wire_depends_on_the_whole_grid(sizes: tuple, tokens: int, wire: Wire) -> None:
    assert choose_wire("auto", Grid(*sizes), replace(PAPER, tokens=tokens)) == wire


def test_lookups_of_all_ranks_have_to_fit() -> None:
    """8 x 131072 x 128 lookups take 5.4 GB, which 4 GB do not hold, however fast they come."""
    few = Exchange(width=2**16, lookups=128, tokens=2**14)
    grid = Grid(local_rows=8)
    assert choose_wire("auto", grid, few) == "allgather"
    assert choose_wire("auto", grid, replace(few, tokens=2**17)) == "alltoall"


def test_received_lookups_by_hand() -> None:
    grid = Grid(1, 16, 8, 1)
    assert received_lookups(grid, "allgather", PAPER) == 128 * 8192 * 128
    # those of the tokens of sixteen nodes, of which eight ranks read an eighth each
    assert received_lookups(grid, "alltoall", PAPER) == 16 * 8192 * 128
    assert received_lookups(Grid(local_columns=8), "alltoall", PAPER) == 8 * 8192 * 128


def test_seconds_by_hand() -> None:
    """One node of 8 row ranks, every part on its own."""
    grid, tokens, lookups = Grid(local_rows=8), 8192, 8192 * 128
    sums = 7 * 2048 * 2
    # 8 (c - 1) bytes a lookup and 4 in the backward; sums, and their gradients
    gathered = tokens * (128 * 12 * 7 + 2 * sums) / 350e9
    # sort and mark of all ranks' lookups, of which seven in eight are told apart
    gathered += 0.21e-3 + 8 * lookups * (0.063e-9 + 0.029e-9 + 40 / 3e12)
    # seven further bags written, eight partial sums read, one sum in fp32; gradients read
    home = tokens * 2048 * (7 * 2 + 8 * 2 + 10 + 7 * 2) / 3e12
    assert exchange_cost.seconds(grid, "allgather", PAPER) == pytest.approx(gathered + home)
    routed = tokens * (128 * 12 * 7 / 8 + 7 + 2 * sums) / 350e9
    routed += 0.21e-3 + lookups * (0.063e-9 + 0.029e-9)
    routed += 0.25e-3 + 0.21e-3 + lookups * (0.063e-9 + 200 / 3e12)
    assert exchange_cost.seconds(grid, "alltoall", PAPER) == pytest.approx(routed + home)
    # the sort of a second piece, and its launches; one link is all there is to hide
    pieces = exchange_cost.seconds(grid, "alltoall", replace(PAPER, pieces=2))
    assert pieces == pytest.approx(routed + home + 0.21e-3 + 0.1e-3)


def test_memory_by_hand() -> None:
    grid, lookups = Grid(1, 2, 8, 1), 8192 * 128
    bags = 16 * 8192 * 1024 * 2
    # bags as summed, in the order of the hop, and as received; lookups kept and sorted
    taken = exchange_cost.memory(grid, "alltoall", PAPER)
    assert taken == pytest.approx(2 * lookups * 40 + 3 * bags)
    four = exchange_cost.memory(grid, "alltoall", replace(PAPER, pieces=4))
    assert four == pytest.approx(2 * lookups * (8 + 32 / 4) + 3 * bags / 2)


def test_seconds_of_blocks_and_cores() -> None:
    """What 4 read-outs of 2 cores add to one of one core."""
    tokens, lookups, sums = 8192, 8192 * 128, 2048 * 2
    ultra = replace(PAPER, cores=2, blocks=4)
    for grid, wire in (
        (Grid(2, 1, 4, 1), "alltoall"),
        (Grid(local_rows=8), "allgather"),
        (Grid(local_columns=8), "allgather"),
    ):
        packing = sent_packing(2**20, 128, grid.row_ranks, wire, cores=2, blocks=4)
        more = traffic(grid, 2048, 128, wire=wire, packing=packing)
        base = exchange_cost.sent(grid, wire, PAPER)
        assert exchange_cost.sent(grid, wire, ultra) == more
        wanted = more.seconds(tokens, 350e9, 45e9) - base.seconds(tokens, 350e9, 45e9)
        home = home_work(grid, wire)
        moved = home.forward_bytes(2) + home.backward_bytes(2) + 4 * (home.largest - 1)
        wanted += 3 * tokens * sums / 2 * moved / 3e12
        # ids are divided into blocks and rows; a weight more is permuted by owner and by node
        of_ids = 8 + 2 * 16 if wire == "alltoall" else 0
        wanted += lookups * of_ids / 3e12
        wanted += received_lookups(grid, wire, PAPER) * 8 / 3e12 if wire == "allgather" else 0
        found = exchange_cost.seconds(grid, wire, ultra) - exchange_cost.seconds(grid, wire, PAPER)
        assert found == pytest.approx(wanted), grid


def test_memory_of_blocks_and_cores() -> None:
    grid, lookups, bags = Grid(1, 2, 8, 1), 8192 * 128, 16 * 8192 * 1024 * 2
    taken = exchange_cost.memory(grid, "alltoall", replace(PAPER, cores=2, blocks=4))
    assert taken == pytest.approx(2 * lookups * 48 + 4 * 3 * bags)


def test_choices_depend_on_blocks_and_cores() -> None:
    # lookups of 40 bytes more are 6.4 GB, where those of one core are 3.4 GB
    few, grid = Exchange(width=2**16, lookups=80, tokens=2**17), Grid(local_rows=8)
    assert choose_wire("auto", grid, few) == "allgather"
    assert choose_wire("auto", grid, replace(few, cores=6)) == "alltoall"
    # 512 x 2 bytes are less than 6 x 256, four times as many are more, but not than 34 x 256
    rows = Exchange(width=512, lookups=256)
    assert choose_layout(rows, 8, wire="alltoall").column_ranks == 1
    assert choose_layout(replace(rows, blocks=4), 8, wire="alltoall").column_ranks == 8
    many = replace(rows, blocks=4, cores=8)
    assert choose_layout(many, 8, wire="alltoall").column_ranks == 2


def test_the_width_of_tokens_that_are_sent() -> None:
    peer = replace(PAPER, sends_tokens=True)
    narrow = exchange_cost.sent(Grid(local_rows=8), "alltoall", replace(peer, token_width=256))
    full = exchange_cost.sent(Grid(local_rows=8), "alltoall", peer)
    assert full.total - narrow.total == 2 * 7 * (2048 - 256) * 2


def _walk(grid: Grid, routed: bool) -> HomeWork:
    """The work of send_home, with the blocks that it brings into order."""
    start = Blocks(grid, (1,) * grid.size, (0,))
    ranks = (grid.node_rows, grid.node_columns, grid.local_rows, grid.local_columns)
    to_owners = (LOCAL_ROW, NODE_ROW, NODE_COLUMN, LOCAL_COLUMN)
    to_all = (NODE_COLUMN, NODE_ROW, LOCAL_COLUMN, LOCAL_ROW)
    here = start
    for axis in to_owners if routed else to_all:
        here = here.along(axis)
    unit = grid.row_ranks / grid.size
    size, copied, summed, sums, joined, first = unit * grid.size, 0.0, 0.0, 0.0, 0.0, None
    copies_first = False
    for axis in (LOCAL_ROW, NODE_ROW, NODE_COLUMN, LOCAL_COLUMN):
        if ranks[axis] == 1:
            continue
        order = here.order_by(axis)
        if order != sorted(order):
            copied += size
            copies_first |= first is None
        here = here.by_coordinate(axis)[0]
        if axis in (LOCAL_ROW, NODE_ROW):
            summed += size
            size /= ranks[axis]
            sums += size
        else:
            joined += size
        first = first or size
    return HomeWork(copied, summed, sums, joined, float(grid.row_ranks), first or 0, copies_first)


@pytest.mark.parametrize("wire", ["alltoall", "allgather"])
def test_work_on_the_way_home_is_that_of_the_hops(wire: Wire) -> None:
    found = [grid for size in (1, 8, 16, 64) for grid in grids(size, 8)]
    assert len(found) == 1 + 4 + 8 + 16
    for grid in found:
        routed = wire == "alltoall" and grid.row_ranks > 1
        assert home_work(grid, wire) == _walk(grid, routed), grid


@pytest.mark.parametrize(
    ("width", "lookups", "ranks", "wire", "mode"),
    [
        (2048, 128, 1, "auto", "row"),
        (2048, 128, 8, "auto", "column"),
        # lookups sent to every rank against partial sums returned by every rank
        (512, 2048, 8, "alltoall", "row"),
        (512, 128, 8, "alltoall", "column"),
        (64, 32, 2, "alltoall", "row"),
        # at fixed sizes every rank sends every lookup, and every sum
        (512, 2048, 8, "allgather", "column"),
        # rows inside the nodes and columns over them
        (2048, 128, 64, "auto", "2d"),
        # there are two blocks of 8 columns for three ranks
        (16, 2, 3, "auto", "row"),
    ],
)
def test_choose_layout(width: int, lookups: int, ranks: int, wire: str, mode: str) -> None:
    choice = choose_layout(Exchange(width=width, lookups=lookups), ranks, wire=wire)
    assert choice.mode == mode, choice
    cut = choice.column_ranks
    assert {"row": cut == 1, "column": cut == ranks, "2d": 1 < cut < ranks}[mode]


def test_a_layout_is_chosen_by_links_and_memory() -> None:
    assert choose_layout(PAPER, 64) == Layout.of_grid(Grid(1, 8, 8, 1))
    # where the network is the faster link, rows go over it and columns inside
    reverse = choose_layout(replace(PAPER, network=3.5e12), 64)
    assert reverse == Layout.of_grid(Grid(8, 1, 1, 8))
    # both grids fit; with twice the tokens neither does, and the one with less is taken
    fast, small = Grid(1, 8, 8, 1), Grid(1, 8, 4, 2)
    for tokens, chosen, fits in ((2**16, fast, True), (2**17, small, False)):
        many = replace(PAPER, tokens=tokens)
        taken = [exchange_cost.memory(grid, "alltoall", many) for grid in (fast, small)]
        assert taken[0] > taken[1] and (taken[1] < EXCHANGE_ROOM) is fits
        assert choose_layout(many, 64) == Layout.of_grid(chosen)
