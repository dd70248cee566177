"""Tensors that are read region by region while the result of a conversion is written.

A conversion maps names and LazyTensors to other names and LazyTensors and moves no data. The writer
reads each region once and then frees it, so tensors may be larger than memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

REGION_BYTES = 2**28


@dataclass(frozen=True)
class Region:
    """A rectangular part of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def all_of(cls, shape: tuple[int, ...]) -> "Region":
        """The region that covers a complete tensor."""
        return cls((0,) * len(shape), shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index of the region in its tensor."""
        pairs = zip(self.offsets, self.sizes, strict=True)
        return tuple(slice(start, start + size) for start, size in pairs)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape and dtype are known, and whose numbers are read on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    regions: tuple[Region, ...]
    """The regions to read one by one; they cover the tensor without overlap."""
    read: Callable[[Region], Tensor]
    """Returns one of the regions in this dtype on the CPU; for a tensor in a file, any region."""
    target_rows: Callable[[Tensor], Tensor] | None = None
    """Row ids -> their row ids in the file that is written; None if they stay."""

    @property
    def num_bytes(self) -> int:
        """The size of the complete tensor."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count

    def whole(self) -> Tensor:
        """The complete tensor in memory, for tensors that are known to be small.

        target_rows is ignored.
        """
        if len(self.regions) == 1:
            return self.read(self.regions[0])
        tensor = torch.empty(self.shape, dtype=self.dtype)
        for region in self.regions:
            tensor[region.slices] = self.read(region)
        return tensor

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The same tensor, rounded to a dtype; integers are not converted."""
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
    """A small tensor that is computed when it is read."""
    return LazyTensor(shape, dtype, (Region.all_of(shape),), lambda region: make())


def of_tensor(tensor: Tensor) -> LazyTensor:
    """A tensor in memory, or memory-mapped from a file."""
    return LazyTensor(
        tuple(tensor.shape),
        tensor.dtype,
        (Region.all_of(tuple(tensor.shape)),),
        lambda region: tensor[region.slices],
    )


def of_rows(
    shape: tuple[int, int], dtype: torch.dtype, rows: Callable[[Tensor], Tensor]
) -> LazyTensor:
    """A table that is computed some rows at a time.

    Args:
        shape: of the table.
        dtype: of the table.
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
