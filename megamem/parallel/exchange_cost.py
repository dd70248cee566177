"""The time and the memory that an exchange takes beside the bytes that it sends.

Rates of memory are those of an H100 if no other is given. The times of the sort and of the marks
were measured there; those whose comment says so are estimates that nobody has measured.

Letters: T tokens on this rank, L lookups per token, W ranks of the group, V row width, P shards of
rows, C shards of columns, O weights of a lookup, Y bags of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from megamem.parallel.traffic import Traffic, overlapped, sent_packing, traffic
from megamem.spec import Grid, Wire

USUAL_TOKENS = 8192
"""T, where a caller does not know it."""

COPY_RATE = 3.0e12
"""Bytes per second that an H100 reads and writes in a large copy."""
SORT_LAUNCH, SORT_LOOKUP = 0.21e-3, 0.063e-9
"""Seconds of a sort of lookups, and of each of them: 0.28 ms for 1.05 million, 0.74 for 8.4."""
MARK_LOOKUP = 0.029e-9
"""Seconds to mark the row of a lookup as touched: 0.24 ms for 8.4 million."""
ABSENT_BYTES = 40
"""allgather: bytes that are read and written per lookup, to tell those of other ranks' rows."""
ROUTED_BYTES = 200
"""alltoall, an estimate: bytes that the source reads and writes per lookup, beside its sort, to
find owners, count the lookups of each bag, and permute ids, weights and gradients of weights."""
PASSED_ON_BYTES = 24
"""alltoall: bytes per lookup to put ids, weights and gradients of weights in the order of nodes."""
FURTHER_WEIGHT_BYTES = 16
"""alltoall: bytes to permute a further weight of a lookup, and its gradient, once."""
BLOCK_BYTES = 8
"""Bytes that are read and written per id, to tell its row from its block."""
HOST_WAIT = 0.25e-3
"""alltoall, an estimate: seconds in which a GPU idles, as the host waits for the numbers of lookups
and only then launches what follows. It does not depend on the number of tokens."""
PIECE_SECONDS = 0.1e-3
"""An estimate: what launches and starts of collectives take for a further piece, beside its sort.
"""

KEPT_BYTES, SORTED_BYTES = 8, 32
"""Memory of a received lookup: of id and weight, which are kept for the backward, and sorted."""
KEPT_WEIGHT_BYTES = 4
"""Memory of a further weight of a received lookup; as much where it is sorted."""
ROUTING_BYTES = 56
"""alltoall: memory of a lookup at its source, while owners are found, counted and sorted."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What the cost of an exchange depends on, beside the grid and the wire."""

    width: int
    """V, the row width."""
    lookups: int
    """L, lookups per token."""
    tokens: float = USUAL_TOKENS
    """T, tokens of a microbatch for which a rank makes the lookups."""
    number_bytes: int = 2
    """Bytes of a number of a row."""
    num_rows: int = 2**20
    """R, the rows of the table."""
    weight_bytes: int = 4
    """Bytes of the weight of a lookup: 4, or 2 with `--memory-lookup-weights bf16`."""
    sends_tokens: bool = False
    """Whether tokens are sent to the owners of their rows, as for PEER."""
    pieces: int = 1
    """N, the pieces in which the tokens pass."""
    cores: int = 1
    """O, weights of a lookup."""
    blocks: int = 1
    """Y, virtual blocks over the rows, each of which has a read-out of every token."""
    token_width: int | None = None
    """Width of the tokens that are sent, if it is not V."""
    link: float = 350e9
    """Bytes per second that a rank sends inside a node."""
    network: float = 45e9
    """Bytes per second that a rank sends to other nodes."""


def sent(grid: Grid, wire: Wire, of: Exchange) -> Traffic:
    """Return the bytes that a rank sends for a token and memory layer."""
    packing = sent_packing(
        of.num_rows,
        of.lookups,
        grid.row_ranks,
        wire,
        of.weight_bytes,
        cores=of.cores,
        blocks=of.blocks,
    )
    return traffic(
        grid,
        of.width,
        of.lookups,
        wire=wire,
        tokens=of.sends_tokens,
        token_width=of.token_width,
        e=of.number_bytes,
        packing=packing,
    )


def received_lookups(grid: Grid, wire: Wire, of: Exchange) -> float:
    """Return the lookups that arrive at a rank: W T L by allgather, and W T L / P by alltoall."""
    arrived = of.tokens * of.lookups * grid.size
    return arrived / grid.row_ranks if grid.routes(wire) else arrived


def lookup_bytes(of: Exchange) -> tuple[int, int]:
    """Return the memory of a received lookup as it is kept, and as it is sorted."""
    further = (of.cores - 1) * KEPT_WEIGHT_BYTES
    return KEPT_BYTES + further, SORTED_BYTES + further


def routed_bytes(grid: Grid, of: Exchange) -> int:
    """Return the bytes that alltoall reads and writes per lookup at its source, beside the sort."""
    passed_on = grid.node_rows > 1 and grid.local_rows > 1
    moved = ROUTED_BYTES + (PASSED_ON_BYTES if passed_on else 0)
    moved += (of.cores - 1) * FURTHER_WEIGHT_BYTES * (2 if passed_on else 1)
    return moved + (BLOCK_BYTES if of.blocks > 1 else 0)


