"""Exchanges lookups and column slices between the ranks that hold columns of the same rows.

rank p of the column ranks         holds [r, v_p], its columns of r rows
gather_lookups                     sends the lookups of all column ranks to all of them
(embedding_bag)                    each rank sums its columns of the rows
join_columns                       sends the column slices back to the rank of the token

Letters: T tokens on this rank, X tokens of all column ranks, L lookups per token, r rows and
v columns on this rank.
"""

from torch import Tensor
from torch.distributed import ProcessGroup

from megamem.parallel.collectives import (
    PendingCollectives,
    gather_padded,
    gather_weights,
    join_padded,
)


def gather_lookups(
    row_ids_TL: Tensor,
    weights_TL: Tensor,
    counts: list[int],
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """All-gather the lookups of the tokens of all column ranks.

    Args:
        row_ids_TL: row ids of the unsharded table, none negative.
        weights_TL: their weights.
        counts: T of every column rank; X is their sum.
        group: the column ranks.

    Returns:
        row_ids_XL: in the dtype of row_ids_TL, which is sent.
        weights_XL: their weights, whose gradient is reduce-scattered.
    """
    if group is None:
        return row_ids_TL, weights_TL
    size, pending = max(counts), PendingCollectives()
    row_ids = gather_padded(row_ids_TL, size, group, pending=pending)
    weights = gather_weights(weights_TL, size, group, pending)
    pending.wait()
    return join_padded(row_ids, counts), join_padded(weights, counts)
