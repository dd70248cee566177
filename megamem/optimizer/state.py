"""The state that each optimizer keeps for a table, sharded as the table is.

    optimizer        state beside the gradient buffer            bytes per parameter, row width V
    adamw            two moments                                 8
    lazy_adamw       two moments, two counters per row           8 + 8 / V
    rowwise_adamw    one moment, one second moment per row       4 + 4 / V
    sgd              none                                        0

A table in bf16 or fp16 also has an fp32 master copy (4 bytes per parameter), unless it is rounded
stochastically.

With every optimizer, a read count per row takes 4 bytes. Read counts are saved with the model and
not with the optimizer, so that they are loaded where the optimizer's state is not. This rank holds
r rows and v columns of a table.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MASTER = "master"
"""Name of the fp32 master copy."""

HITS, BATCHES = "hits", "batches"
"""Names in a checkpoint of the read counts, [r], and of the number of all training batches, [1]."""


@dataclass(frozen=True)
class Slot:
    """One tensor of an optimizer's state."""

    per_row: bool
    """Whether its shape is [r] rather than [r, v]."""

    dtype: torch.dtype = torch.float32
    """Its dtype; fp32 becomes fp64 for a table in fp64."""


SLOTS: dict[str, dict[str, Slot]] = {
    "adamw": {"exp_avg": Slot(False), "exp_avg_sq": Slot(False)},
    "lazy_adamw": {
        "exp_avg": Slot(False),
        "exp_avg_sq": Slot(False),
        "touches": Slot(True, torch.int32),
        "last_steps": Slot(True, torch.int32),
    },
    "rowwise_adamw": {"exp_avg": Slot(False), "exp_avg_sq": Slot(True)},
    "sgd": {},
}
"""Optimizer -> name -> tensor of its state, without the master copy."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and states for weights of a dtype: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def slots(optimizer: str, weights: torch.dtype, stochastic_rounding: bool) -> dict[str, Slot]:
    """Return name -> slot of the state of a table whose weights have the given dtype."""
    found = dict(SLOTS[optimizer])
    if weights != wide(weights) and not stochastic_rounding:
        found[MASTER] = Slot(False)
    return found


def allocate(weight: Tensor, wanted: dict[str, Slot]) -> dict[str, Tensor]:
    """Return the state of a table before the first step: zeros, and the weights as the master."""

    def empty(slot: Slot) -> Tensor:
        dtype = wide(weight.dtype) if slot.dtype.is_floating_point else slot.dtype
        shape = weight.shape[:1] if slot.per_row else weight.shape
        return torch.zeros(shape, dtype=dtype, device=weight.device)

    state = {name: empty(slot) for name, slot in wanted.items()}
    if MASTER in state:
        state[MASTER].copy_(weight)
    return state
