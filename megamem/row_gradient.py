"""The gradient of a table over one batch, accumulated outside of autograd.

An optimizer creates it and passes it to the table:

    backward of the table   adds to `rows`                  touched rows only, which it marks
    once per batch          scale(factor), reduce(group)    mean over tokens, sum over replicas
                            squared_norm(), count_zeros()   for Megatron's norm and its logs
                            the optimizer's step            reads `buffer` and `touched`, then calls
                                                            forget(); or calls take(rows)

What the buffer holds of rows that were not touched is of no account: zeros in form `add` of op
`row_gradient`, undefined numbers in its other forms. Everything that reads complete buffers goes
by `touched`. This rank holds r rows and v columns of a table.

A CUDA graph replays what forward and backward did on the device, and runs none of their Python. So
no number on the host may depend on a pass: whatever a pass adds is in the buffer and in the marks
of rows, and the methods here are called outside of graphs. A loop that replays graphs calls zero()
between a step and the next replay, as Megatron's does before every batch.

What still stands in the way of capturing a memory layer:

    wire alltoall      the host reads the counts of lookups that it sends and receives; allgather
                       has fixed sizes
    tokens_vary        the ranks exchange their numbers of tokens, and the host reads them; a graph
                       needs the same number in each replay
    form merged        keeps the passes of several layers in a list of Python (`Deferred.passes`),
                       which a replay would not fill; forms add and first_touch keep nothing
    --memory-check-row-ids
                       the host reads whether all row ids are in range
    times of passes    are not measured in a graph, so metrics lookup_ms and exchange_ms are missing

Megatron also has to hand the layer to a graph, which `megamem.megatron.startup.features` refuses
until that has run on a GPU.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megamem.ops import forms, squared_norm
from megamem.ops.row_buffer import Deferred, RowBuffer
from megamem.ops.squared_norm import rows_of_a_block
from megamem.ops.value_gradient import add_deferred_
from megamem.parallel.replica_groups import NodeGroups
from megamem.parallel.row_reduction import Block, RowReduction


class RowGradient:
    """The gradient of each touched row is factor * buffer[row]; that of other rows is zero."""

    factor: float | Tensor
    """Multiplies the buffer when it is read, so that scaling needs no pass over the buffer."""

    def __init__(
        self,
        weight: Tensor,
        dtype: torch.dtype = torch.float32,
        *,
        passes: int = 1,
        form: str | None = None,
    ) -> None:
        """Allocate a zero gradient for a weight of shape [r, v], with a buffer in `dtype`.

        Args:
            weight: this rank's shard of the table.
            dtype: dtype of the buffer.
            passes: number of passes of each microbatch that read the table on this rank; form
                `merged` adds their gradients at once.
            form: of op `row_gradient`; by default the one that is selected.
        """
        form = form or forms.pick("row_gradient")
        overwrites = form != "add"
        deferred = Deferred(passes) if form == "merged" and passes > 1 else None
        allocate = torch.empty_like if overwrites else torch.zeros_like
        flags = torch.zeros(len(weight) + 1, dtype=torch.bool, device=weight.device)
        self._rows = RowBuffer(allocate(weight, dtype=dtype), flags, overwrites, deferred)
        self.factor = 1.0
        self._untouched = True
        self._reduction: RowReduction | None = None

    @property
    def rows(self) -> RowBuffer:
        """The buffer that a backward adds to."""
        self._untouched = False
        return self._rows

    @property
    def buffer(self) -> Tensor:
        """[r, v], the sum of gradients over the tokens of the batch; complete after reduce()."""
        self._finish()
        return self._rows.buffer_rV

    @property
    def touched(self) -> Tensor:
        """[r] bool, whether each row has a gradient; a view."""
        add_deferred_(self._rows)
        assert self._rows.touched_r is not None
        return self._rows.touched_r

    @property
    def needs_clearing(self) -> bool:
        """Whether whoever uses the gradient of a row has to set it to zero in the buffer."""
        return not self._rows.overwrites

    def scale(self, factor: float | Tensor) -> None:
        """Multiply the gradient by a number, which may be a tensor on the device."""
        self.factor = self.factor * factor

    def zero(self) -> None:
        """Set the gradient to zero. The host does not wait; after a step there is nothing to do."""
        if self._rows.deferred is not None:
            self._rows.deferred.passes.clear()
        if not self._untouched and self.needs_clearing:
            self.buffer.masked_fill_(self.touched.unsqueeze(1), 0)
        self._finish()
        self.forget()
        # the batch that follows may be replayed by a graph, which does not say so
        self._untouched = False

    def forget(self) -> None:
        """Unmark all rows, whose gradients must have been cleared if that is needed."""
        assert self._rows.flags is not None
        self._rows.flags.zero_()
        self.factor, self._untouched = 1.0, True

    def reduce(
        self,
        group: ProcessGroup | None,
        nodes: NodeGroups | None = None,
        *,
        only_touched: bool = False,
    ) -> None:
        """Start to sum the gradient over replicas, which hold the same shard and read other tokens.

        Every rank of the group must call it, after the pipeline's last microbatch. Whoever reads
        the gradient waits for it; squared_norm() uses each block of rows as it arrives.

        Args:
            group: the replicas; None if there are none.
            nodes: the replicas on one node, and one on each node, to sum over first the ones and
                then the others; None sums over all at once.
            only_touched: send only the rows that any of the replicas touched; the host waits for
                their number.
        """
        if group is not None:
            self._reduction = RowReduction(
                self._rows.buffer_rV,
                self.touched,
                group,
                nodes,
                only_touched=only_touched,
                defined=not self._rows.overwrites,
            )
            # other replicas may have touched rows of which this rank read none
            self._untouched = False

    def keep(self, rows: Tensor) -> None:
        """Set the gradient of all other rows to zero and unmark them."""
        dropped = self.touched.clone()
        dropped[rows] = False
        if self.needs_clearing:
            self.buffer.masked_fill_(dropped.unsqueeze(1), 0)
        self.touched.logical_and_(~dropped)

    def touched_blocks(self) -> Sequence[Tensor]:
        """Return the touched rows in blocks, so that copies of their gradients stay small.

        The host waits for their number.
        """
        return self.touched.nonzero().squeeze(1).split(rows_of_a_block(*self.buffer.shape))

    def take(self, rows: Tensor) -> Tensor:
        """Return a copy of these rows of the buffer, [len(rows), v], and clear them if needed."""
        grads = self.buffer[rows]
        if self.needs_clearing:
            self.buffer[rows] = 0
        return grads

    def squared_norm(self, *, by_row: bool = False) -> Tensor:
        """Return the sum of squares of the gradient in fp64; not finite where a gradient is not.

        Args:
            by_row: the touched rows are few.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.touched.device)
        for block in self._arriving():
            touched = self.touched[block.rows]
            total += squared_norm(
                block.sums_EV, touched, few=by_row, defined=not self._rows.overwrites
            )
        if isinstance(self.factor, Tensor):
            return total * self.factor.to(total.device, torch.float64).square()
        return total * self.factor**2

    def count_zeros(self) -> Tensor:
        """Return the number of zeros in the gradient, rows that were not touched included."""
        return ((self.buffer == 0) | ~self.touched.unsqueeze(1)).sum()

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
        squares = squares.where(self.touched, 0)
        dist.all_reduce(squares, group=columns)
        return squares / width

    def _arriving(self) -> Iterator[Block]:
        """Yield the rows of the gradient in blocks; while it is summed, each as it arrives."""
        add_deferred_(self._rows)
        reduction, self._reduction = self._reduction, None
        if reduction is None:
            yield Block(slice(None), self._rows.buffer_rV)
        else:
            yield from reduction

    def _finish(self) -> None:
        """Complete the gradient: add what is held back, and wait for the sum over the replicas.

        On a GPU the host does not wait.
        """
        for _ in self._arriving():
            pass
