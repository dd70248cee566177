"""The gradient of a table's rows over one batch, which autograd never sees.

An optimizer makes it and hands it to the table:

    table's forward      mark(rows)                      these rows will have a gradient
    table's backward     adds to `buffer`                touched rows only
    once per batch       scale(factor), reduce(group)    mean over tokens, sum over replicas
                         squared_norm(), count_zeros()   what Megatron asks
                         step reads buffer and touched   then forget(), or take(rows) row by row

Rows that were not touched are zero in the buffer.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# numbers: 256 MB in fp64
BLOCK = 2**25


class RowGradient:
    """factor * buffer[row] is the gradient of each touched row."""

    buffer: Tensor
    """[r, v] sum over the batch's tokens."""

    factor: float | Tensor
    """What the buffer is multiplied by when it is read, so that scaling costs no pass."""

    def __init__(self, weight_rv: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """An empty gradient of these weights; the sums are kept in `dtype`."""
        self.buffer = torch.zeros_like(weight_rv, dtype=dtype)
        self.factor = 1.0
        # the last place is for row -1, which stands for none
        self._touched = torch.zeros(len(weight_rv) + 1, dtype=torch.bool, device=weight_rv.device)

    @property
    def touched_r(self) -> Tensor:
        """Which rows have a gradient; a view."""
        return self._touched[:-1]

    def mark(self, rows_M: Tensor) -> None:
        """These rows are read in a pass that will be learnt from; -1 reads none."""
        self._touched[rows_M] = True

    def scale(self, factor: float | Tensor) -> None:
        """Multiply the gradient by a number, or by one on the device."""
        self.factor = self.factor * factor

    def zero(self) -> None:
        """Empty it: only touched rows are written, as the others are empty."""
        self.buffer[self.touched_r.nonzero().squeeze(1)] = 0
        self.factor = 1.0
        self.forget()

    def forget(self) -> None:
        """The batch is over, and whoever stepped has emptied the buffer."""
        self._touched.zero_()

    def reduce(self, group: ProcessGroup | None) -> None:
        """Sum over ranks that hold the same rows and saw other tokens."""
        if group is None:
            return
        dist.all_reduce(self.buffer, group=group)
        seen = self._touched.to(torch.uint8)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)
        self._touched.copy_(seen)

    def keep(self, rows_E: Tensor) -> None:
        """Drop the gradient of all rows but these."""
        dropped = self._touched.clone()
        dropped[rows_E] = False
        self.buffer[dropped[:-1].nonzero().squeeze(1)] = 0
        self._touched ^= dropped

    def touched_blocks(self) -> Sequence[Tensor]:
        """The touched rows, some at a time, so that their gradients are never copied at once."""
        return self.touched_r.nonzero().squeeze(1).split(self._block_rows())

    def take(self, rows_E: Tensor) -> Tensor:
        """Their part of the buffer -> [E, v], which is empty afterwards."""
        grads_EV = self.buffer[rows_E]
        self.buffer[rows_E] = 0
        return grads_EV

    def squared_norm(self, *, by_row: bool = False) -> Tensor:
        """Sum of squares in fp64, in blocks, as torch makes an fp64 copy of what it is given.

        Not finite where a gradient is not.

        Args:
            by_row: read the touched rows alone, where they are few.
        """
        blocks = (
            (self.buffer[rows_E] for rows_E in self.touched_blocks())
            if by_row
            else self.buffer.split(self._block_rows())
        )
        total = torch.zeros((), dtype=torch.float64, device=self.buffer.device)
        for block in blocks:
            total += torch.linalg.vector_norm(block, dtype=torch.float64).square()
        return total * torch.as_tensor(self.factor, device=total.device).double().square()

    def count_zeros(self) -> Tensor:
        """Elements that are zero, those of rows that were not touched included."""
        return (self.buffer == 0).sum()

    def mean_squares(self, width: int, columns: ProcessGroup | None) -> Tensor | None:
        """[r] of rows whose columns lie on several ranks, before the factor; None for whole rows.

        Args:
            width: of a whole row.
            columns: the ranks that hold the other columns.
        """
        if columns is None:
            return None
        # one row at a time in the reduction, so that no copy of the buffer is made
        compute = torch.promote_types(self.buffer.dtype, torch.float32)
        squares_r = torch.linalg.vector_norm(self.buffer, dim=1, dtype=compute).square_()
        dist.all_reduce(squares_r, group=columns)
        return squares_r / width

    def _block_rows(self) -> int:
        """Rows of which a copy is small beside the table, and large enough to fill a GPU."""
        rows, width = self.buffer.shape
        return max(1, min(-(-rows // 64), BLOCK // width))
