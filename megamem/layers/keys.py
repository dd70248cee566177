"""The interface of what chooses the rows that each token reads.

Letters: T tokens on this rank, L lookups per token, O cores.
"""

from torch import Tensor, nn


class Keys(nn.Module):
    """Maps the queries of tokens to the rows that they read and the weights of these."""

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return row_ids_TL, int64 pairs of sub-keys, and weights_TL or, for several cores,
        weights_TLO."""
        raise NotImplementedError
