"""Bytes and seconds of one exchange of a memory layer, from its layout and the rates of the links.

Written from the accounting of the exchange, not from the code under test: of megamem it uses the
order in which pieces take turns, and nothing else.

Bytes that a rank sends to others per token, where m are its lookups, V the row width, e the bytes
of a number, and the grid is nr x nc x lr x lc; an id takes 3 bytes across nodes and 4 inside, a
weight and its gradient 4:

    hop             link      lookups forward     back                sums, both ways
    local rows      inside    8 m (lr-1)/lr       4 m (lr-1)/lr       nr (lr-1) V e
    node rows       across    7 m (nr-1)/nr       4 m (nr-1)/nr       (nr-1) V e
    node columns    across    7 m (nc-1)          4 m (nc-1)          (nc-1)/nc V e
    local columns   inside    8 m nc (lc-1)       4 m nc (lc-1)       (lc-1)/lc V e

and, where lookups are routed, a byte for each count of lookups of a token and shard of rows. With
allgather, or if there is one shard of rows, lookups take two hops, across, 7 m (n-1), and inside,
8 m n (g-1). Every group of a hop has one rank on each host that it spans, so gloo's ring
all-gather sends what a direct one does, and a host sends what its ranks do.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from megamem.parallel.pieces import Pieces
from tests.network.cases import RANKS_PER_HOST, Case, Sizes

Collective = Literal["all-to-all", "all-gather"]
Link = Literal["across", "inside"]
NARROW_ID, ID, WEIGHT = 3, 4, 4


@dataclass(frozen=True)
class Hop:
    """Collectives that are started together, and waited for together."""

    link: Link
    ranks: int
    """Ranks of each group."""
    forward: tuple[Collective, ...]
    """The collectives of the forward, which share its bytes."""
    backward: tuple[Collective, ...]
    forward_bytes: float
    """Bytes that a rank sends to others, for all its tokens."""
    backward_bytes: float


@dataclass(frozen=True)
class Way:
    """All hops of a pass, in order."""

    counts: list[Hop]
    """Numbers of lookups, of which nothing comes back."""
    out: list[Hop]
    """Lookups, to the rows."""
    home: list[Hop]
    """Sums, to the tokens."""

    def host_bytes(self, link: Link, direction: Literal["forward", "backward"]) -> float:
        """Return the bytes that the ranks of a host send over a link."""
        hops = [hop for hop in (*self.counts, *self.out, *self.home) if hop.link == link]
        return RANKS_PER_HOST * sum(getattr(hop, f"{direction}_bytes") for hop in hops)


def way(case: Case, sizes: Sizes) -> Way:
    """Return the hops of a case."""
    nr, nc, lr, lc = case.grid
    m, row, classes = sizes.lookups, sizes.width * sizes.element, nr * lr
    routed = case.wire == "alltoall" and classes > 1
    count = 1 if m < 2**8 else 4
    assert sizes.num_keys**2 / classes <= 2**24, "ids would take 4 bytes across nodes"

    def lookups(link: Link, ranks: int, kind: Collective, number: float) -> Hop:
        # ids and weights are sent by two collectives, and the gradient of weights by one; the sum
        # that is the way back of an all-gather is taken after an all-to-all
        sent = (NARROW_ID if link == "across" else ID) + WEIGHT
        return Hop(link, ranks, (kind, kind), ("all-to-all",), sent * number, WEIGHT * number)

    def counts(link: Link, ranks: int, kind: Collective, number: float) -> Hop:
        return Hop(link, ranks, (kind,), (), count * number, 0)

    def sums(link: Link, ranks: int, back: Collective, number: float) -> Hop:
        return Hop(link, ranks, ("all-to-all",), (back,), number, number)

    if routed:
        counted = [
            counts("inside", lr, "all-to-all", nr * (lr - 1)),
            counts("across", nr, "all-to-all", lr * (nr - 1)),
            counts("across", nc, "all-gather", classes * (nc - 1)),
            counts("inside", lc, "all-gather", classes * nc * (lc - 1)),
        ]
        out = [
            lookups("inside", lr, "all-to-all", m * (lr - 1) / lr),
            lookups("across", nr, "all-to-all", m * (nr - 1) / nr),
            lookups("across", nc, "all-gather", m * (nc - 1)),
            lookups("inside", lc, "all-gather", m * nc * (lc - 1)),
        ]
    else:
        nodes, local = nr * nc, lr * lc
        counted = []
        out = [
            lookups("across", nodes, "all-gather", m * (nodes - 1)),
            lookups("inside", local, "all-gather", m * nodes * (local - 1)),
        ]
    home = [
        sums("inside", lr, "all-gather", nr * (lr - 1) * row),
        sums("across", nr, "all-gather", (nr - 1) * row),
        sums("across", nc, "all-to-all", (nc - 1) / nc * row),
        sums("inside", lc, "all-to-all", (lc - 1) / lc * row),
    ]
    return Way(*(_taken(hops, sizes.tokens) for hops in (counted, out, home)))


def _taken(hops: list[Hop], tokens: int) -> list[Hop]:
    """The hops that send anything, for all tokens."""
    return [
        Hop(hop.link, hop.ranks, hop.forward, hop.backward, *(tokens * sent for sent in _both(hop)))
        for hop in hops
        if hop.forward_bytes
    ]


def _both(hop: Hop) -> tuple[float, float]:
    return hop.forward_bytes, hop.backward_bytes


def rate_key(link: Link, collective: Collective, ranks: int) -> str:
    """Return the name of a rate; few connections do not fill a link as many do."""
    return f"{collective} {link}, {ranks} ranks"


@dataclass(frozen=True)
class Rates:
    """What the links do, as measured with plain collectives."""

    bytes_per_second: dict[str, float]
    """rate_key() -> bytes that a host sends in a second."""
    latency: dict[str, float]
    """rate_key() -> seconds of a collective of a few bytes."""


class _Clock:
    """The time of a rank, where the collectives of a link take place one after the other.

    Events say what the rank did, as the backward does the reverse.
    """

    def __init__(self, rates: Rates) -> None:
        self.now = 0.0
        self.events: list[tuple[str, Hop | None, int]] = []
        self._rates = rates
        self._free: dict[str, float] = {}

    def send(self, hop: Hop, share: float, back: bool = False) -> float:
        """Start a hop, and return when it will end."""
        kinds = hop.backward if back else hop.forward
        keys = [rate_key(hop.link, kind, hop.ranks) for kind in kinds]
        rank_bytes = share * (hop.backward_bytes if back else hop.forward_bytes)
        host_bytes = RANKS_PER_HOST * rank_bytes / len(keys)
        end = max(self.now, self._free.get(hop.link, 0.0))
        end += sum(host_bytes / self._rates.bytes_per_second[key] for key in keys)
        self._free[hop.link] = end
        # what is next on the link does not wait until the last rank knows of the end
        return end + max(self._rates.latency[key] for key in keys)

    def wait(self, end: float) -> None:
        """Wait until then."""
        self.now = max(self.now, end)


def seconds(case: Case, sizes: Sizes, rates: Rates) -> tuple[float, float]:
    """Return the seconds of a forward and of a backward, with those in which rows are read."""
    hops, share = way(case, sizes), 1 / case.pieces
    clock, bag = _Clock(rates), share * sizes.bag_seconds
    for hop in hops.counts:
        clock.wait(clock.send(hop, 1))

    def piece(number: int) -> Generator[None, None, bool]:
        for at, hop in enumerate((*hops.out, *hops.home)):
            if at == len(hops.out):
                clock.events.append(("bag", None, number))
                clock.now += bag
            end = clock.send(hop, share)
            clock.events.append(("send", hop, number))
            yield
            clock.wait(end)
            clock.events.append(("wait", hop, number))
        return True

    Pieces([piece(number) for number in range(case.pieces)]).finish()
    return clock.now, _backward(clock.events, rates, share, bag)


def _backward(
    events: Sequence[tuple[str, Hop | None, int]], rates: Rates, share: float, bag: float
) -> float:
    """Return the seconds of what the forward did, in reverse: where it waited, a hop starts."""
    clock, ends = _Clock(rates), {}
    for what, hop, number in reversed(events):
        if hop is None:
            clock.now += bag
        elif what == "wait":
            ends[number] = clock.send(hop, share, back=True)
        else:
            clock.wait(ends[number])
    return clock.now
