"""What `auto` chooses: the wire of a grid, and the grid of a table."""

from functools import cache
from typing import Literal

from megamem.parallel import exchange_cost
from megamem.parallel.exchange_cost import Exchange
from megamem.parallel.traffic import NARROWEST_SLICE_BYTES, grids, mode_problem
from megamem.spec import Grid, Layout, Wire

WantedWire = Literal["auto", "alltoall", "allgather"]

CLEARLY, CLEARLY_UP_TO = 0.75, 8
"""Up to so many ranks, alltoall is chosen only where it takes less than this share of the time of
allgather, which has been measured there."""
LOOKUPS_ROOM = 4e9
"""Bytes that the lookups which allgather brings may take, a twentieth of an H100's memory."""
EXCHANGE_ROOM = 16e9
"""Bytes that the buffers of an exchange may take, a fifth of an H100's memory."""


@cache
def choose_wire(wanted: WantedWire, grid: Grid, of: Exchange) -> Wire:
    """Return the collective that sends lookups over a grid.

    `auto` compares the estimated seconds of both (exchange_cost.seconds): what they send over both
    links, the indices of the lookups that arrive, W T L of them or, with alltoall, 1 / P of them,
    and for alltoall the sort at the source and the host's wait. The faster one is chosen, but up to
    8 ranks alltoall only where it takes less than 3/4 of the time, as allgather, which never makes
    the host wait and which a CUDA graph can hold, is what has been measured there. Where the
    lookups that allgather brings would take more than 4 GB, alltoall is chosen in any case.

    For 128 lookups, rows of 2048 bf16 numbers, 8192 tokens and 8 row ranks in a node, allgather
    takes 3.0 ms and alltoall 2.6, so it is allgather; with 32768 tokens 11.3 and 8.3, so it is
    alltoall, as it is on 16 row ranks of two nodes with 8192.

    Args:
        wanted: the value of --memory-wire.
        grid: the layout.
        of: what the cost depends on.
    """
    if wanted != "auto":
        return wanted
    if grid.row_ranks == 1:
        return "allgather"
    arrived = exchange_cost.received_lookups(grid, "allgather", of)
    if arrived * sum(exchange_cost.lookup_bytes(of)) > LOOKUPS_ROOM:
        return "alltoall"
    routed, gathered = (exchange_cost.seconds(grid, wire, of) for wire in ("alltoall", "allgather"))
    share = CLEARLY if grid.size <= CLEARLY_UP_TO else 1.0
    return "alltoall" if routed < share * gathered else "allgather"


def choose_layout(
    of: Exchange, ranks: int, *, ranks_per_node: int = 8, wire: WantedWire = "auto"
) -> Layout:
    """Return the layout of `--memory-mode auto`: the one whose exchange is estimated to be fastest.

    Of all grids of so many ranks on nodes of so many, it is the one with the fewest seconds
    (exchange_cost.seconds) among those whose buffers take at most 16 GB; if there is none, the one
    with the smallest buffers. Layouts whose slices of a row are narrower than 128 bytes are left
    out.

    Inside one node, columns are faster than rows with alltoall where V e exceeds about 6 L (with Y
    read-outs of a token and O weights of a lookup, where Y V e exceeds (2 + 4 O) L): the lookups
    sent to every rank then take fewer bytes than the partial sums returned by every rank.
    Over nodes, columns between them and rows inside send the fewest bytes to other nodes.

    Args:
        of: what the cost of an exchange depends on.
        ranks: W, ranks of the memory group.
        ranks_per_node: consecutive ranks of the group that share a node.
        wire: the value of --memory-wire.
    """
    if ranks == 1:
        return Layout()
    costs: dict[Layout, tuple[float, float]] = {}
    for grid in grids(ranks, ranks_per_node):
        option, e = Layout.of_grid(grid), of.number_bytes
        narrow = grid.column_ranks > 1 and of.width * e / grid.column_ranks < NARROWEST_SLICE_BYTES
        if narrow or mode_problem(option, of.width):
            continue
        chosen = choose_wire(wire, grid, of)
        beyond = max(0.0, exchange_cost.memory(grid, chosen, of) - EXCHANGE_ROOM)
        costs[option] = beyond, exchange_cost.seconds(grid, chosen, of)
    return min(costs, key=lambda option: costs[option])
