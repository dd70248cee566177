"""Initial weights that are a function of (seed, name, row) and of nothing else.

However a model is spread over ranks, every rank draws the same numbers for the same row, and no
rank ever holds a row that is not its own.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megamem.ops import random_rows
from megamem.parallel.row_shard import TableShard

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

    def normal(
        self,
        name: str,
        *shape: int,
        std: float,
        piece: TableShard | None = None,
        name_rows: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> nn.Parameter:
        """N(0, std).

        Args:
            name: of the weight.
            shape: of the tensor.
            std: standard deviation.
            piece: what the tensor is of a larger one.
            name_rows: row of the larger one -> the number that its values depend on.
        """
        return self._random(name, shape, std, "normal", piece, name_rows)

    def uniform(self, name: str, *shape: int, bound: float) -> nn.Parameter:
        """U(-bound, bound)."""
        return self._random(name, shape, bound, "uniform")

    def constant(self, *shape: int, value: float) -> nn.Parameter:
        return nn.Parameter(torch.full(shape, float(value), device=self.device, dtype=self.dtype))

    def _random(
        self,
        name: str,
        shape: tuple[int, ...],
        scale: float,
        distribution: Literal["normal", "uniform"],
        piece: TableShard | None = None,
        name_rows: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> nn.Parameter:
        tensor = torch.empty(shape, device=self.device, dtype=self.dtype)
        if not tensor.is_meta:
            rows = tensor.view(-1, shape[-1])
            first, columns, width = 0, slice(None), shape[-1]
            if piece is not None:
                first, columns, width = piece.offset[0], piece.columns, piece.global_shape[1]
            stream = zlib.crc32(f"{self.name}.{name}".encode())
            step = max(1, _BLOCK // width)
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                ids = torch.arange(len(part), device=part.device) + (first + start)
                drawn = random_rows(name_rows(ids), width, self.seed, stream, distribution)
                part.copy_(drawn[:, columns] * scale)
        return nn.Parameter(tensor)
