"""Smaller tables for an exported model: rows in fewer bits, or without those never read.

Both are streamed: a table is read region by region, in the order of the checkpoint, while it is
written. Every row needs all of its columns, so a table that was saved in columns is read by rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megamem.config import ConfigurationError
from megamem.tools.convert.lazy import REGION_BYTES, LazyTensor, Region, computed

# of each dtype: what holds a number, and the largest one; two numbers of int4 are in a byte
KINDS = {
    "int8": (torch.int8, 127.0),
    "fp8": (torch.float8_e4m3fn, 448.0),
    "int4": (torch.uint8, 7.0),
}
SCALE_DTYPE = torch.float32
"""Of the scale of a row. In fp16 the scales of int8 would lose digits where all numbers of a row
are below 8e-3, as weight decay leaves seldom read rows; fp32 costs two bytes of a row more."""


def quantised(table: LazyTensor, kind: str) -> dict[str, LazyTensor]:
    """The tensors "weight" and "scale" of a quantised table.

    A number of a row is the stored one times the row's scale, which is the largest absolute value
    of the row divided by the largest number of the kind.

    Args:
        table: [R, V].
        kind: one of KINDS.
    """
    dtype, _ = KINDS[kind]
    rows, width = table.shape
    stored = width // 2 if kind == "int4" else width
    return {
        "weight": _by_rows(table, (rows, stored), dtype, partial(_numbers, kind=kind)),
        "scale": _by_rows(table, (rows, 1), SCALE_DTYPE, partial(_scales, kind=kind)),
    }


def _scales(rows: Tensor, kind: str) -> Tensor:
    scales = rows.to(SCALE_DTYPE).abs().amax(dim=1, keepdim=True) / KINDS[kind][1]
    if not scales.isfinite().all():
        raise ConfigurationError(
            f"a row of a table holds NaN or infinity, which --table-dtype {kind} cannot hold; "
            "export an earlier iteration, or without --table-dtype."
        )
    return scales


def _numbers(rows: Tensor, kind: str) -> Tensor:
    dtype, largest = KINDS[kind]
    scales = _scales(rows, kind)
    # rows of zeros have scale zero
    found = rows.to(SCALE_DTYPE) / scales.where(scales > 0, 1)
    if kind == "fp8":
        return found.clamp(-largest, largest).to(dtype)
    found = found.round().clamp(-largest, largest)
    if kind == "int8":
        return found.to(dtype)
    # columns 2 i and 2 i + 1 are the lower and the upper half of byte i, plus 8
    halves = (found + 8).to(torch.uint8)
    return halves[:, ::2] | halves[:, 1::2] << 4


def _row_regions(table: LazyTensor) -> list[Region]:
    """Regions of complete rows: those of the table, if they are, so that files are read once."""
    rows, width = table.shape
    if all(region.sizes[1] == width for region in table.regions):
        return [*table.regions]
    step = max(1, REGION_BYTES // (width * table.dtype.itemsize))
    return [Region((r, 0), (min(step, rows - r), width)) for r in range(0, rows, step)]


def _by_rows(
    table: LazyTensor, shape: tuple[int, int], dtype: torch.dtype, made: Callable[[Tensor], Tensor]
) -> LazyTensor:
    """A table of the same rows, made of some complete rows at a time."""
    whole = table.shape[1]
    regions = tuple(
        Region(region.offsets, (region.sizes[0], shape[1])) for region in _row_regions(table)
    )

    def read(region: Region) -> Tensor:
        return made(table.read(Region(region.offsets, (region.sizes[0], whole))))

    return LazyTensor(shape, dtype, regions, read, table.target_rows)


@dataclass(frozen=True)
class Kept:
    """A table without the rows that were never read."""

    tensors: dict[str, LazyTensor]
    """The tensors "weight", [rows, V], and "row_of", [R] in int32: the row of each pair of
    sub-keys, -1 where it was left out."""

    rows: int
    """The rows that are left."""


def without_unread(name: str, table: LazyTensor, counts: Tensor) -> Kept:
    """Leave out the rows of a table that no training batch has read.

    Args:
        name: of the table, for messages.
        table: [R, V] in the order of the checkpoint, with target_rows.
        counts: [R], the batches that read each row, in the same order.

    Raises:
        ConfigurationError: no row was read.
    """
    was_read = counts > 0
    source = was_read.nonzero().flatten()
    if not len(source):
        raise ConfigurationError(
            f"no row of the table {name} has been read in training, so --drop-unread would leave "
            "none; export without it, or a checkpoint that was trained."
        )
    pairs = source if table.target_rows is None else table.target_rows(source)
    row_of_pair = torch.full((len(counts),), -1, dtype=torch.int32)
    row_of_pair[pairs.sort().values] = torch.arange(len(pairs), dtype=torch.int32)
    whole = {}
    start = 0
    for region in _row_regions(table):
        first, count = region.offsets[0], region.sizes[0]
        left = int(was_read[first : first + count].sum())
        if left:
            whole[start] = region
            start += left
    width = table.shape[1]
    ends = [*whole, start][1:]
    regions = tuple(Region((a, 0), (b - a, width)) for a, b in zip(whole, ends, strict=True))

    def rows(region: Region) -> Tensor:
        of = whole[region.offsets[0]]
        return table.read(of)[was_read[of.slices[0]]]

    def target(rows: Tensor) -> Tensor:
        return row_of_pair[pairs[rows]].long()

    weight = LazyTensor((start, width), table.dtype, regions, rows, target)
    row_of = computed((len(counts),), torch.int32, lambda: row_of_pair)
    return Kept({"weight": weight, "row_of": row_of}, start)
