"""The interface of what chooses the rows that each token reads.

Letters: T tokens on this rank, L lookups per token, O cores.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from megamem.layers.losses import ScoreLosses


class Keys(nn.Module, ABC):
    """Maps the queries of tokens to the rows that they read and the weights of these."""

    sub_keys: nn.Parameter
    """The sub-keys of both halves: halves, heads, N, and axes of the variant."""

    losses: ScoreLosses | None = None
    """What joins the gradient of the weights in training."""

    @abstractmethod
    def forward(self, query: Tensor, tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Return row_ids_TL, int64 pairs of sub-keys, and weights_TL or, for several cores,
        weights_TLO.

        Args:
            query: the queries of T tokens.
            tokens: number of tokens of all ranks that share the hidden states, for losses over
                them; by default T.
        """
