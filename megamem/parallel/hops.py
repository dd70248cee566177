"""One hop of an exchange: a collective over one axis of the grid, and its transpose.

    AllToAll    rows to the ranks that own them      gradient: all-to-all back
    Gather      rows to all ranks of the axis        gradient: sum over the ranks
    Reduce      partial sums to the ranks of their   gradient: all-gather
                tokens, and the sum over the ranks
    Join        columns of sums to the ranks of      gradient: columns cut and sent back
                their tokens, and the concatenation

A hop is a value: numbers of rows that the host knows, and a process group. depart() starts it,
and Transfer.arrive() waits for it. In the backward, arrive() starts the transposed collective and
depart() waits for it, so whatever runs between the two overlaps with the exchange in both
directions. On a GPU the stream waits, not the host.

**Order.** Ranks must start the collectives of a group in the same order. In the forward they run
the same Python code with the same numbers. In the backward autograd runs the node that was made
last among those that are ready, and as no hop of one piece depends on another piece, it takes the
nodes of depart() and arrive() in exactly the reverse order of the forward. The graph does not
depend on data, so this order is the same on every rank, however long each rank takes, within a
recomputed forward as well as under every pipeline schedule, which decides only when a complete
forward or backward of a layer runs.

Sums over ranks are formed in fp32 (fp64 for fp64) in the order of the ranks, so that repeated runs
agree bit for bit. For that, a reduce-scatter is carried out as an all-to-all and a sum here.

Letters: P ranks of the axis.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megamem.parallel.collectives import group_rank, join_padded, start_exchange, start_gather

Finish = Callable[[], Tensor]
"""Waits for a collective that was started, and returns its result."""


@dataclass(frozen=True)
class Hop(ABC):
    """One collective over the ranks of one axis."""

    group: ProcessGroup

    @abstractmethod
    def send(self, x: Tensor) -> Finish:
        """Start the collective."""

    @abstractmethod
    def send_back(self, grad: Tensor) -> Finish:
        """Start the transposed collective."""

    @abstractmethod
    def sent_numbers(self, width: int) -> tuple[int, int]:
        """Return the numbers that this rank sends to others in send() and in send_back().

        An all-gather counts as the minimum: this rank's rows to every other rank.

        Args:
            width: numbers of a row of what send() sends.
        """

    @property
    def rank(self) -> int:
        """This rank's number on the axis."""
        return group_rank(self.group)


@dataclass(frozen=True)
class AllToAll(Hop):
    """Sends `sent[p]` rows to each rank p, in the order of ranks; receives `received[p]`."""

    sent: Sequence[int]
    received: Sequence[int]

    def send(self, x: Tensor) -> Finish:
        return start_exchange(x, self.sent, self.received, self.group)

    def send_back(self, grad: Tensor) -> Finish:
        return start_exchange(grad, self.received, self.sent, self.group)

    def sent_numbers(self, width: int) -> tuple[int, int]:
        sent, received = (_to_others(counts, self.rank) for counts in (self.sent, self.received))
        return sent * width, received * width


@dataclass(frozen=True)
class Gather(Hop):
    """Sends this rank's rows to all; `counts` are the rows of every rank."""

    counts: Sequence[int]

    def send(self, x: Tensor) -> Finish:
        return _gather(x, self.counts, self.group)

    def send_back(self, grad: Tensor) -> Finish:
        return _reduce(grad, self.counts, self.group)

    def sent_numbers(self, width: int) -> tuple[int, int]:
        return _gathered(self.counts) * width, _to_others(self.counts, self.rank) * width


@dataclass(frozen=True)
class Reduce(Hop):
    """Sends `counts[p]` rows to each rank p, which sums those of all ranks."""

    counts: Sequence[int]

    def send(self, x: Tensor) -> Finish:
        return _reduce(x, self.counts, self.group)

    def send_back(self, grad: Tensor) -> Finish:
        return _gather(grad, self.counts, self.group)

    def sent_numbers(self, width: int) -> tuple[int, int]:
        return _to_others(self.counts, self.rank) * width, _gathered(self.counts) * width


