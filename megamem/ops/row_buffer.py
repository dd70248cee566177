"""The buffer that receives the gradients of a table's rows over a batch.

Letters: r rows on this rank, V row width, M lookups, G bags.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megamem.ops.checks import check_buffer
from megamem.ops.sort_lookups import Known
from megamem.reference.embedding_bag import Cores


@dataclass(frozen=True)
class Pass:
    """The lookups of one pass through embedding_bag, and the gradient of its bags."""

    grad_GV: Tensor
    row_ids_M: Tensor
    weights: Tensor
    offsets: Tensor
    known: Known
    cores: Cores | None = None


@dataclass
class Deferred:
    """Passes whose gradients are to be added to a buffer together."""

    every: int
    """Number of passes that are added at once."""

    passes: list[Pass] = field(default_factory=list)
    """Those that are held back, first to last."""


@dataclass(frozen=True)
class RowBuffer:
    """Gradients of rows, of which only those of touched rows count.

    A backward adds the gradients of the rows that it touches, and marks them. There are three forms
    of op `row_gradient` (megamem.ops.forms), which give the same sums:

        add             rows that were not touched are zero in the buffer; whoever reads the buffer
                        clears it
        first_touch     the first gradient of a row overwrites the buffer's numbers, which are
                        undefined before: nothing has to be cleared
        merged          the same; where several layers read a table, the gradients of all of them
                        are added in one pass for each microbatch, so that a row that several
                        layers read is accessed once. Only the order of sums differs.
    """

    buffer_rV: Tensor
    """fp32 or bf16 (fp64 for an fp64 table)."""

    flags: Tensor | None = None
    """[r + 1] bool, whether each row was touched; the last is for lookups that read no row. None:
    nothing is marked, and every row is added to."""

    overwrites: bool = False
    """Whether the first gradient of a row overwrites what the buffer holds there."""

    deferred: "Deferred | None" = None
    """Holds the gradients of some passes back, to add them in one; None: each is added at once."""

    @property
    def touched_r(self) -> Tensor | None:
        """bool, whether each row has a gradient; a view."""
        return None if self.flags is None else self.flags[:-1]

    def mark(self, rows: Tensor) -> None:
        """Mark the touched rows. -1, or the number of rows, is no row."""
        if self.flags is not None:
            self.flags.index_fill_(0, rows.long().remainder(len(self.flags)), True)


def anchor_of(buffer: "RowBuffer | None") -> Tensor | None:
    """Return an input for an op whose backward adds to a buffer; None without a buffer.

    It requires a gradient, and gets none: autograd calls a backward only if an input requires one,
    which no other input does where only the table is trained.
    """
    return None if buffer is None else torch.zeros((), requires_grad=True)


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
