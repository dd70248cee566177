"""Sums rows of gradients over ranks that hold the same rows, block by block.

It is the one way in which megamem sums what several ranks hold of a table: the replicas of a shard
in other memory groups, of the same pipeline stage and of others. It follows three rules:

- It runs once per batch, in the optimizer's step. By then every pipeline stage has sent and
  received all activations and gradients, so none of these collectives stands between two of those,
  where it could deadlock with CUDA_DEVICE_MAX_CONNECTIONS=1.
- Every rank of the group starts the same blocks in the same order. Blocks depend on the shape of
  the shard alone, or on the rows that any of the ranks touched, which are the same on each.
- What has arrived is used at once: blocks are given out in order, each as soon as it is complete,
  while those after it are on the way.

A sum is one all-reduce, or where nodes hold several replicas each (see replica_groups) three steps:
a reduce-scatter inside the node, an all-reduce of the parts across nodes, an all-gather inside. Up
to three blocks are on the way, each a step ahead of the next, so that one block crosses the network
while its neighbours are inside nodes. The order in which the replicas of a number are summed is
fixed, and all of them get the same bits, as the all-reduce gives them to the ranks of its group and
the all-gather hands them on.

The sum of all rows is made in place. The sum of touched rows alone needs their number, for which
the host waits once, and sends a copy of these rows, block by block.

Letters: r rows on this rank, V row width, E rows of a block.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megamem.parallel.replica_groups import NodeGroups

BLOCK_BYTES = 64 << 20
"""Bytes of a block: enough for the bandwidth of any network, few enough for copies to be small."""

IN_FLIGHT = 3
"""Blocks that are on the way while one is used: as many as a sum has steps."""


@dataclass(frozen=True)
class Block:
    """Some rows whose sum has arrived."""

    rows: slice | Tensor
    """Which rows of the shard these are."""

    sums_EV: Tensor
    """The sums, which are in the buffer as well."""


class _Transfer:
    """A tensor that is being summed over the replicas in place, one step after another."""

    def __init__(
        self, x: Tensor, group: ProcessGroup, nodes: NodeGroups | None, op: Any = dist.ReduceOp.SUM
    ) -> None:
        """Start the first step; x is contiguous."""
        self._x, self._whole = x, x.view(-1)
        self._steps: deque[Callable[..., Any]] = deque()
        if nodes is None:
            self._steps.append(partial(dist.all_reduce, x, op=op, group=group))
        else:
            inside = nodes.inside
            ranks = dist.get_world_size(inside)
            if missing := -x.numel() % ranks:
                # of a sum only the last block, as the others have a multiple of `ranks` rows
                self._whole = torch.nn.functional.pad(self._whole, (0, missing))
            whole, part = self._whole, self._whole.new_empty(len(self._whole) // ranks)
            self._steps.extend(
                [
                    partial(dist.reduce_scatter_tensor, part, whole, op=op, group=inside),
                    partial(dist.all_reduce, part, op=op, group=nodes.across),
                    partial(dist.all_gather_into_tensor, whole, part, group=inside),
                ]
            )
        self._start()

    def advance(self) -> None:
        """Start the next step, if there is one, when the last has ended; on a GPU the host goes on.

        On a GPU it is the current stream that waits.
        """
        if self._steps:
            self._work.wait()
            self._start()

    def finish(self) -> None:
        """Make all steps that are left, and wait for them."""
        while self._steps:
            self.advance()
        self._work.wait()
        if len(self._whole) > self._x.numel():
            self._x.view(-1).copy_(self._whole[: self._x.numel()])

    def _start(self) -> None:
        self._work = self._steps.popleft()(async_op=True)


class RowReduction:
    """Iterates over the blocks of one sum; the first blocks are sent when it is made.

    All ranks of the group must make it, and iterate to the end.
    """

    def __init__(
        self,
        buffer_rV: Tensor,
        touched_r: Tensor,
        group: ProcessGroup,
        nodes: NodeGroups | None = None,
        *,
        only_touched: bool,
        defined: bool,
    ) -> None:
        """Send the flags and the first blocks.

        Args:
            buffer_rV: the gradients; they become the sums.
            touched_r: bool, whether each row has a gradient on this rank; becomes whether it has
                one on any rank.
            group: the ranks that hold these rows.
            nodes: those of them on one node, and one on each node; None sums over `group` in one
                step.
            only_touched: send only rows that any of the ranks touched; the host waits for their
                number.
            defined: whether the gradients of rows that were not touched are zero. Otherwise their
                numbers are undefined and count as zero.
        """
        self.buffer_rV, self.group, self.nodes = buffer_rV, group, nodes
        self.only_touched, self.defined = only_touched, defined
        # not every backend reduces bool
        flags = touched_r.to(torch.uint8)
        self.own_r = touched_r.clone()
        _Transfer(flags, group, nodes, dist.ReduceOp.MAX).finish()
        touched_r.copy_(flags)
        self._rows = iter(self._blocks(touched_r))
        self._sent: deque[tuple[slice | Tensor, Tensor, _Transfer]] = deque()
        for _ in range(IN_FLIGHT):
            self._send()

    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks in order, each when its sum has arrived; on a GPU the host goes on."""
        while self._sent:
            rows, sums_EV, transfer = self._sent.popleft()
            transfer.finish()
            if isinstance(rows, Tensor):
                self.buffer_rV.index_copy_(0, rows, sums_EV)
            self._send()
            yield Block(rows, sums_EV)

    def _blocks(self, touched_r: Tensor) -> Iterator[slice | Tensor]:
        num_rows, width = self.buffer_rV.shape
        step = max(1, BLOCK_BYTES // (width * self.buffer_rV.element_size()))
        if self.nodes is not None:
            ranks = dist.get_world_size(self.nodes.inside)
            step = -(-step // ranks) * ranks
        if self.only_touched:
            rows = touched_r.nonzero().squeeze(1)
            yield from rows.split(step) if len(rows) else ()
            return
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows))

    def _send(self) -> None:
        """Start the next block, and the next step of those before it, the first of them first."""
        for _, _, transfer in self._sent:
            transfer.advance()
        rows = next(self._rows, None)
        if rows is None:
            return
        # a slice is a view, so that its sum is made in place
        part_EV, untouched_E1 = self.buffer_rV[rows], ~self.own_r[rows].unsqueeze(1)
        if not self.defined:
            part_EV.masked_fill_(untouched_E1, 0)
        self._sent.append((rows, part_EV, _Transfer(part_EV, self.group, self.nodes)))
