"""Collectives with a backward. Each docstring states what the forward and the backward send.

Counts are Python numbers that every rank knows, so that nothing here waits for the device, except
gather_counts() and HostCopy.numbers(). Where a group may be None, this stands for this process
alone: nothing is computed or copied then. megamem.parallel.hops has the collectives of lookups.

Letters: T tokens on this rank, W ranks of the group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def group_size(group: ProcessGroup | None) -> int:
    """Return the number of ranks of a group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: ProcessGroup | None) -> int:
    """Return this rank's number in a group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


class HostCopy:
    """A copy of a few numbers from the device to the host, for which the host waits once.

    It goes through pinned memory, so that work that is queued after it does not wait for the host.
    """

    def __init__(self, x: Tensor) -> None:
        """Start to copy x."""
        self._numbers = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        self._numbers.copy_(x, non_blocking=True)
        self._copied = torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None

    def numbers(self) -> list[Any]:
        """Wait for the copy, and return the numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()


@dataclass
class GradientGroup:
    """The ranks that hold the same weights and use them on different tokens."""

    members: ProcessGroup
    """The ranks over which the gradients of the weights are summed."""
    in_backward: bool = True
    """Whether every backward sums them; False if the training loop does, once for all backwards of
    a step."""


def start_exchange(
    x: Tensor, send: Sequence[int], recv: Sequence[int], group: ProcessGroup
) -> Callable[[], Tensor]:
    """Start an all-to-all of rows, without a gradient.

    The rows of x are sent in the order of the ranks, `send[p]` of them to rank p.

    Returns:
        A function that waits and returns [sum(recv), ...], the `recv[p]` rows that each rank p
        sent, in the order of the ranks. On a GPU the current stream waits, not the host.
    """
    x = x.contiguous()
    out = x.new_empty(sum(recv), *x.shape[1:])
    work = dist.all_to_all_single(out, x, [*recv], [*send], group=group, async_op=True)
    return _waits(work, out, x)


def start_gather(x: Tensor, size: int, group: ProcessGroup) -> Callable[[], Tensor]:
    """Start an all-gather, with every rank's x padded to `size` rows, without a gradient.

    Returns:
        A function that waits and returns [W, size, ...].
    """
    padded = x.contiguous()
    if len(x) < size:
        padded = x.new_zeros(size, *x.shape[1:])
        padded[: len(x)] = x
    out = x.new_empty(group_size(group), size, *x.shape[1:])
    work = dist.all_gather_into_tensor(out.flatten(0, 1), padded, group=group, async_op=True)
    return _waits(work, out, padded)


def _waits(work: Any, out: Tensor, sent: Tensor) -> Callable[[], Tensor]:
    held = [sent]

    def finish() -> Tensor:
        work.wait()
        # what was sent has to stay as it was until now
        held.clear()
        return out

    return finish


def join_padded(padded: Tensor, counts: Sequence[int]) -> Tensor:
    """Concatenate the first counts[p] rows of every part p, which drops start_gather's padding."""
    if len(set(counts)) == 1:
        return padded[:, : counts[0]].flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(padded, counts, strict=True)])


def _gather(x: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    return join_padded(start_gather(x, max(counts), group)(), counts)


def _own(x: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    return x.split(counts)[group_rank(group)]


class _SplitTokens(torch.autograd.Function):
    """Forward: keep this rank's rows. Backward: all-gather."""

    @staticmethod
    def forward(ctx, x, counts, group):  # type: ignore[no-untyped-def]
        ctx.counts, ctx.group = counts, group
        return _own(x, counts, group).clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _gather(grad, ctx.counts, ctx.group), None, None


class _GatherTokens(torch.autograd.Function):
    """Forward: all-gather. Backward: keep this rank's rows."""

    @staticmethod
    def forward(ctx, x, counts, group):  # type: ignore[no-untyped-def]
        ctx.counts, ctx.group = counts, group
        return _gather(x, counts, group)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _own(grad, ctx.counts, ctx.group).contiguous(), None, None


class _ReduceGradient(torch.autograd.Function):
    """Forward: nothing is sent. Backward: all-reduce."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _PreviousTokens(torch.autograd.Function):
    """Forward: all-to-all of each rank's last rows. Backward: all-to-all of their gradients."""

    @staticmethod
    def forward(ctx, x, number, counts, group):  # type: ignore[no-untyped-def]
        ctx.rank, ctx.shape = group_rank(group), x.shape
        ctx.group, ctx.ranges = group, _wanted_ranges(number, counts)
        send, recv = _sizes(ctx)
        rows = [x[start:end] for start, end in ctx.ranges[ctx.rank]]
        got = start_exchange(torch.cat(rows), send, recv, group)()
        return torch.cat((got.new_zeros(number - len(got), *got.shape[1:]), got))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        send, recv = _sizes(ctx)
        got = start_exchange(grad[len(grad) - sum(recv) :], recv, send, ctx.group)()
        total = grad.new_zeros(ctx.shape)
        for (start, end), part in zip(ctx.ranges[ctx.rank], got.split(send), strict=True):
            total[start:end] += part
        return total, None, None, None


def _sizes(ctx: Any) -> tuple[list[int], list[int]]:
    """Return the numbers of rows that this rank sends to each rank and gets from it."""
    of_rank = [[end - start for start, end in parts] for parts in ctx.ranges]
    return of_rank[ctx.rank], [sizes[ctx.rank] for sizes in of_rank]


def _wanted_ranges(number: int, counts: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return the rows of each rank, numbered within it, that each rank wants of it."""
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    found = []
    for begin, count in zip(starts, counts, strict=True):
        # a rank wants the rows from `first - number` up to its first one
        ends = [max(0, min(first - begin, count)) for first in starts]
        begins = [max(0, first - number - begin) for first in starts]
        found.append([(min(a, end), end) for a, end in zip(begins, ends, strict=True)])
    return found


def gather_counts(own: int, group: ProcessGroup | None, device: torch.device) -> list[int]:
    """Return every rank's number, in the order of the ranks. The host waits for the device."""
    if group is None:
        return [own]
    number = torch.full((1,), own, dtype=torch.int64, device=device)
    return HostCopy(start_gather(number, 1, group)().flatten()).numbers()


def split_tokens(x: Tensor, counts: list[int], group: ProcessGroup | None) -> Tensor:
    """Return this rank's `counts[rank]` rows of a replicated x. The gradient is all-gathered."""
    return x if group is None else _SplitTokens.apply(x, counts, group)


def previous_tokens(
    x: Tensor, number: int, counts: Sequence[int], group: ProcessGroup | None
) -> Tensor:
    """Return the `number` rows before this rank's, of the ranks before it; zeros where none are.

    Their gradients go back to these ranks, which add them to those of their rows.

    Args:
        x: this rank's `counts[rank]` rows.
        number: of the rows that are returned.
        counts: rows of every rank.
        group: the ranks, in the order of the rows.
    """
    if group is None:
        return x.new_zeros(number, *x.shape[1:])
    return _PreviousTokens.apply(x, number, counts, group)


def gather_tokens(x: Tensor, counts: list[int], group: ProcessGroup | None) -> Tensor:
    """All-gather the `counts[p]` rows of every rank p, which undoes split_tokens().

    In the backward each rank keeps the gradient of its own rows.
    """
    return x if group is None else _GatherTokens.apply(x, counts, group)


def reduce_gradient(x: Tensor, group: GradientGroup | None) -> Tensor:
    """Return x unchanged. Its gradient is all-reduced, as each rank uses x on different tokens."""
    if group is None or not group.in_backward:
        return x
    return _ReduceGradient.apply(x, group.members)
