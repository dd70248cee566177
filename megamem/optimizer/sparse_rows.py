"""Which rows a batch is learnt in, where a memory is finetuned sparsely.

Lin et al. 2025, "Continual Learning via Sparse Memory Finetuning" (arXiv 2510.15103), section 3:
of the rows that a batch reads, those are trained that it reads much and others read seldom,

    score of a row = lookups of the row / all lookups of the batch * log((B + 1) / (1 + b))

with B batches of the background, of which b read the row. The T rows of the highest score are
trained; of equal scores the smaller row comes first.

Each rank scores the rows that it holds, from counts of the whole batch, and sends the T best scores
to the others; the counts never travel but between replicas:

    rank 0, rows 0-3    0.4 0.1 .          0.4 0.1 0.3 0.2    T = 3: rank 0 trains its first,
    rank 1, rows 4-7    0.3 0.2 .          on every rank      rank 1 its first two

Kept per row while finetuning, beside the table: 8 bytes of lookups, 8 of the logarithm.

Shape key: U rows read, E rows chosen, here; X scores that are compared, from all ranks.
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
    """The rows of this rank that are trained."""

    rows_E: Tensor
    """Local rows, ascending."""

    counts_3: Tensor
    """Their number, their lookups, and the lookups of all rows here, in int64."""


def rarity(hits_r: Tensor, batches: int) -> Tensor:
    """log((B + 1) / (1 + b)) of every row -> [r] in fp64.

    Without a background, B = 0, the logarithm says nothing about any row; it is then 1 for all, so
    that rows are chosen by their lookups alone.

    Args:
        hits_r: b, the background batches that read the row.
        batches: B.
    """
    if batches == 0:
        return torch.ones_like(hits_r, dtype=torch.float64)
    counts, place_of_r = hits_r.unique(return_inverse=True)
    # by the host's log, so that equal counts have equal scores on every rank and device
    logs = [math.log((batches + 1) / (1 + count)) for count in counts.tolist()]
    return torch.tensor(logs, dtype=torch.float64, device=hits_r.device)[place_of_r]


def choose_rows(
    lookups_r: Tensor,
    rarity_r: Tensor,
    limit: int,
    rows: RowShard,
    group: ProcessGroup | None,
) -> Choice:
    """The rows here that are among the `limit` of the highest score of all ranks.

    All rows that were read, where these are fewer. The same rows whatever the number of ranks.

    Args:
        lookups_r: of the whole batch, replicas included.
        rarity_r: of the same rows.
        limit: T.
        rows: which rows these are.
        group: the ranks that hold the others, in their order.
    """
    total = lookups_r.sum()
    if group is not None:
        dist.all_reduce(total, group=group)
    read_U = lookups_r.nonzero().squeeze(1)
    scores_U = lookups_r[read_U].double() / total * rarity_r[read_U]
    # stable sorts: rows are in their order here, and so are ranks in what is gathered
    scores_U, order_U = scores_U.sort(descending=True, stable=True)
    best_E = read_U[order_U[:limit]]
    if group is not None:
        best_E = best_E[: _places_won(scores_U[:limit], limit, rows, group)]
    rows_E = best_E.sort().values
    counts = (torch.full_like(total, len(rows_E)), lookups_r[rows_E].sum(), lookups_r.sum())
    return Choice(rows_E, torch.stack(counts))


def _places_won(scores_E: Tensor, limit: int, rows: RowShard, group: ProcessGroup) -> int:
    """How many of this rank's best scores, the highest first, are among the best of all ranks.

    More than it has, where there are fewer scores than places to win.
    """
    most = -(-rows.num_rows // rows.world_size)
    width, rank = min(limit, most), group_rank(group)
    padded = scores_E.new_full((width,), -math.inf)
    padded[: len(scores_E)] = scores_E
    scores_X = padded.new_empty(width * rows.world_size)
    dist.all_gather_into_tensor(scores_X, padded, group=group)
    winners = scores_X.sort(descending=True, stable=True).indices[:limit]
    return int((winners // width == rank).sum())
