"""Collectives with a backward. Each docstring states what the forward and the backward send.

Counts are Python numbers that every rank knows, so that nothing here waits for the device, except
gather_counts() and HostCopy.numbers(). Where PendingCollectives are given, a collective is only
started, and its result may be read after pending.wait(). Where a group may be None, this stands for
this process alone: nothing is computed or copied then.

Letters: T tokens on this rank, X tokens of all column ranks, G bags (the tokens of all ranks),
V row width, v on this rank; W ranks of the group.
"""

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


class PendingCollectives:
    """Collectives that were started and not yet waited for."""

    def __init__(self) -> None:
        self._pending: list[tuple[Any, Tensor]] = []

    def add(self, work: Any, sent: Tensor) -> None:
        """Add a collective, and keep the tensor that it sends alive until wait()."""
        self._pending.append((work, sent))

    def wait(self) -> None:
        """Wait for all of them. On a GPU the current stream waits, not the host."""
        for work, _ in self._pending:
            work.wait()
        self._pending.clear()


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


def exchange(
    x: Tensor,
    send: list[int],
    recv: list[int],
    group: ProcessGroup,
    pending: PendingCollectives | None = None,
) -> Tensor:
    """All-to-all of rows, without a gradient; all_to_all() is the same with one.

    The rows of x are sent in the order of the ranks, `send[p]` of them to rank p.

    Returns:
        [sum(recv), ...], the `recv[p]` rows that each rank p sent, in the order of the ranks.
    """
    x = x.contiguous()
    out = x.new_empty(sum(recv), *x.shape[1:])
    wait = pending is None
    work = dist.all_to_all_single(out, x, recv, send, group=group, async_op=not wait)
    if pending is not None:
        pending.add(work, x)
    return out


def gather_padded(
    x: Tensor,
    size: int,
    group: ProcessGroup,
    fill: float = 0,
    pending: PendingCollectives | None = None,
) -> Tensor:
    """All-gather, with every rank's x padded to `size` rows: [W, size, ...]. It has no gradient."""
    padded = x.contiguous()
    if len(x) < size:
        padded = x.new_full((size, *x.shape[1:]), fill)
        padded[: len(x)] = x
    out = x.new_empty(group_size(group), size, *x.shape[1:])
    wait = pending is None
    work = dist.all_gather_into_tensor(out.flatten(0, 1), padded, group=group, async_op=not wait)
    if pending is not None:
        pending.add(work, padded)
    return out


def join_padded(padded: Tensor, counts: list[int]) -> Tensor:
    """Concatenate the first counts[p] rows of every part p, which drops gather_padded's padding."""
    if len(set(counts)) == 1:
        return padded[:, : counts[0]].flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(padded, counts, strict=True)])


