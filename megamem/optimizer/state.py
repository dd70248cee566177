"""What each optimizer keeps beside the weights, and how it lies on a rank.

    optimizer        beside the gradient buffer     bytes per parameter of a V-wide row
    adamw            two moments                    8
    lazy_adamw       two moments, two counters      8 + 8 / V
    rowwise_adamw    a moment, one number           4 + 4 / V
    sgd              nothing                        0

A table in bf16 or fp16 has an fp32 master copy (4 more), unless it is rounded stochastically.

Beside every table, whatever its optimizer, 4 bytes a row count the batches that read the row. They
are part of the model in a checkpoint, so that they are there where its optimizer is not loaded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MASTER = "master"

HITS, BATCHES = "hits", "batches"
"""[r], batches of training that read each row, and [1], all of them, as a checkpoint names them."""


@dataclass(frozen=True)
class Slot:
    """One tensor of an optimizer's state."""

    per_row: bool
    """[r] rather than [r, v]."""

    dtype: torch.dtype = torch.float32


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


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums and states of this dtype are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def slots(optimizer: str, weights: torch.dtype, stochastic_rounding: bool) -> dict[str, Slot]:
    """Name -> slot of all state that a table of these weights has."""
    found = dict(SLOTS[optimizer])
    if weights != wide(weights) and not stochastic_rounding:
        found[MASTER] = Slot(False)
    return found


def allocate(weight_rv: Tensor, wanted: dict[str, Slot]) -> dict[str, Tensor]:
    """The state of a table that has made no step: zeros, and its weights where it has a master."""

    def empty(slot: Slot) -> Tensor:
        dtype = wide(weight_rv.dtype) if slot.dtype.is_floating_point else slot.dtype
        shape = weight_rv.shape[:1] if slot.per_row else weight_rv.shape
        return torch.zeros(shape, dtype=dtype, device=weight_rv.device)

    state = {name: empty(slot) for name, slot in wanted.items()}
    if MASTER in state:
        state[MASTER].copy_(weight_rv)
    return state
