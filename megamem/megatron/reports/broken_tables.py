"""Logs which tables are not finite when Megatron skips a batch."""

import logging
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamem.megatron.optimizer.chain import find_tables

logger = logging.getLogger("megamem")

BLOCK_BYTES = 64 << 20
"""Bytes of a table that are checked at once, so that no copy of all of it is made."""


def report_broken(chunks: Iterable[nn.Module]) -> None:
    """Log every table on this rank that is not finite. This reads complete tables."""
    for name, table in find_tables(chunks).items():
        rows = broken_rows(table.weight)
        if len(rows):
            first = int(rows[0]) + table.shard.rows.start
            logger.error(
                "rank %d: value table %s is not finite in %d of the %d rows on this rank, first in "
                "row %d; every batch that reads these rows is skipped. Stop the run and resume it "
                "from an earlier checkpoint",
                dist.get_rank(),
                name,
                len(rows),
                len(table.weight),
                first,
            )


@torch.no_grad()
def broken_rows(values: Tensor) -> Tensor:
    """Indices of the rows of values [rows, width] that have a number that is not finite."""
    step = max(1, BLOCK_BYTES // max(1, values.shape[1] * values.element_size()))
    finite = torch.cat([block.isfinite().all(1) for block in values.split(step)])
    return (~finite).nonzero().flatten()
