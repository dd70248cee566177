"""Initial weights that are a function of (seed, name, row) and of nothing else.

However a model is spread over ranks, every rank draws the same numbers for the same row, and no
rank ever holds a row that is not its own.
"""

import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megamem.ops import random_rows

# rows are drawn in blocks of this many numbers, so that fp64 draws never fill the device
_BLOCK = 2**22


@dataclass(frozen=True, kw_only=True)
class WeightFactory:
    """Makes the parameters of one layer, or of one table."""

    seed: int
    """Of the run."""

    name: str
    """Of the layer or table in the model; two names never share numbers."""

    gradient_group: ProcessGroup | None = None
    """Ranks that use these weights on tokens of their own, and whose gradients must be summed."""

    device: torch.device | str | int | None = None
    dtype: torch.dtype | None = None

    def normal(self, name: str, *shape: int, std: float, first_row: int = 0) -> nn.Parameter:
        """N(0, std). The tensor's first row is row `first_row` of a larger one."""
        return self._random(name, shape, std, "normal", first_row)

    def uniform(self, name: str, *shape: int, bound: float) -> nn.Parameter:
        """U(-bound, bound)."""
        return self._random(name, shape, bound, "uniform", 0)

    def constant(self, *shape: int, value: float) -> nn.Parameter:
        return nn.Parameter(torch.full(shape, float(value), device=self.device, dtype=self.dtype))

    def _random(
        self,
        name: str,
        shape: tuple[int, ...],
        scale: float,
        distribution: Literal["normal", "uniform"],
        first_row: int,
    ) -> nn.Parameter:
        tensor = torch.empty(shape, device=self.device, dtype=self.dtype)
        if not tensor.is_meta:
            stream = zlib.crc32(f"{self.name}.{name}".encode())
            _fill_(tensor.view(-1, shape[-1]), scale, self.seed, stream, distribution, first_row)
        return nn.Parameter(tensor)


def _fill_(
    rows: Tensor,
    scale: float,
    seed: int,
    stream: int,
    distribution: Literal["normal", "uniform"],
    first_row: int,
) -> None:
    step = max(1, _BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        ids = torch.arange(len(part), device=part.device) + (first_row + start)
        part.copy_(random_rows(ids, part.shape[1], seed, stream, distribution) * scale)
