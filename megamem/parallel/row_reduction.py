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

The sum of all rows is made in place. The sum of touched rows alone needs their number, for which
the host waits once, and sends a copy of these rows, block by block.

Letters: r rows on this rank, V row width, E rows of a block.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

BLOCK_BYTES = 64 << 20
"""Bytes of a block: enough for the bandwidth of any network, few enough for copies to be small."""

IN_FLIGHT = 3
"""Blocks that are on the way while one is used."""


@dataclass(frozen=True)
class Block:
    """Some rows whose sum has arrived."""

    rows: slice | Tensor
    """Which rows of the shard these are."""

    sums_EV: Tensor
    """The sums, which are in the buffer as well."""


class RowReduction:
    """Iterates over the blocks of one sum; the first blocks are sent when it is made.

    All ranks of the group must make it, and iterate to the end.
    """

    def __init__(
        self,
        buffer_rV: Tensor,
        touched_r: Tensor,
        group: ProcessGroup,
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
            only_touched: send only rows that any of the ranks touched; the host waits for their
                number.
            defined: whether the gradients of rows that were not touched are zero. Otherwise their
                numbers are undefined and count as zero.
        """
        self.buffer_rV, self.group = buffer_rV, group
        self.only_touched, self.defined = only_touched, defined
        # not every backend reduces bool
        flags = touched_r.to(torch.uint8)
        self.own_r = touched_r.clone()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        touched_r.copy_(flags)
        self._rows = iter(self._blocks(touched_r))
        self._sent: deque[tuple[slice | Tensor, Tensor, Any]] = deque()
        for _ in range(IN_FLIGHT):
            self._send()

    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks in order, each when its sum has arrived; on a GPU the host goes on."""
        while self._sent:
            rows, sums_EV, work = self._sent.popleft()
            work.wait()
            if isinstance(rows, Tensor):
                self.buffer_rV.index_copy_(0, rows, sums_EV)
            self._send()
            yield Block(rows, sums_EV)

    def _blocks(self, touched_r: Tensor) -> Iterator[slice | Tensor]:
        num_rows, width = self.buffer_rV.shape
        step = max(1, BLOCK_BYTES // (width * self.buffer_rV.element_size()))
        if self.only_touched:
            rows = touched_r.nonzero().squeeze(1)
            yield from rows.split(step) if len(rows) else ()
            return
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows))

    def _send(self) -> None:
        rows = next(self._rows, None)
        if rows is None:
            return
        # a slice is a view, so that its sum is made in place
        part_EV, untouched_E1 = self.buffer_rV[rows], ~self.own_r[rows].unsqueeze(1)
        if not self.defined:
            part_EV.masked_fill_(untouched_E1, 0)
        work = dist.all_reduce(part_EV, group=self.group, async_op=True)
        self._sent.append((rows, part_EV, work))
