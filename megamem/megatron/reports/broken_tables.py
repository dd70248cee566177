"""Which table made a batch's loss or gradient not finite, said when Megatron skips the batch."""

import logging
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamem.megatron.optimizer.chain import find_tables

logger = logging.getLogger("megamem")

BLOCK_BYTES = 64 << 20
"""Of a table, looked at at once: no copy of it all."""


def report_broken(chunks: Iterable[nn.Module]) -> None:
    """Log, on the rank that holds it, every table that is not finite. Reads whole tables."""
    for name, table in find_tables(chunks).items():
        rows = broken_rows(table.weight)
        if len(rows):
            first = int(rows[0]) + table.shard.rows.start
            logger.error(
                "rank %d: value table %s is not finite in %d of the %d rows here, the first is "
                "row %d; no batch that reads it can be learnt from: stop, and go on from a "
                "checkpoint of before",
                dist.get_rank(),
                name,
                len(rows),
                len(table.weight),
                first,
            )


@torch.no_grad()
def broken_rows(values_rv: Tensor) -> Tensor:
    """Rows, as indices, with a number that is not finite."""
    step = max(1, BLOCK_BYTES // max(1, values_rv.shape[1] * values_rv.element_size()))
    blocks = values_rv.split(step)
    finite_r = torch.cat([block_bv.isfinite().all(1) for block_bv in blocks])
    return (~finite_r).nonzero().flatten()
