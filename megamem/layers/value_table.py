"""One [R, V] table, of which this rank holds a shard of rows, columns or both.

Letters: M lookups received here, G bags (the tokens of all ranks), D hidden size, v columns on this
rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megamem.layers.init import WeightFactory
from megamem.metrics import TableMetrics
from megamem.ops import Known, embedding_bag, row_dot, unplace_rows
from megamem.ops.row_buffer import RowBuffer
from megamem.parallel.collectives import group_rank
from megamem.parallel.memory_group import MemoryGroup
from megamem.parallel.row_shard import TableShard
from megamem.read_counter import ReadCounter
from megamem.row_gradient import RowGradient
from megamem.spec import MemorySpec


@dataclass(frozen=True)
class ReceivedLookups:
    """Lookups as received by the rank that holds their rows."""

    rows_M: Tensor
    """Rows of this rank's shard; -1 reads nothing."""
    weights_M: Tensor
    """Weight of each lookup; weights_MO where each core has one."""
    offsets: Tensor
    """[G * Y + 1], where the lookups of each bag start; the last entry is M. The bags of a token,
    one for each block, come one after the other."""
    x_GD: Tensor | None
    """What the variant makes of every token, where it reads tokens; otherwise None."""
    known: Known
    """What is known of the lookups."""
    blocks: int = 1
    """Y, bags of a token."""


def initial_rows(
    spec: MemorySpec, std: float, make: WeightFactory, shard: TableShard
) -> nn.Parameter:
    """Return one shard of a table as it is before training, drawn from N(0, std**2).

    The initial values of a row belong to its pair of sub-keys: they are the same under every
    placement seed. Where several pairs read a row, they belong to the row.
    """
    if spec.expansion * spec.share_layers > 1:
        return make.normal("values", *shard.shape, std=std, shard=shard)
    return make.normal(
        "values",
        *shard.shape,
        std=std,
        shard=shard,
        drawn_as=lambda rows: unplace_rows(rows, spec.num_keys, spec.placement_seed),
    )


class OwnedWeight(nn.Parameter):
    """A weight whose gradient is an optimizer's: autograd, and what asks it, never computes one.

    `requires_grad` is therefore always False, so that DistributedDataParallel and the optimizers of
    a model leave the weight alone. Setting it, as code that freezes parts of a model does, says
    whether the weight is to be trained, which `frozen` tells its optimizer.
    """

    frozen = False
    """Whether requires_grad was last set to False."""

    def __new__(cls, weight: Tensor, requires_grad: bool = False) -> "OwnedWeight":
        """Return a parameter that shares the memory of a tensor; only copying passes a flag."""
        return super().__new__(cls, weight.data, requires_grad=False)

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, trained: bool) -> None:
        self.frozen = not trained

    def requires_grad_(self, requires_grad: bool = True) -> "OwnedWeight":
        """Set whether the weight is to be trained; return it."""
        self.requires_grad = requires_grad
        return self


class ValueTable(nn.Module):
    """R rows of width V, of which this rank holds [r, v].

    `readers` is the number of layers on this rank that read the table.

    By default autograd computes a dense gradient. An optimizer calls accumulate_into() with a
    RowGradient, to which each backward adds the gradients of the touched rows, so that no backward
    allocates a tensor as large as the table, and with a ReadCounter, whose counts are part of the
    model's state.
    """

    def __init__(
        self,
        spec: MemorySpec,
        name: str,
        width: int,
        std: float,
        make: WeightFactory,
        group: MemoryGroup,
    ) -> None:
        """Allocate and initialize this rank's shard.

        Args:
            spec: the memory layers of the run.
            name: name of the table in the model and in checkpoints.
            width: V, the width of a row.
            std: standard deviation of the initial rows.
            make: draws the initial rows.
            group: the ranks over which the table is sharded.
        """
        super().__init__()
        self.name, self.group = name, group
        self.shard = TableShard.cut(
            (spec.num_rows, width),
            row=(group_rank(group.rows), group.row_ranks),
            column=(group_rank(group.columns), group.column_ranks),
        )
        self.core_width = width // spec.cores
        self.check_row_ids = spec.check_row_ids or None
        self.weight = initial_rows(spec, std, make, self.shard)
        self.register_buffer("placement", torch.tensor([spec.placement_seed], device=make.device))
        self.placement: Tensor
        self.gradient: RowGradient | None = None
        self.reads: ReadCounter | None = None
        self.metrics: TableMetrics | None = None
        self.readers = 0

    @property
    def frozen(self) -> bool:
        """Whether its requires_grad was set to False, before an optimizer took the table over."""
        if self.gradient is not None:
            return False
        frozen = getattr(self.weight, "frozen", None)
        return not self.weight.requires_grad if frozen is None else bool(frozen)

    def leave_to_optimizer(self) -> None:
        """Let autograd compute no gradient of the weight, also before an optimizer is made."""
        self.weight = OwnedWeight(self.weight)

    def accumulate_into(self, gradient: RowGradient, reads: ReadCounter | None = None) -> None:
        """Add the gradients of later passes to `gradient`, and count the rows that are read.

        Autograd then computes no gradient of the weight. The counts become buffers of this module.
        """
        self.weight.requires_grad_(False)
        self.gradient, self.reads = gradient, reads
        for name, count in reads.state.items() if reads else ():
            self.register_buffer(name, count)

    def bag(self, received: ReceivedLookups, weights_M: Tensor) -> Tensor:
        """Return bags_Gv, the weighted sum of the rows of each bag.

        With weights_MO each core weights its own columns, of which all have the same number.
        """
        self._mark(received.rows_M)
        return embedding_bag(
            self.weight,
            received.rows_M,
            weights_M,
            received.offsets,
            received.known,
            check_row_ids=self.check_row_ids,
            add_value_grad_to=self._buffer(),
            first_column=self.shard.columns.start,
            core_width=self.core_width,
        )

    def dot(self, received: ReceivedLookups) -> Tensor:
        """Return dots_M, the dot product of each lookup's row with the token of its bag."""
        assert received.x_GD is not None
        self._mark(received.rows_M)
        return row_dot(
            self.weight,
            received.x_GD,
            received.rows_M,
            received.offsets[:: received.blocks],
            received.known,
            check_row_ids=self.check_row_ids,
            add_value_grad_to=self._buffer(),
        )

    def _buffer(self) -> RowBuffer | None:
        """Return the buffer that the backward adds to; None if autograd takes the gradient."""
        if self.gradient is None or not torch.is_grad_enabled():
            return None
        return self.gradient.rows

    def _mark(self, rows_M: Tensor) -> None:
        """Count the rows that are read, in passes that compute gradients."""
        if not torch.is_grad_enabled():
            return
        for observer in (self.reads, self.metrics):
            if observer is not None:
                observer.mark(rows_M)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **more: Any
    ) -> None:
        """Load as any module does; a state without read counts leaves the counts unchanged."""
        for name, count in self.reads.state.items() if self.reads else ():
            state_dict.setdefault(prefix + name, count)
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)
        self.loaded_in_place()

    def loaded_in_place(self) -> None:
        """Take note that the weight and the read counts were loaded."""
        if self.reads:
            self.reads.in_checkpoint = True

    def extra_repr(self) -> str:
        (num_rows, width), (local_rows, local_width) = self.shard.global_shape, self.shard.shape
        return (
            f"{self.name}: rows={num_rows}, width={width}, on {self.group.row_ranks} x "
            f"{self.group.column_ranks} ranks, here {local_rows} x {local_width}"
        )
