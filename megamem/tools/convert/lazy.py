"""Tensors that are read piece by piece, when somebody writes them elsewhere.

A conversion is a function from names to LazyTensors to other names and LazyTensors: it moves no
data. Whoever writes the result reads each region once and drops it, so that what is larger than
memory passes through.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

REGION_BYTES = 2**28


@dataclass(frozen=True)
class Region:
    """A box of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def all_of(cls, shape: tuple[int, ...]) -> "Region":
        return cls((0,) * len(shape), shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        pairs = zip(self.offsets, self.sizes, strict=True)
        return tuple(slice(start, start + size) for start, size in pairs)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of which only shape and dtype are here."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    regions: tuple[Region, ...]
    """What to read at once; they cover the tensor without overlap."""
    read: Callable[[Region], Tensor]
    """One of the regions, in this dtype, on the CPU; of a tensor in a file, any region."""
    target_rows: Callable[[Tensor], Tensor] | None = None
    """Where rows are to lie in what is written, if elsewhere."""

    @property
    def num_bytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count

    def whole(self) -> Tensor:
        """All of it, in memory; for what is known to be small. target_rows are not heeded."""
        if len(self.regions) == 1:
            return self.read(self.regions[0])
        tensor = torch.empty(self.shape, dtype=self.dtype)
        for region in self.regions:
            tensor[region.slices] = self.read(region)
        return tensor

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The same numbers, rounded; integers stay."""
        if not self.dtype.is_floating_point or dtype == self.dtype:
            return self
        return LazyTensor(
            self.shape,
            dtype,
            self.regions,
            lambda region: self.read(region).to(dtype),
            self.target_rows,
        )


Tensors = Mapping[str, LazyTensor]


def computed(shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> LazyTensor:
    """A tensor small enough to be made at once, when it is asked for."""
    return LazyTensor(shape, dtype, (Region.all_of(shape),), lambda region: make())


def of_tensor(tensor: Tensor) -> LazyTensor:
    """A tensor that is there, or mapped from a file."""
    return LazyTensor(
        tuple(tensor.shape),
        tensor.dtype,
        (Region.all_of(tuple(tensor.shape)),),
        lambda region: tensor[region.slices],
    )


def of_rows(
    shape: tuple[int, int], dtype: torch.dtype, rows: Callable[[Tensor], Tensor]
) -> LazyTensor:
    """A table that is made some rows at a time.

    Args:
        rows: row ids -> these rows.
    """
    step = max(1, REGION_BYTES // (shape[1] * dtype.itemsize))
    regions = tuple(
        Region((start, 0), (min(step, shape[0] - start), shape[1]))
        for start in range(0, shape[0], step)
    )

    def read(region: Region) -> Tensor:
        start = region.offsets[0]
        return rows(torch.arange(start, start + region.sizes[0]))

    return LazyTensor(shape, dtype, regions, read)