@dataclass(frozen=True)
class Join(Hop):
    """Sends `counts[p]` rows to each rank p, which joins the columns that it receives.

    A rank may hold several ranges of columns: `widths[p][i]` is the width of range i of rank p. The
    result has range 0 of every rank, then range 1 of every rank, and so on.
    """

    counts: Sequence[int]
    widths: Sequence[Sequence[int]]

    def send(self, x: Tensor) -> Finish:
        own, sizes = self.counts[self.rank], [sum(ranges) for ranges in self.widths]
        sent = [count * x.shape[1] for count in self.counts]
        received = [own * size for size in sizes]
        finish = start_exchange(x.flatten(), sent, received, self.group)

        def join() -> Tensor:
            parts = [
                part.view(own, size).split(list(ranges), 1)
                for part, size, ranges in zip(
                    finish().split(received), sizes, self.widths, strict=True
                )
            ]
            in_order = [columns for ranges in zip(*parts, strict=True) for columns in ranges]
            return torch.cat(in_order, 1)

        return join

    def send_back(self, grad: Tensor) -> Finish:
        own, sizes = self.counts[self.rank], [sum(ranges) for ranges in self.widths]
        in_order = [width for ranges in zip(*self.widths, strict=True) for width in ranges]
        columns, ranks = grad.split(in_order, 1), len(sizes)
        cut = torch.cat([torch.cat(columns[rank::ranks], 1).flatten() for rank in range(ranks)])
        sent = [own * size for size in sizes]
        received = [count * sizes[self.rank] for count in self.counts]
        finish = start_exchange(cut, sent, received, self.group)
        return lambda: finish().view(sum(self.counts), sizes[self.rank])

    def sent_numbers(self, width: int) -> tuple[int, int]:
        sizes = [sum(ranges) for ranges in self.widths]
        back = self.counts[self.rank] * _to_others(sizes, self.rank)
        return _to_others(self.counts, self.rank) * width, back


def _to_others(counts: Sequence[int], rank: int) -> int:
    return sum(counts) - counts[rank]


def _gathered(counts: Sequence[int]) -> int:
    return max(counts) * (len(counts) - 1)


def _gather(x: Tensor, counts: Sequence[int], group: ProcessGroup) -> Finish:
    finish = start_gather(x, max(counts), group)
    return lambda: join_padded(finish(), counts)


def _reduce(x: Tensor, counts: Sequence[int], group: ProcessGroup) -> Finish:
    own = counts[group_rank(group)]
    finish = start_exchange(x, counts, [own] * len(counts), group)
    accumulate = torch.promote_types(x.dtype, torch.float32)

    def total() -> Tensor:
        partial_sums = finish().unflatten(0, (len(counts), own))
        return partial_sums.sum(0, dtype=accumulate).to(x.dtype)

    return total


@dataclass
class Transfer:
    """A differentiable hop that has departed and has not arrived."""

    hop: Hop
    dtype: torch.dtype
    """Dtype of what is sent and received."""
    wire: torch.dtype
    """Dtype in which it is sent forward; gradients are sent in their own."""
    token: Tensor | None = None
    """Stands for the data in the graph, which therefore never holds data that is on its way."""
    finish: Finish | None = None
    finish_back: Finish | None = None

    def arrive(self) -> Tensor:
        """Wait for the hop, and return what arrived."""
        token, self.token = self.token, None
        return _Arrive.apply(token, self)

    def take(self) -> Tensor:
        """Wait for what was sent forward."""
        assert self.finish is not None
        finish, self.finish = self.finish, None
        return finish().to(self.dtype)

    def take_back(self) -> Tensor:
        """Wait for the gradient."""
        assert self.finish_back is not None
        finish, self.finish_back = self.finish_back, None
        return finish()


class _Depart(torch.autograd.Function):
    """Forward: start the hop. Backward: wait for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.finish = transfer.hop.send(x.to(transfer.wire))
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.take_back(), None


class _Arrive(torch.autograd.Function):
    """Forward: wait for the hop. Backward: start to send the gradient."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.take()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        transfer.finish_back = transfer.hop.send_back(grad)
        return grad.new_zeros((), dtype=transfer.dtype), None


def depart(x: Tensor, hop: Hop, wire: torch.dtype | None = None) -> Transfer:
    """Start a hop of a tensor with a gradient.

    Args:
        x: what is sent.
        hop: the collective.
        wire: dtype in which x is sent, if not its own; it must hold every number of x exactly.
    """
    transfer = Transfer(hop, x.dtype, wire or x.dtype)
    transfer.token = _Depart.apply(x, transfer)
    return transfer


class _Reorder(torch.autograd.Function):
    """Forward: move blocks of rows. Backward: move them back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Sequence[int], order: Sequence[int]) -> Tensor:
        ctx.counts, ctx.order = counts, order
        return move_blocks(x, counts, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        inverse = sorted(range(len(ctx.order)), key=ctx.order.__getitem__)
        counts = [ctx.counts[block] for block in ctx.order]
        return move_blocks(grad, counts, inverse), None, None


def move_blocks(x: Tensor, counts: Sequence[int], order: Sequence[int]) -> Tensor:
    """Return the blocks of rows of x, `counts` rows each, in another order, without a gradient."""
    parts = x.split(list(counts))
    return torch.cat([parts[block] for block in order])


def reorder(x: Tensor, counts: Sequence[int], order: Sequence[int]) -> Tensor:
    """Return the blocks of rows of x in another order; x itself if the order is the same."""
    if list(order) == list(range(len(order))):
        return x
    return _Reorder.apply(x, counts, order)
