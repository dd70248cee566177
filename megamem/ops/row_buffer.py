"""The buffer that receives the gradients of a table's rows over a batch.

Letters: r rows on this rank, V row width.
"""

from dataclasses import dataclass

from torch import Tensor

from megamem.ops.checks import check_buffer


@dataclass(frozen=True)
class RowBuffer:
    """Gradients of rows, of which only those of touched rows count.

    A backward adds the gradients of the rows that it touches, and marks them. There are two forms
    of op `row_gradient` (megamem.ops.forms), which give the same sums:

        add             rows that were not touched are zero in the buffer; whoever reads the buffer
                        clears it
        first_touch     the first gradient of a row overwrites the buffer's numbers, which are
                        undefined before: nothing has to be cleared
    """

    buffer_rV: Tensor
    """fp32 or bf16 (fp64 for an fp64 table)."""

    flags: Tensor | None = None
    """[r + 1] bool, whether each row was touched; the last is for lookups that read no row. None:
    nothing is marked, and every row is added to."""

    overwrites: bool = False
    """Whether the first gradient of a row overwrites what the buffer holds there."""

    @property
    def touched_r(self) -> Tensor | None:
        """bool, whether each row has a gradient; a view."""
        return None if self.flags is None else self.flags[:-1]

    def mark(self, rows: Tensor) -> None:
        """Mark the touched rows. -1, or the number of rows, is no row."""
        if self.flags is not None:
            self.flags.index_fill_(0, rows.long().remainder(len(self.flags)), True)


def as_row_buffer(buffer: "RowBuffer | Tensor | None", values_rV: Tensor) -> "RowBuffer | None":
    """Return the buffer of `add_value_grad_to`; a tensor is a buffer without flags.

    Raises:
        ValueError: if shape, device or dtype do not fit the table.
    """
    if buffer is None:
        return None
    if isinstance(buffer, Tensor):
        buffer = RowBuffer(buffer)
    check_buffer(buffer.buffer_rV, values_rV)
    return buffer
