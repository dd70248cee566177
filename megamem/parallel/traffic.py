"""What a lookup sends and reads, mode by mode, in closed form.

Letters: L lookups per token, V row width, e bytes of a number of a row, P ranks of the memory
group, f = (P - 1) / P, and E = P (1 - (1 - 1/P)^L), the ranks that hold rows of a token when rows
lie at random. Everything counts bytes that a rank sends, for one token of its own and one memory
layer. A lookup is b bytes (id and weight), the gradient of its weight 4, a count c.

    row, alltoall    b L f + c (P - 1) + B V e    back  B V e + 4 L f
    row, allgather   b L (P - 1) + (P - 1) V e    back  (P - 1) V e + 4 L (P - 1)
    row of PEER      either form with twice the V e: tokens travel as sums do, the other way round
    column           b L (P - 1) + V f e          back  V f e + 4 L (P - 1)
    2d               column among the C neighbours that share rows, and among the P / C ranks that
                     share columns row, with the lookups of C ranks each and slices of V / C

Packing says what b, c and B are. megamem.parallel sends b = 8, c = 8 and B = P - 1: every rank
returns a sum for every token. The least that could be sent is b = 6, c = 0 and B = E f.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megamem.parallel.routing import choose_wire
from megamem.parallel.row_shard import COLUMN_BLOCK
from megamem.spec import Layout, Mode, Wire

# an id of 4 bytes, a weight of 2: what a lookup is at least
LEAST_LOOKUP_BYTES = 6
WEIGHT_GRADIENT_BYTES = 4
# a narrower slice of a row wastes a read
NARROWEST_SLICE_BYTES = 128


@dataclass(frozen=True)
class Packing:
    """What things weigh when they travel."""

    lookup: int
    """Bytes of an id and a weight."""
    count: int
    """Bytes that announce, in the form alltoall, how many lookups of a token a rank gets."""
    empty_bags: bool
    """In the form alltoall, sums come home from ranks that hold no row of a token, too."""


# int32 ids and fp32 weights, int64 counts: megamem.parallel as it is, and what could be left out
SENT = Packing(lookup=8, count=8, empty_bags=True)
LEAST = Packing(lookup=LEAST_LOOKUP_BYTES, count=0, empty_bags=False)


@dataclass(frozen=True)
class Traffic:
    """Bytes sent per token and memory layer."""

    forward_inside: float
    """Forward, to ranks of the same node."""
    forward_across: float
    """Forward, to other nodes."""
    backward_inside: float
    backward_across: float

    @property
    def forward(self) -> float:
        return self.forward_inside + self.forward_across

    @property
    def backward(self) -> float:
        return self.backward_inside + self.backward_across

    @property
    def total(self) -> float:
        """Both directions."""
        return self.forward + self.backward

    @property
    def across(self) -> float:
        """Both directions, to other nodes."""
        return self.forward_across + self.backward_across

    @property
    def inside(self) -> float:
        return self.forward_inside + self.backward_inside

    def seconds(self, tokens: float, link: float, network: float) -> float:
        """Time for these tokens at bytes per second inside and across nodes, both at once."""
        return tokens * max(self.inside / link, self.across / network)


def owners_per_token(lookups: int, ranks: int) -> float:
    """E: ranks that hold at least one of a token's rows, when rows lie at random."""
    return ranks * (1 - (1 - 1 / ranks) ** lookups)


def row_traffic(
    width: int,
    lookups: int,
    ranks: int,
    *,
    wire: Wire = "alltoall",
    brought: int = 1,
    tokens: bool = False,
    e: int = 2,
    packing: Packing = SENT,
) -> tuple[float, float]:
    """Forward and backward bytes of row mode.

    In 2d a rank brings the lookups of its `brought` neighbours as well, for a slice of the rows:
    as many bytes of sums, and so many times the bytes of lookups. Where `tokens` travel to the
    owners, they and their gradients weigh what sums and theirs do.
    """
    peers = ranks - 1
    if wire == "allgather":
        lookup_peers, bag_peers, counts = float(peers), float(peers), 0
    else:
        lookup_peers, bag_peers, counts = peers / ranks, float(peers), packing.count * peers
        if not packing.empty_bags:
            bag_peers = owners_per_token(lookups, ranks) * lookup_peers
    bags, lookups = (2 if tokens else 1) * bag_peers * width * e, brought * lookups
    return (
        packing.lookup * lookups * lookup_peers + brought * counts + bags,
        bags + WEIGHT_GRADIENT_BYTES * lookups * lookup_peers,
    )


def column_traffic(
    width: int, lookups: int, ranks: int, *, e: int = 2, packing: Packing = SENT
) -> tuple[float, float]:
    """Forward and backward bytes of column mode."""
    slices = width * (ranks - 1) / ranks * e
    return (
        packing.lookup * lookups * (ranks - 1) + slices,
        slices + WEIGHT_GRADIENT_BYTES * lookups * (ranks - 1),
    )


