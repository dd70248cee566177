"""Sparse finetuning: which rows of a table a batch trains.

Lin et al. 2025, "Continual Learning via Sparse Memory Finetuning" (arXiv 2510.15103), section 3:
a batch trains the rows that it reads often and that the batches of the background read seldom. It
ranks the rows by a TF-IDF score,

    score of a row = lookups of the row / all lookups of the batch * log((B + 1) / (1 + b))

where B is the number of background batches and b the number of those that read the row. The T rows
with the highest scores are trained; of equal scores the smaller row comes first.

Each rank computes the scores of its rows from the lookups of the complete batch, and all-gathers
its T best scores. The lookups themselves are summed over replicas only. With T = 3:

    rank 0, rows 0-3    0.4 0.1 .    gathered: 0.4 0.1 0.3 0.2    rank 0 trains its best row,
    rank 1, rows 4-7    0.3 0.2 .                                 rank 1 its best two

Finetuning keeps 16 bytes per row beside the table: 8 for the lookups, 8 for the logarithm.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megamem.parallel.collectives import group_rank
from megamem.parallel.row_shard import RowShard


@dataclass(frozen=True)
class Choice:
    """The rows of this rank that a batch trains."""

    rows: Tensor
    """Rows of this rank's shard, ascending."""

    counts: Tensor
    """[3] int64: the number of these rows, their lookups, and the lookups of all rows here."""


def inverse_frequency(read_counts: Tensor, batches: int) -> Tensor:
    """Return log((B + 1) / (1 + b)) of every row, [r] in fp64.

    Without a background, that is for B = 0, it is 1 for every row instead of 0, so that rows are
    chosen by their lookups alone.

    Args:
        read_counts: b, the number of background batches that read each row.
        batches: B, the number of all background batches.
    """
    if batches == 0:
        return torch.ones_like(read_counts, dtype=torch.float64)
    counts, index = read_counts.unique(return_inverse=True)
    # computed on the host, so that equal counts have equal scores on every rank and device
    logs = [math.log((batches + 1) / (1 + count)) for count in counts.tolist()]
    return torch.tensor(logs, dtype=torch.float64, device=read_counts.device)[index]


def choose_rows(
    lookups: Tensor,
    inverse_frequencies: Tensor,
    limit: int,
    rows: RowShard,
    group: ProcessGroup | None,
) -> Choice:
    """Return the rows of this rank that are among the `limit` best scores of all ranks.

    If fewer rows were read, all of them are chosen. The number of ranks does not change the choice.

    Args:
        lookups: [r], the lookups of each row in the complete batch, summed over replicas.
        inverse_frequencies: [r], the result of inverse_frequency() for the same rows.
        limit: T, the number of rows to train.
        rows: the rows of this rank.
        group: the ranks that hold the other rows, in their order.
    """
    total = lookups.sum()
    if group is not None:
        dist.all_reduce(total, group=group)
    read_rows = lookups.nonzero().squeeze(1)
    scores = lookups[read_rows].double() / total * inverse_frequencies[read_rows]
    # stable sorts, so that of equal scores the smaller row wins, on one rank and between ranks
    scores, order = scores.sort(descending=True, stable=True)
    best_rows = read_rows[order[:limit]]
    if group is not None:
        best_rows = best_rows[: _rows_won(scores[:limit], limit, rows, group)]
    chosen = best_rows.sort().values
    counts = (torch.full_like(total, len(chosen)), lookups[chosen].sum(), lookups.sum())
    return Choice(chosen, torch.stack(counts))


def _rows_won(scores: Tensor, limit: int, rows: RowShard, group: ProcessGroup) -> int:
    """Return how many of this rank's best scores are among the `limit` best of all ranks.

    The result may exceed len(scores) if all ranks together have fewer than `limit` scores.

    Args:
        scores: the best scores of this rank, descending, at most `limit`.
    """
    most = -(-rows.num_rows // rows.world_size)
    width, rank = min(limit, most), group_rank(group)
    padded = scores.new_full((width,), -math.inf)
    padded[: len(scores)] = scores
    all_scores = padded.new_empty(width * rows.world_size)
    dist.all_gather_into_tensor(all_scores, padded, group=group)
    winners = all_scores.sort(descending=True, stable=True).indices[:limit]
    return int((winners // width == rank).sum())
