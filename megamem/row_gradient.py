"""The gradient of a table over one batch, accumulated outside of autograd.

An optimizer creates it and passes it to the table:

    forward of the table    mark(rows)                      marks rows that get a gradient
    backward of the table   adds to `buffer`                touched rows only
    once per batch          scale(factor), reduce(group)    mean over tokens, sum over replicas
                            squared_norm(), count_zeros()   for Megatron's norm and its logs
                            the optimizer's step            reads `buffer` and `touched`, then calls
                                                            forget(); or calls take(rows)

Rows that were not touched are zero in the buffer. This rank holds r rows and v columns of a table.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megamem.ops import squared_norm
from megamem.ops.squared_norm import rows_of_a_block


class RowGradient:
    """The gradient of each touched row is factor * buffer[row]."""

    buffer: Tensor
    """[r, v], the sum of gradients over the tokens of the batch."""

    factor: float | Tensor
    """Multiplies the buffer when it is read, so that scaling needs no pass over the buffer."""

    def __init__(self, weight: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """Allocate a zero gradient for a weight of shape [r, v], with a buffer in `dtype`."""
        self.buffer = torch.zeros_like(weight, dtype=dtype)
        self.factor = 1.0
        # the last entry is for row -1, which stands for no row
        self._touched = torch.zeros(len(weight) + 1, dtype=torch.bool, device=weight.device)

    @property
    def touched(self) -> Tensor:
        """[r] bool, whether each row has a gradient; a view."""
        return self._touched[:-1]

    def mark(self, rows: Tensor) -> None:
        """Mark rows that a pass with a backward reads; -1 stands for no row."""
        self._touched[rows] = True

    def scale(self, factor: float | Tensor) -> None:
        """Multiply the gradient by a number, which may be a tensor on the device."""
        self.factor = self.factor * factor

    def zero(self) -> None:
        """Set the gradient to zero. Only touched rows are written, as the others are zero."""
        self.buffer[self.touched.nonzero().squeeze(1)] = 0
        self.factor = 1.0
        self.forget()

    def forget(self) -> None:
        """Unmark all rows. The buffer must be zero, which the optimizer's step leaves it."""
        self._touched.zero_()

    def reduce(self, group: ProcessGroup | None) -> None:
        """Sum the gradient over replicas, which hold the same shard and read other tokens."""
        if group is None:
            return
        dist.all_reduce(self.buffer, group=group)
        touched = self._touched.to(torch.uint8)
        dist.all_reduce(touched, op=dist.ReduceOp.MAX, group=group)
        self._touched.copy_(touched)

    def keep(self, rows: Tensor) -> None:
        """Set the gradient of all other rows to zero and unmark them."""
        dropped = self._touched.clone()
        dropped[rows] = False
        self.buffer[dropped[:-1].nonzero().squeeze(1)] = 0
        self._touched ^= dropped

    def touched_blocks(self) -> Sequence[Tensor]:
        """Return the touched rows in blocks, so that copies of their gradients stay small."""
        return self.touched.nonzero().squeeze(1).split(rows_of_a_block(*self.buffer.shape))

    def take(self, rows: Tensor) -> Tensor:
        """Return a copy of these rows of the buffer, [len(rows), v], and set them to zero in it."""
        grads = self.buffer[rows]
        self.buffer[rows] = 0
        return grads

    def squared_norm(self, *, by_row: bool = False) -> Tensor:
        """Return the sum of squares of the gradient in fp64; not finite where a gradient is not.

        Args:
            by_row: the touched rows are few.
        """
        total = squared_norm(self.buffer, self.touched, few=by_row)
        return total * torch.as_tensor(self.factor, device=total.device).double().square()

    def count_zeros(self) -> Tensor:
        """Return the number of zeros in the gradient, rows that were not touched included."""
        return (self.buffer == 0).sum()

    def mean_squares(self, width: int, columns: ProcessGroup | None) -> Tensor | None:
        """Return each row's mean square over all of its columns, [r], without the factor.

        Args:
            width: V, the columns of the unsharded table.
            columns: the ranks that hold the other columns; None if this rank holds all of them.

        Returns:
            None if this rank holds all columns.
        """
        if columns is None:
            return None
        # a norm over one dimension makes no copy of the buffer in another dtype
        compute = torch.promote_types(self.buffer.dtype, torch.float32)
        squares = torch.linalg.vector_norm(self.buffer, dim=1, dtype=compute).square_()
        dist.all_reduce(squares, group=columns)
        return squares / width
