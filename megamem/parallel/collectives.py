"""Collectives that autograd can cross. Every pair says what its backward sends.

A group of None stands for this process alone. Counts are Python numbers that every rank knows:
nothing here waits for the device. Where PendingCollectives are given, an exchange only begins, and
its result may be read after pending.wait().
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def group_size(group: ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


class PendingCollectives:
    """Exchanges that have begun and are still to be waited for."""

    def __init__(self) -> None:
        self._pending: list[tuple[Any, Tensor]] = []

    def add(self, work: Any, sent: Tensor) -> None:
        """Take an exchange along; what was sent must live until it has arrived."""
        self._pending.append((work, sent))

    def wait(self) -> None:
        """Return when all have arrived (on a GPU: when later kernels will find them arrived)."""
        for work, _ in self._pending:
            work.wait()
        self._pending.clear()


def exchange(
    x: Tensor,
    send: list[int],
    recv: list[int],
    group: ProcessGroup | None,
    pending: PendingCollectives | None = None,
) -> Tensor:
    """Send `send[p]` leading rows of x to each rank p; return the `recv[p]` rows each sent here.

    No gradient; all_to_all has one.
    """
    if group is None:
        return x
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
    group: ProcessGroup | None,
    fill: float = 0,
    pending: PendingCollectives | None = None,
) -> Tensor:
    """Every rank's x, filled up to `size` rows each: [W, size, ...]. No gradient."""
    padded = x.contiguous()
    if len(x) < size:
        padded = x.new_full((size, *x.shape[1:]), fill)
        padded[: len(x)] = x
    if group is None:
        return padded.unsqueeze(0)
    out = x.new_empty(group_size(group), size, *x.shape[1:])
    wait = pending is None
    work = dist.all_gather_into_tensor(out.flatten(0, 1), padded, group=group, async_op=not wait)
    if pending is not None:
        pending.add(work, padded)
    return out


def join_padded(padded: Tensor, counts: list[int]) -> Tensor:
    """The first counts[p] rows of every part p, one after another; undoes gather_padded's fill."""
    if len(set(counts)) == 1:
        return padded[:, : counts[0]].flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(padded, counts, strict=True)])


def _gather(x: Tensor, counts: list[int], group: ProcessGroup | None) -> Tensor:
    return join_padded(gather_padded(x, max(counts), group), counts)


def _own(x: Tensor, counts: list[int], group: ProcessGroup | None) -> Tensor:
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
    """Forward: all-gather at a fixed size. Backward: reduce-scatter."""

    @staticmethod
    def forward(ctx, x, size, group, pending):  # type: ignore[no-untyped-def]
        ctx.rows, ctx.group = len(x), group
        return gather_padded(x, size, group, pending=pending)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if ctx.group is None:
            return grad[0, : ctx.rows], None, None, None
        out = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous().flatten(0, 1), group=ctx.group)
        return out[: ctx.rows], None, None, None


def _sum_home(bags_GV: Tensor, counts: list[int], group: ProcessGroup | None) -> Tensor:
    """Reduce-scatter, as an all-to-all and a sum.

    The sum is ours so that it runs in fp32 and in rank order: the same bits in every run.
    """
    own = counts[group_rank(group)]
    home = exchange(bags_GV, counts, [own] * len(counts), group)
    accumulate = torch.promote_types(bags_GV.dtype, torch.float32)
    total = home.unflatten(0, (len(counts), own)).sum(0, dtype=accumulate)
    return total.to(bags_GV.dtype)


class _ReduceScatterBags(torch.autograd.Function):
    """Forward: reduce-scatter. Backward: all-gather."""

    @staticmethod
    def forward(ctx, bags_GV, counts, group):  # type: ignore[no-untyped-def]
        ctx.counts, ctx.group = counts, group
        return _sum_home(bags_GV, counts, group)

    @staticmethod
    def backward(ctx, grad_TV):  # type: ignore[no-untyped-def]
        return _gather(grad_TV, ctx.counts, ctx.group), None, None


class _SpreadTokens(torch.autograd.Function):
    """Forward: all-gather at a fixed size. Backward: reduce-scatter."""

    @staticmethod
    def forward(ctx, x, counts, group, pending):  # type: ignore[no-untyped-def]
        ctx.rows, ctx.counts, ctx.group = len(x), counts, group
        return gather_padded(x, max(counts), group, pending=pending)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        home = _sum_home(join_padded(grad, ctx.counts), ctx.counts, ctx.group)
        return home[: ctx.rows], None, None, None


class _JoinColumns(torch.autograd.Function):
    """Forward: all-to-all of column slices, joined. Backward: cut, and the all-to-all back."""

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
        home = exchange(cut, send, recv, ctx.group)
        return home.view(sum(ctx.counts), ctx.widths[rank]), None, None, None


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
    group: ProcessGroup | None,
    pending: PendingCollectives | None = None,
) -> Tensor:
    """exchange() that autograd can cross."""
    return _AllToAll.apply(x, send, recv, group, pending)


def gather_weights(
    x: Tensor, size: int, group: ProcessGroup | None, pending: PendingCollectives | None = None
) -> Tensor:
    """gather_padded() that autograd can cross: [W, size, ...]."""
    return _GatherWeights.apply(x, size, group, pending)


def reduce_scatter_bags(bags_GV: Tensor, counts: list[int], group: ProcessGroup | None) -> Tensor:
    """Send rank p its `counts[p]` partial bags; return the sum of those that came home."""
    return _ReduceScatterBags.apply(bags_GV, counts, group)


def spread_tokens(
    x: Tensor,
    counts: list[int],
    group: ProcessGroup | None,
    pending: PendingCollectives | None = None,
) -> Tensor:
    """Every rank's tokens to all ranks, [W, max(counts), ...]; what they make of them is summed.

    Args:
        x: at most `counts[rank]` rows.
        counts: rows of every rank that are used; the rest is zero.
    """
    return _SpreadTokens.apply(x, counts, group, pending)


def join_columns(
    slices_Xv: Tensor, counts: list[int], widths: list[int], group: ProcessGroup | None
) -> Tensor:
    """Send rank p this rank's columns of its `counts[p]` tokens; join what came home -> [T, V]."""
    return slices_Xv if group is None else _JoinColumns.apply(slices_Xv, counts, widths, group)


def share_counts(own: int, group: ProcessGroup | None, device: torch.device) -> list[int]:
    """Every rank's number, where they are not known beforehand. Waits for the device."""
    if group is None:
        return [own]
    return [int(n) for n in gather_padded(torch.tensor([own], device=device), 1, group).flatten()]


def split_tokens(x: Tensor, counts: list[int], group: ProcessGroup | None) -> Tensor:
    """This rank's `counts[rank]` rows of an x that every rank holds whole."""
    return x if group is None else _SplitTokens.apply(x, counts, group)


def gather_tokens(x: Tensor, counts: list[int], group: ProcessGroup | None) -> Tensor:
    """The whole of which every rank p holds `counts[p]` rows; undoes split_tokens."""
    return x if group is None else _GatherTokens.apply(x, counts, group)


def reduce_gradient(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """x itself; its gradient is summed over the group, as each rank uses x on its own tokens."""
    return x if group is None else _ReduceGradient.apply(x, group)
