"""How often rows are read: over a whole training, and within one batch.

Every checkpoint of a run holds, for each row, the batches of its training that read it. That is the
background that sparse finetuning compares a batch with (megamem.optimizer.sparse_rows).
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

COUNT_DTYPE = torch.int32
"""Of the batches that read a row."""


class ReadCounter:
    """Counts of a table's rows, which an optimizer makes and hands to the table.

    No module: Megatron's wrappers know the modules that there were when they were made.
    """

    counts: Tensor
    """[r] batches of training that read each row, a part of the model's state."""
    batches: Tensor
    """[1] all of them."""
    in_checkpoint: bool
    """False until a checkpoint is loaded that has none, or not those that are wanted."""

    def __init__(self, weight_rv: Tensor, *, per_batch: bool = False) -> None:
        """Count the rows of these weights from zero.

        Args:
            per_batch: count the lookups of each batch, too.
        """
        num_rows, device = len(weight_rv), weight_rv.device
        self.counts = torch.zeros(num_rows, dtype=COUNT_DTYPE, device=device)
        self.batches = torch.zeros(1, dtype=torch.int64, device=device)
        # the last place is for row -1, which stands for none
        shape = (num_rows + 1,)
        self._lookups = torch.zeros(shape, dtype=torch.int64, device=device) if per_batch else None
        self.in_checkpoint = True

    @property
    def state(self) -> dict[str, Tensor]:
        """What a table saves and loads with its weights, as buffers of these names."""
        return {"read_counts": self.counts, "batches": self.batches}

    @property
    def lookups_r(self) -> Tensor:
        """Of the current batch; a view."""
        assert self._lookups is not None, "lookups of a batch are not counted"
        return self._lookups[:-1]

    def mark(self, rows_M: Tensor) -> None:
        """These rows are read, once for each time they stand here; -1 reads none."""
        if self._lookups is not None:
            places_M = rows_M.long().remainder(len(self._lookups))
            ones_M = self._lookups.new_ones(()).expand_as(places_M)
            self._lookups.scatter_add_(0, places_M, ones_M)

    def reduce(self, group: ProcessGroup | None) -> None:
        """Sum the batch's lookups over ranks that hold the same rows and saw other tokens."""
        if group is not None and self._lookups is not None:
            dist.all_reduce(self._lookups, group=group)

    def count_batch(self, touched_r: Tensor) -> None:
        """One more batch of training, which read these rows."""
        self.counts += touched_r
        self.batches += 1

    def forget_batch(self) -> None:
        """The batch is over."""
        if self._lookups is not None:
            self._lookups.zero_()