def routing_seconds(grid: Grid, wire: Wire, of: Exchange, copy: float = COPY_RATE) -> float:
    """Return the seconds that alltoall takes at the source, without the wait of the host."""
    if not grid.routes(wire):
        return 0.0
    lookups, moved = of.tokens * of.lookups, routed_bytes(grid, of)
    return SORT_LAUNCH + lookups * (SORT_LOOKUP * COPY_RATE + moved) / copy


def index_seconds(grid: Grid, wire: Wire, of: Exchange) -> float:
    """Return the seconds of a layer's work on the indices of lookups, with the wait of the host."""
    arrived = received_lookups(grid, wire, of)
    seconds = of.pieces * SORT_LAUNCH + arrived * (SORT_LOOKUP + MARK_LOOKUP)
    if grid.routes(wire):
        return seconds + HOST_WAIT + routing_seconds(grid, wire, of)
    if grid.row_ranks > 1:
        seconds += arrived * ABSENT_BYTES / COPY_RATE
    if of.blocks > 1:
        seconds += arrived * BLOCK_BYTES / COPY_RATE
    return seconds


@dataclass(frozen=True)
class HomeWork:
    """What a rank does with partial sums on their way home, in sizes of the read-outs T Y V."""

    copied: float = 0.0
    """Numbers that are brought into the order of a hop; the backward brings them back."""
    summed: float = 0.0
    """Partial sums that are read."""
    sums: float = 0.0
    """Sums that are formed in fp32, and rounded."""
    joined: float = 0.0
    """Numbers of which columns are joined; the backward cuts them and joins the cuts."""
    largest: float = 1.0
    """Numbers of the bags that a rank sums, with which the way begins."""
    largest_sum: float = 0.0
    """Sums that the first hop leaves."""
    copies_first: bool = False
    """Whether the bags are copied before the first hop."""

    def forward_bytes(self, e: int) -> float:
        """Return the bytes read and written per number of the read-out, of e bytes."""
        return 2 * e * (self.copied + self.joined) + e * self.summed + (8 + e) * self.sums

    def backward_bytes(self, e: int) -> float:
        """Return those of the backward, which forms no sums."""
        return 2 * e * (self.copied + 2 * self.joined)


@cache
def home_work(grid: Grid, wire: Wire) -> HomeWork:
    """Return the work of megamem.parallel.homeward, hop by hop.

    Bags are copied before a hop unless the tokens of its axis vary slowest among them already.
    After alltoall the axes that remain vary in the order local columns, node columns, node rows,
    local rows, the slowest first; after allgather local rows, local columns, node rows, node
    columns.
    """
    axes = {
        "local rows": grid.local_rows,
        "node rows": grid.node_rows,
        "node columns": grid.node_columns,
        "local columns": grid.local_columns,
    }
    by_routing = ("local columns", "node columns", "node rows", "local rows")
    by_gather = ("local rows", "local columns", "node rows", "node columns")
    left = [axis for axis in (by_routing if grid.routes(wire) else by_gather) if axes[axis] > 1]
    size = float(grid.row_ranks)
    copied = summed = sums = joined = first = 0.0
    copies_first = False
    for axis, ranks in axes.items():
        if ranks == 1:
            continue
        if left[0] != axis:
            copied += size
            copies_first = copies_first or not first
        left.remove(axis)
        if axis.endswith("rows"):
            summed += size
            size /= ranks
            sums += size
        else:
            joined += size
        first = first or size
    return HomeWork(copied, summed, sums, joined, float(grid.row_ranks), first, copies_first)


def seconds(grid: Grid, wire: Wire, of: Exchange) -> float:
    """Return the seconds that an exchange takes a layer and microbatch, forward and backward.

    They are those of what is sent, of the indices of lookups, of the sums on their way home, and of
    further pieces. Reading the rows takes any grid as long, so it is left out.
    """
    e, bytes_sent = of.number_bytes, sent(grid, wire, of)
    home = home_work(grid, wire)
    moved = home.forward_bytes(e) + home.backward_bytes(e)
    # bags beyond a rank's own tokens are written, and their gradients read
    moved += 2 * e * (home.largest - 1)
    both = bytes_sent.seconds(of.tokens, of.link, of.network, of.pieces)
    both += index_seconds(grid, wire, of) + (of.pieces - 1) * PIECE_SECONDS
    return both + of.tokens * of.blocks * of.width * moved / COPY_RATE


def memory(grid: Grid, wire: Wire, of: Exchange) -> float:
    """Return the bytes of buffers that the exchange of a layer and microbatch takes.

    These are the received lookups, kept and sorted, and the partial sums of all tokens as they are
    sent and received. What is sorted or sent at one time shrinks with the pieces.
    """
    home, live = home_work(grid, wire), live_share(of.pieces)
    read_out = of.tokens * of.blocks * of.width * of.number_bytes
    sums = read_out * home.largest * (2 + home.copies_first)
    kept, in_order = lookup_bytes(of)
    return received_lookups(grid, wire, of) * (kept + in_order / of.pieces) + sums * live


def live_share(pieces: int) -> float:
    """Return the share of all tokens whose partial sums are held at once.

    While those of one piece are sent, those of the next are formed.
    """
    return min(1.0, 2 / pieces)


def hidden(parts: Sequence[float], pieces: int) -> float:
    """Return the seconds that pieces hide of several parts, of which one piece hides none."""
    return sum(parts) - overlapped(parts, pieces)
