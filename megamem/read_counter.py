"""Read counts: how many batches of a run read each row, and how many lookups of one batch.

Every checkpoint holds, for each row, the number of training batches that read it. These counts are
the background of sparse finetuning (megamem.optimizer.sparse_rows). This rank holds r rows.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

COUNT_DTYPE = torch.int32
"""Dtype of the read counts."""


class ReadCounter:
    """The read counts of a table. An optimizer creates them and passes them to the table.

    Not a module, as it is made after Megatron has wrapped the modules of the model.
    """

    counts: Tensor
    """[r], the number of training batches that read each row; part of the model's state."""
    batches: Tensor
    """[1], the number of all training batches."""
    in_checkpoint: bool
    """Whether the model's state in a checkpoint includes the counts. It is False while a
    checkpoint is loaded that has none, or whose counts are not wanted."""

    def __init__(self, weight: Tensor, *, per_batch: bool = False) -> None:
        """Allocate counts of zero for a weight of r rows.

        Args:
            weight: this rank's shard of the table.
            per_batch: also count the lookups of each batch.
        """
        num_rows, device = len(weight), weight.device
        self.counts = torch.zeros(num_rows, dtype=COUNT_DTYPE, device=device)
        self.batches = torch.zeros(1, dtype=torch.int64, device=device)
        # the last entry is for row -1, which stands for no row
        shape = (num_rows + 1,)
        self._lookups = torch.zeros(shape, dtype=torch.int64, device=device) if per_batch else None
        self.in_checkpoint = True

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors that a table saves and loads with its weights, as buffers of these names."""
        return {"read_counts": self.counts, "batches": self.batches}

    @property
    def lookups(self) -> Tensor:
        """[r] int64, the lookups of each row in the current batch; a view."""
        assert self._lookups is not None, "this counter was made without per_batch=True"
        return self._lookups[:-1]

    def mark(self, rows: Tensor) -> None:
        """Count one lookup for each entry of `rows`; -1 stands for no row."""
        if self._lookups is not None:
            indices = rows.long().remainder(len(self._lookups))
            ones = self._lookups.new_ones(()).expand_as(indices)
            self._lookups.scatter_add_(0, indices, ones)

    def reduce(self, group: ProcessGroup | None) -> None:
        """Sum the lookups of the batch over the replicas, which read other tokens."""
        if group is not None and self._lookups is not None:
            dist.all_reduce(self._lookups, group=group)

    def count_batch(self, touched: Tensor) -> None:
        """Count one training batch, and the rows that it read: [r] bool."""
        self.counts += touched
        self.batches += 1

    def forget_batch(self) -> None:
        """Set the lookups of the batch to zero."""
        if self._lookups is not None:
            self._lookups.zero_()
