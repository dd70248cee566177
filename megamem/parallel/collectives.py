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


def gather_counts(own: int, group: ProcessGroup | None, device: torch.device) -> list[int]:
    """Return every rank's number, in the order of the ranks. The host waits for the device."""
    if group is None:
        return [own]
    number = torch.full((1,), own, dtype=torch.int64, device=device)
    return HostCopy(start_gather(number, 1, group)().flatten()).numbers()


def split_tokens(x: Tensor, counts: list[int], group: ProcessGroup | None) -> Tensor:
    """Return this rank's `counts[rank]` rows of a replicated x. The gradient is all-gathered."""
    return x if group is None else _SplitTokens.apply(x, counts, group)


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