def _gather(x: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    return join_padded(gather_padded(x, max(counts), group), counts)


def _own(x: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    return x.split(counts)[group_rank(group)]


class _AllToAll(torch.autograd.Function):
    """Forward: all-to-all of rows. Backward: the same with the splits swapped."""

    @staticmethod
    def forward(ctx, x, send, recv, group, pending):  # type: ignore[no-untyped-def]
        ctx.send, ctx.recv, ctx.group = send, recv, group
        return exchange(x, send, recv, group, pending)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return exchange(grad, ctx.recv, ctx.send, ctx.group), None, None, None, None


class _GatherWeights(torch.autograd.Function):
    """Forward: all-gather of padded rows. Backward: reduce-scatter."""

    @staticmethod
    def forward(ctx, x, size, group, pending):  # type: ignore[no-untyped-def]
        ctx.rows, ctx.group = len(x), group
        return gather_padded(x, size, group, pending=pending)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        out = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous().flatten(0, 1), group=ctx.group)
        return out[: ctx.rows], None, None, None


def _reduce_scatter(bags_GV: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    """Reduce-scatter, carried out as an all-to-all and a sum.

    The sum is taken here so that it is in fp32 and in the order of the ranks, which makes repeated
    runs agree bit for bit.
    """
    own = counts[group_rank(group)]
    partial_sums = exchange(bags_GV, counts, [own] * len(counts), group)
    accumulate = torch.promote_types(bags_GV.dtype, torch.float32)
    total = partial_sums.unflatten(0, (len(counts), own)).sum(0, dtype=accumulate)
    return total.to(bags_GV.dtype)


class _ReduceScatterBags(torch.autograd.Function):
    """Forward: reduce-scatter. Backward: all-gather."""

    @staticmethod
    def forward(ctx, bags_GV, counts, num_tokens, group):  # type: ignore[no-untyped-def]
        ctx.counts, ctx.group = counts, group
        return _reduce_scatter(bags_GV, counts, group)[:num_tokens]

    @staticmethod
    def backward(ctx, grad_TV):  # type: ignore[no-untyped-def]
        return _gather(grad_TV, ctx.counts, ctx.group), None, None, None


class _GatherBagTokens(torch.autograd.Function):
    """Forward: all-gather of padded rows. Backward: reduce-scatter of as many rows as are used."""

    @staticmethod
    def forward(ctx, x, counts, group, pending):  # type: ignore[no-untyped-def]
        ctx.rows, ctx.counts, ctx.group = len(x), counts, group
        return gather_padded(x, max(counts), group, pending=pending)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        total = _reduce_scatter(join_padded(grad, ctx.counts), ctx.counts, ctx.group)
        return total[: ctx.rows], None, None, None


class _JoinColumns(torch.autograd.Function):
    """Forward: all-to-all of column slices, then a concatenation. Backward: the reverse."""

    @staticmethod
    def forward(ctx, slices_Xv, counts, widths, group):  # type: ignore[no-untyped-def]
        ctx.counts, ctx.widths, ctx.group = counts, widths, group
        rank = group_rank(group)
        send = [count * widths[rank] for count in counts]
        recv = [counts[rank] * width for width in widths]
        parts = exchange(slices_Xv.flatten(), send, recv, group).split(recv)
        return torch.cat(
            [part.view(counts[rank], width) for part, width in zip(parts, widths, strict=True)], 1
        )

    @staticmethod
    def backward(ctx, grad_TV):  # type: ignore[no-untyped-def]
        rank = group_rank(ctx.group)
        send = [ctx.counts[rank] * width for width in ctx.widths]
        recv = [count * ctx.widths[rank] for count in ctx.counts]
        cut = torch.cat([part.flatten() for part in grad_TV.split(ctx.widths, 1)])
        slices = exchange(cut, send, recv, ctx.group)
        return slices.view(sum(ctx.counts), ctx.widths[rank]), None, None, None


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


def all_to_all(
    x: Tensor,
    send: list[int],
    recv: list[int],
    group: ProcessGroup,
    pending: PendingCollectives | None = None,
) -> Tensor:
    """exchange() with a gradient, which the reverse all-to-all sends back."""
    return _AllToAll.apply(x, send, recv, group, pending)


def gather_weights(
    x: Tensor, size: int, group: ProcessGroup, pending: PendingCollectives | None = None
) -> Tensor:
    """gather_padded() with a gradient, which is reduce-scattered: [W, size, ...]."""
    return _GatherWeights.apply(x, size, group, pending)


def reduce_scatter_bags(
    bags_GV: Tensor, counts: list[int], num_tokens: int, group: ProcessGroup
) -> Tensor:
    """Send rank p its `counts[p]` partial bags, and return the sums over all ranks, [T, V].

    The gradient is all-gathered.

    Args:
        bags_GV: this rank's part of the sum of each bag.
        counts: bags of every rank; those after a rank's tokens are padding.
        num_tokens: T, the tokens of this rank, at most `counts[rank]`.
        group: the ranks.
    """
    return _ReduceScatterBags.apply(bags_GV, counts, num_tokens, group)


def gather_bag_tokens(
    x: Tensor,
    counts: list[int],
    group: ProcessGroup,
    pending: PendingCollectives | None = None,
) -> Tensor:
    """All-gather every rank's tokens, [W, max(counts), ...]; their gradients are reduce-scattered.

    Args:
        x: at most `counts[rank]` rows.
        counts: rows of every rank; missing rows are zero.
        group: the ranks.
        pending: if given, the all-gather is only started.
    """
    return _GatherBagTokens.apply(x, counts, group, pending)


def join_columns(
    slices_Xv: Tensor, counts: list[int], widths: list[int], group: ProcessGroup | None
) -> Tensor:
    """Send rank p this rank's columns of its `counts[p]` tokens; return this rank's tokens, [T, V].

    Args:
        slices_Xv: this rank's columns of the tokens of all ranks, in the order of the ranks.
        counts: tokens of every rank.
        widths: columns of every rank; their sum is V.
        group: the ranks that hold the other columns.
    """
    return slices_Xv if group is None else _JoinColumns.apply(slices_Xv, counts, widths, group)


def gather_counts(own: int, group: ProcessGroup | None, device: torch.device) -> list[int]:
    """Return every rank's number, in the order of the ranks. The host waits for the device."""
    if group is None:
        return [own]
    number = torch.full((1,), own, dtype=torch.int64, device=device)
    return HostCopy(gather_padded(number, 1, group).flatten()).numbers()


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
