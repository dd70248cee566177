"""Bytes that memory layers send and read in each mode, in closed form.

All formulas count the bytes that a rank sends for one of its tokens and one memory layer. Letters:
L lookups per token, V row width, e bytes per number of a row, P ranks of the memory group, C column
ranks, f = (P - 1) / P, and E = P (1 - (1 - 1/P)^L), the expected number of ranks that hold rows of
a token where rows are distributed at random. A lookup (id and weight) takes b bytes, the gradient
of its weight 4, and a count c; a rank sends B partial sums per token.

                     forward                      backward
    row, alltoall    b L f + c (P - 1) + B V e    B V e + 4 L f
    row, allgather   b L (P - 1) + (P - 1) V e    (P - 1) V e + 4 L (P - 1)
    row of PEER      as above with 2 V e for V e, as tokens and their gradients are sent as well
    column           b L (P - 1) + V f e          V f e + 4 L (P - 1)
    2d               column among the C consecutive ranks that share rows, plus row among the P / C
                     ranks that share columns, with the lookups of C ranks and slices of V / C

Packing holds b, c and B. megamem.parallel sends b = 8, c = 4 and B = P - 1, as every rank returns
a sum for every token. The minimum is b = 6, c = 0 and B = E f.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megamem.parallel.routing import COUNT_DTYPE, choose_wire
from megamem.parallel.row_shard import COLUMN_BLOCK
from megamem.spec import Layout, Mode, ReducedRows, Wire

# the minimum for a lookup: an id of 4 bytes and a weight of 2
LEAST_LOOKUP_BYTES = 6
WEIGHT_GRADIENT_BYTES = 4
# a narrower slice of a row does not fill one memory access of a GPU
NARROWEST_SLICE_BYTES = 128


@dataclass(frozen=True)
class Packing:
    """Bytes of what is sent for a lookup."""

    lookup: int
    """Bytes of an id and a weight."""
    count: int
    """alltoall: bytes of the number of lookups of a token that a rank gets."""
    empty_bags: bool
    """alltoall: whether ranks that hold no row of a token return a sum for it as well."""


# what megamem.parallel sends (int32 ids, fp32 weights, int32 counts), and the minimum
SENT = Packing(lookup=8, count=COUNT_DTYPE.itemsize, empty_bags=True)
LEAST = Packing(lookup=LEAST_LOOKUP_BYTES, count=0, empty_bags=False)


@dataclass(frozen=True)
class Traffic:
    """Bytes sent per token and memory layer."""

    forward_inside: float
    """In the forward, to ranks of the same node."""
    forward_across: float
    """In the forward, to ranks of other nodes."""
    backward_inside: float
    """In the backward, to ranks of the same node."""
    backward_across: float
    """In the backward, to ranks of other nodes."""

    @property
    def forward(self) -> float:
        """In the forward, to all ranks."""
        return self.forward_inside + self.forward_across

    @property
    def backward(self) -> float:
        """In the backward, to all ranks."""
        return self.backward_inside + self.backward_across

    @property
    def total(self) -> float:
        """In forward and backward, to all ranks."""
        return self.forward + self.backward

    @property
    def across(self) -> float:
        """In forward and backward, to ranks of other nodes."""
        return self.forward_across + self.backward_across

    @property
    def inside(self) -> float:
        """In forward and backward, to ranks of the same node."""
        return self.forward_inside + self.backward_inside

    def seconds(self, tokens: float, link: float, network: float) -> float:
        """Return the seconds that an exchange takes, inside and between nodes at the same time.

        Args:
            tokens: number of tokens.
            link: bytes per second inside a node.
            network: bytes per second between nodes.
        """
        return tokens * max(self.inside / link, self.across / network)


def owners_per_token(lookups: int, ranks: int) -> float:
    """Return E, the expected number of ranks that hold a row of a token, for rows at random."""
    return ranks * (1 - (1 - 1 / ranks) ** lookups)


def row_traffic(
    width: int,
    lookups: int,
    ranks: int,
    *,
    wire: Wire = "alltoall",
    column_ranks: int = 1,
    tokens: bool = False,
    e: int = 2,
    packing: Packing = SENT,
) -> tuple[float, float]:
    """Return the forward and backward bytes of row mode.

    In mode 2d a rank sends the lookups of the tokens of all `column_ranks` ranks that share its
    rows, for a slice of each row: as many bytes of sums as in row mode, and `column_ranks` times
    the bytes of lookups. Where `tokens` is set, the tokens are sent to the owners as well; they and
    their gradients take as many bytes as the sums and theirs.
    """
    peers = ranks - 1
    if wire == "allgather":
        lookup_peers, bag_peers, counts = float(peers), float(peers), 0
    else:
        lookup_peers, bag_peers, counts = peers / ranks, float(peers), packing.count * peers
        if not packing.empty_bags:
            bag_peers = owners_per_token(lookups, ranks) * lookup_peers
    bags, lookups = (2 if tokens else 1) * bag_peers * width * e, column_ranks * lookups
    return (
        packing.lookup * lookups * lookup_peers + column_ranks * counts + bags,
        bags + WEIGHT_GRADIENT_BYTES * lookups * lookup_peers,
    )


def column_traffic(
    width: int, lookups: int, ranks: int, *, e: int = 2, packing: Packing = SENT
) -> tuple[float, float]:
    """Return the forward and backward bytes of column mode."""
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
    """Return the bytes that a mode sends, inside and between nodes.

    Args:
        mode: row, column or 2d.
        width: V, the row width.
        lookups: L, lookups per token.
        ranks: P, ranks of the memory group.
        column_ranks: in mode 2d, consecutive ranks over which the columns of a row are sharded.
        ranks_per_node: ranks of the group on one node; by default all of them.
        wire: the collective that sends lookups among the ranks that hold different rows.
        tokens: whether tokens are sent to the owners of their rows, as for PEER.
        e: bytes per number of a row.
        packing: bytes of what is sent for a lookup.
    """
    near = min(ranks, ranks_per_node or ranks)
    cut = {"row": 1, "column": ranks, "2d": column_ranks}[mode]
    row_ranks = ranks // cut
    near_rows, near_columns = max(1, near // cut), min(near, cut)
    # consecutive ranks hold the columns of one row; those that hold other rows are farther apart
    across_columns = (cut - near_columns) / (cut - 1) if cut > 1 else 0
    across_rows = (row_ranks - near_rows) / (row_ranks - 1) if row_ranks > 1 else 0
    column, column_back = column_traffic(width, lookups, cut, e=e, packing=packing)
    row, row_back = row_traffic(
        width, lookups, row_ranks, wire=wire, column_ranks=cut, tokens=tokens, e=e, packing=packing
    )
    across = column * across_columns + row * across_rows
    across_back = column_back * across_columns + row_back * across_rows
    return Traffic(column + row - across, across, column_back + row_back - across_back, across_back)


def mode_problem(layout: Layout, width: int) -> str | None:
    """Return why a table of this width cannot have this layout, with the fix; None if it can."""
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
            f"--memory-mode {mode} divides the columns of --memory-value-dim {width} over {cut} "
            f"ranks, but each rank needs a block of {COLUMN_BLOCK} columns; use --memory-mode 2d "
            f"with --memory-column-ranks {widest} or fewer, or --memory-mode row."
        )
    return None


def widest_slice(width: int, column_ranks: int) -> int:
    """Return the number of columns on the rank that holds the most."""
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
    """Return the layout of `--memory-mode auto`: the one whose exchange is estimated to be fastest.

    Inside one node, column mode is faster than row mode with alltoall where V e exceeds about 6 L:
    the ids and weights sent to every rank then take fewer bytes than the partial sums returned by
    every rank. It is always faster than row mode with allgather, which sends both. Layouts whose
    slices of a row are narrower than 128 bytes are left out.

    Args:
        width: V, the row width.
        lookups: L, lookups per token.
        ranks: P, ranks of the memory group.
        ranks_per_node: consecutive ranks of the group that share a node.
        column_ranks: column ranks of mode 2d; by default the best number inside a node.
        wire: the collective of row mode.
        e: bytes per number of a row.
        link: bytes per second and rank inside a node.
        network: bytes per second and rank between nodes.
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
    """Return the expected number of distinct rows among uniform random picks."""
    return rows * -math.expm1(-picks / rows)


def choose_reduced_rows(rows: int, lookups: int, batch_tokens: int | None) -> ReducedRows:
    """Return which rows' gradients the replicas of a table send, so that they send fewer bytes.

    It is the touched rows if at most half of all rows are expected to be touched: those are copied
    out of the buffer and back, and the host waits for their number.

    Args:
        rows: R, the rows of the table.
        lookups: lookups of the table per token, of all layers that read it.
        batch_tokens: tokens of a batch, of all ranks; None if they are not known.
    """
    if batch_tokens is None or expected_unique(rows, batch_tokens * lookups) > rows / 2:
        return "all"
    return "touched"


def forward_bytes(width: int, lookups: int, tokens: float, *, e: int = 2) -> float:
    """Return the bytes that embedding_bag reads and writes for these tokens, without cache hits."""
    return tokens * (lookups * width * e + width * e + LEAST_LOOKUP_BYTES * lookups)


def all_reduce_bytes(bytes_held: float, ranks: int) -> float:
    """Return the bytes that each rank sends in an all-reduce: reduce-scatter, then all-gather."""
    return 2 * bytes_held * (ranks - 1) / ranks


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _words(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