def traffic(
    mode: Mode,
    width: int,
    lookups: int,
    ranks: int,
    *,
    column_ranks: int = 1,
    ranks_per_node: int | None = None,
    wire: Wire = "alltoall",
    tokens: bool = False,
    e: int = 2,
    packing: Packing = SENT,
) -> Traffic:
    """What a mode sends, by where it goes.

    Args:
        mode: row, column or 2d.
        width: V.
        lookups: L.
        ranks: P.
        column_ranks: 2d: neighbouring ranks over which the columns of one row are cut.
        ranks_per_node: of the group; without it all are on one node.
        wire: of the ranks among which rows are cut.
        tokens: they travel to the owners of their rows, as PEER's do.
        e: bytes of a number of a row.
        packing: what a lookup weighs.
    """
    near = min(ranks, ranks_per_node or ranks)
    cut = {"row": 1, "column": ranks, "2d": column_ranks}[mode]
    row_ranks = ranks // cut
    near_rows, near_columns = max(1, near // cut), min(near, cut)
    # columns of one row lie with neighbours, rows of one column far apart
    across_columns = (cut - near_columns) / (cut - 1) if cut > 1 else 0
    across_rows = (row_ranks - near_rows) / (row_ranks - 1) if row_ranks > 1 else 0
    column, column_back = column_traffic(width, lookups, cut, e=e, packing=packing)
    row, row_back = row_traffic(
        width, lookups, row_ranks, wire=wire, brought=cut, tokens=tokens, e=e, packing=packing
    )
    across = column * across_columns + row * across_rows
    across_back = column_back * across_columns + row_back * across_rows
    return Traffic(column + row - across, across, column_back + row_back - across_back, across_back)


def mode_problem(layout: Layout, width: int) -> str | None:
    """Why a table of this width cannot be cut so, and what would do; None where it can."""
    mode, ranks, cut = layout.mode, layout.group_size, layout.column_ranks
    if mode == "2d" and (cut < 1 or ranks % cut):
        return (
            f"--memory-column-ranks {cut} does not divide --memory-group-size {ranks}; "
            f"use one of {_words(divisors(ranks))}."
        )
    blocks = width // COLUMN_BLOCK
    if cut > blocks:
        widest = max(d for d in divisors(ranks) if d <= blocks)
        return (
            f"--memory-mode {mode} cuts rows of --memory-value-dim {width} over {cut} ranks, but "
            f"columns are dealt out {COLUMN_BLOCK} at a time; use --memory-mode 2d with "
            f"--memory-column-ranks {widest} or fewer, or --memory-mode row."
        )
    return None


def widest_slice(width: int, column_ranks: int) -> int:
    """Columns on the rank that holds most."""
    return -(-(width // COLUMN_BLOCK) // column_ranks) * COLUMN_BLOCK


def choose_layout(
    width: int,
    lookups: int,
    ranks: int,
    *,
    ranks_per_node: int = 8,
    column_ranks: int | None = None,
    wire: Literal["auto", "alltoall", "allgather"] = "auto",
    e: int = 2,
    link: float = 350e9,
    network: float = 45e9,
) -> Layout:
    """The layout of `--memory-mode auto`: whose exchange takes least time, by the formulas above.

    Inside one node columns beat the alltoall form of rows where V e > 6 L or so: then the ids and
    weights that go to every rank weigh less than the partial sums that come from every rank. They
    always beat the allgather form, which sends both. Slices narrower than 128 bytes are left out.

    Args:
        width: V.
        lookups: L.
        ranks: P.
        ranks_per_node: neighbouring ranks of the group with fast links between them.
        column_ranks: of 2d; by default the best cut inside a node.
        wire: of row mode.
        e: bytes of a number of a row.
        link, network: bytes per second and rank, inside a node and between nodes.
    """
    if ranks == 1:
        return Layout()
    near = min(ranks, ranks_per_node)
    cuts: Sequence[int] = [column_ranks] if column_ranks else divisors(math.gcd(ranks, near))
    options = [Layout("row", ranks), Layout("column", ranks, ranks)]
    options += [Layout("2d", ranks, cut) for cut in cuts if 1 < cut < ranks]
    times: dict[Layout, float] = {}
    for option in options:
        cut = option.column_ranks
        narrow = cut > 1 and width * e / cut < NARROWEST_SLICE_BYTES
        if narrow or mode_problem(option, width):
            continue
        sent = traffic(
            option.mode,
            width,
            lookups,
            ranks,
            column_ranks=cut,
            ranks_per_node=near,
            wire=choose_wire(wire, option.row_ranks),
            e=e,
        )
        times[option] = sent.seconds(1, link, network)
    return min(times, key=lambda option: times[option])


def expected_unique(rows: float, picks: float) -> float:
    """U: distinct rows among uniform picks."""
    return rows * -math.expm1(-picks / rows)


def forward_bytes(width: int, lookups: int, tokens: float, *, e: int = 2) -> float:
    """Read and written by the bags of these tokens, no row read twice from cache."""
    return tokens * (lookups * width * e + width * e + LEAST_LOOKUP_BYTES * lookups)


def all_reduce_bytes(bytes_held: float, ranks: int) -> float:
    """Sent by each of these ranks when they add up what each holds: out once, and back once."""
    return 2 * bytes_held * (ranks - 1) / ranks


def divisors(number: int) -> list[int]:
    """Ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _words(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
