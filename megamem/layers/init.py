"""Initial weights that depend only on the seed, the name of the weight and the row.

Every rank therefore draws the same numbers for a row, whatever the parallel sizes, and draws only
the rows of its own shard.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megamem.ops import random_rows
from megamem.parallel.collectives import GradientGroup
from megamem.parallel.row_shard import TableShard

# numbers drawn at a time, so that the fp64 copies stay small beside the memory of a device
_BLOCK = 2**22


@dataclass(frozen=True, kw_only=True)
class WeightFactory:
    """Makes the initialized parameters of one layer or one table."""

    seed: int
    """The seed of the run."""

    name: str
    """Name of the layer or table in the model; different names draw different numbers."""

    gradient_group: GradientGroup | None = None
    """Ranks that hold these weights and use them on different tokens, so that the gradients must be
    summed over them. None: the gradients are not summed."""

    device: torch.device | str | int | None = None
    """Device of the parameters; on the meta device nothing is drawn."""

    dtype: torch.dtype | None = None
    """Dtype of the parameters; numbers are drawn in fp64 and rounded to it."""

    def normal(
        self,
        name: str,
        *shape: int,
        std: float,
        shard: TableShard | None = None,
        drawn_as: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> nn.Parameter:
        """Return a parameter of the given shape, drawn from N(0, std**2).

        Args:
            name: name of the weight within the layer or table.
            shape: shape of the tensor, this rank's shard of it where there is a shard.
            std: standard deviation.
            shard: the position of the tensor in an unsharded [R, V] table; None for all of it.
            drawn_as: maps row ids of the unsharded table to the row numbers that the random numbers
                are drawn for. By default a row is drawn for its own id.
        """
        return self._random(name, shape, std, "normal", shard, drawn_as)

    def uniform(self, name: str, *shape: int, bound: float, center: float = 0) -> nn.Parameter:
        """Return a parameter of the given shape, drawn from U(center - bound, center + bound)."""
        drawn = self._random(name, shape, bound, "uniform")
        if center:
            drawn.data += center
        return drawn

    def constant(self, *shape: int, value: float) -> nn.Parameter:
        """Return a parameter of the given shape, filled with one value."""
        return nn.Parameter(torch.full(shape, float(value), device=self.device, dtype=self.dtype))

    def _random(
        self,
        name: str,
        shape: tuple[int, ...],
        scale: float,
        distribution: Literal["normal", "uniform"],
        shard: TableShard | None = None,
        drawn_as: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> nn.Parameter:
        tensor = torch.empty(shape, device=self.device, dtype=self.dtype)
        if not tensor.is_meta:
            rows = tensor.view(-1, shape[-1])
            first, columns, width = 0, slice(None), shape[-1]
            if shard is not None:
                first, columns, width = shard.offset[0], shard.columns, shard.global_shape[1]
            stream = zlib.crc32(f"{self.name}.{name}".encode())
            step = max(1, _BLOCK // width)
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                ids = torch.arange(len(part), device=part.device) + (first + start)
                drawn = random_rows(drawn_as(ids), width, self.seed, stream, distribution)
                part.copy_(drawn[:, columns] * scale)
        return nn.Parameter(tensor)
