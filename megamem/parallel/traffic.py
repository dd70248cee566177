"""Bytes that memory layers send and read in each layout, in closed form.

All formulas count the bytes that a rank sends for one of its tokens and one memory layer. Letters:
m lookups per token, V row width, e bytes per number of a row, D width of a token that is sent; a
grid of a x b nodes (rows x columns) with c x d ranks each (rows x columns), n = a b and g = c d. A
lookup (id and weights) takes l bytes inside a node and k between nodes, the gradients of its
weights 4 for each, and the number of lookups of a bag q. A token has one bag; with y bags, of as
many virtual blocks, q and V count y times. Every hop is one line of megamem.parallel.routing and of
megamem.parallel.homeward:

    alltoall                inside a node                       between nodes
    local rows              l m (c-1)/c + q a (c-1)
    node rows                                                   k m (a-1)/a + q c (a-1)
    node columns                                                k m (b-1) + q a c (b-1)
    local columns           l m b (d-1) + q a b c (d-1)
    allgather               l m n (g-1)                         k m (n-1)
    tokens of PEER          D e n (g-1)                         D e (n-1)
    sums: local rows        V e a (c-1)
    sums: node rows                                             V e (a-1)
    sums: node columns                                          V e (b-1)/b
    sums: local columns     V e (d-1)/d

The backward sends the same without q, with 4 per weight for l and k. Where one rank holds all rows,
lookups are sent as allgather does. Packing holds l, k, q and y, and whether ranks return a sum for
bags of which they hold no row: megamem.parallel does. If they did not, the factor a (c-1) would be
E(a c) (c-1)/c, and a-1 would be E(a) (a-1)/a, with E(p) = p (1 - (1 - 1/p)^(m/y)), the expected
number of p shards that hold rows of a bag where rows are distributed at random.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megamem.parallel.routing import NARROW_ROWS, count_dtype
from megamem.parallel.row_shard import COLUMN_BLOCK, id_dtype
from megamem.spec import Grid, Layout, ReducedRows, Wire

# the minimum for a lookup: an id of 4 bytes and a weight of 2
LEAST_LOOKUP_BYTES = 6
WEIGHT_GRADIENT_BYTES = 4
# a narrower slice of a row does not fill one memory access of a GPU
NARROWEST_SLICE_BYTES = 128


@dataclass(frozen=True)
class Packing:
    """Bytes of what is sent for a lookup, and of the bags that it is of."""

    inside: int = 8
    """Bytes of an id and its weights inside a node."""
    across: int = 8
    """Bytes of an id and its weights between nodes."""
    count: int = 1
    """alltoall: bytes of the number of lookups of a bag of one shard of rows."""
    gradient: int = WEIGHT_GRADIENT_BYTES
    """Bytes of the gradients of the weights of a lookup."""
    bags: int = 1
    """Bags of a token."""
    empty_bags: bool = True
    """Whether ranks that hold no row of a bag return a sum for it as well."""


# what a lookup has to take at least
LEAST = Packing(LEAST_LOOKUP_BYTES, LEAST_LOOKUP_BYTES, count=0, empty_bags=False)


def sent_packing(
    num_rows: int,
    lookups: int,
    row_ranks: int,
    wire: Wire,
    weight_bytes: int = 4,
    *,
    cores: int = 1,
    blocks: int = 1,
) -> Packing:
    """Return the bytes that megamem.parallel sends.

    Args:
        num_rows: R, the rows of the table.
        lookups: m, lookups per token.
        row_ranks: number of shards that the rows are divided into.
        wire: the collective that sends lookups.
        weight_bytes: bytes of a weight: 4, or 2 with `--memory-lookup-weights bf16`.
        cores: weights of a lookup.
        blocks: virtual blocks over the rows, each of which has a bag of every token.
    """
    # ids are those of rows of a shard where a lookup is sent to its owner alone
    routed = wire == "alltoall" and row_ranks > 1
    ids = num_rows if routed else num_rows * blocks
    wide = id_dtype(ids).itemsize
    narrow = 3 if -(-ids // (row_ranks if routed else 1)) <= NARROW_ROWS else wide
    weights = cores * weight_bytes
    return Packing(
        wide + weights,
        narrow + weights,
        count_dtype(lookups).itemsize,
        gradient=cores * WEIGHT_GRADIENT_BYTES,
        bags=blocks,
    )


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

    def seconds(self, tokens: float, link: float, network: float, pieces: int = 1) -> float:
        """Return the seconds that an exchange takes.

        The hops of a piece follow each other, so the times on both links add up. Of N pieces, all
        but one hide what they send over the faster link behind the slower one.

        Args:
            tokens: number of tokens.
            link: bytes per second inside a node.
            network: bytes per second between nodes.
            pieces: N, the pieces in which the tokens pass.
        """
        return tokens * overlapped((self.inside / link, self.across / network), pieces)


def overlapped(parts: Sequence[float], pieces: int) -> float:
    """Return the seconds that parts of an exchange take which work at the same time.

    The parts of one piece follow each other, so their seconds add up. Of N pieces, all but one hide
    what the other parts do behind the part that takes longest.
    """
    longest = max(parts)
    return longest + (sum(parts) - longest) / pieces


def owners_per_bag(lookups: float, ranks: int) -> float:
    """Return E, the expected number of ranks that hold a row of a bag, for rows at random."""
    return ranks * (1 - (1 - 1 / ranks) ** lookups)


def traffic(
    grid: Grid,
    width: int,
    lookups: int,
    *,
    wire: Wire = "alltoall",
    tokens: bool = False,
    token_width: int | None = None,
    e: int = 2,
    packing: Packing | None = None,
) -> Traffic:
    """Return the bytes that a layout sends, inside and between the nodes of its grid.

    Args:
        grid: the layout.
        width: V, the row width.
        lookups: m, lookups per token.
        wire: the collective that sends lookups among the ranks that hold different rows.
        tokens: whether tokens are sent to the owners of their rows, as for PEER.
        token_width: D, the width of such a token, if it is not V.
        e: bytes per number of a row.
        packing: bytes of what is sent for a lookup; by default those of a table of 1M rows.
    """
    packing = packing or sent_packing(2**20, lookups, grid.row_ranks, wire)
    a, b, c, d = grid.node_rows, grid.node_columns, grid.local_rows, grid.local_columns
    nodes, local, bags = grid.nodes, grid.local, packing.bags
    sum_bytes, token_bytes = bags * width * e, (token_width or width) * e
    counts_inside = counts_across = 0
    if grid.routes(wire):
        lookups_inside = lookups * ((c - 1) / c + b * (d - 1))
        lookups_across = lookups * ((a - 1) / a + b - 1)
        counts_inside = a * (c - 1) + a * b * c * (d - 1)
        counts_across = c * (a - 1) + a * c * (b - 1)
    else:
        lookups_inside, lookups_across = lookups * nodes * (local - 1), lookups * (nodes - 1)
    sums_inside, sums_across = float(a * (c - 1)), float(a - 1)
    if not packing.empty_bags:
        sums_inside = owners_per_bag(lookups / bags, a * c) * (c - 1) / c
        sums_across = owners_per_bag(lookups / bags, a) * (a - 1) / a
    bags_inside = sum_bytes * (sums_inside + (d - 1) / d)
    bags_across = sum_bytes * (sums_across + (b - 1) / b)
    if tokens:
        tokens_inside, tokens_across = float(nodes * (local - 1)), float(nodes - 1)
        if not packing.empty_bags:
            tokens_inside = owners_per_bag(lookups, a * c) * (c - 1) / c
            tokens_across = owners_per_bag(lookups, a) * (a - 1) / a
        bags_inside += token_bytes * tokens_inside
        bags_across += token_bytes * tokens_across
    count = packing.count * bags
    return Traffic(
        packing.inside * lookups_inside + count * counts_inside + bags_inside,
        packing.across * lookups_across + count * counts_across + bags_across,
        packing.gradient * lookups_inside + bags_inside,
        packing.gradient * lookups_across + bags_across,
    )


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


def grids(ranks: int, ranks_per_node: int) -> list[Grid]:
    """Return every grid of so many ranks on nodes of so many; one node if they do not divide it."""
    near = min(ranks, ranks_per_node)
    if ranks % near:
        near = ranks
    nodes = ranks // near
    return [
        Grid(rows, nodes // rows, local_rows, near // local_rows)
        for rows in divisors(nodes)
        for local_rows in divisors(near)
    ]


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


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _words(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
