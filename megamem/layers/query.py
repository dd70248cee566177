"""The query network: one query per token and head.

Letters: T tokens on this rank, D hidden size, H heads, Q query width of a head.
"""

import math

from torch import Tensor, nn

from megamem.layers.init import WeightFactory
from megamem.layers.linear import ReplicatedLinear, ReplicatedRMSNorm
from megamem.spec import MemorySpec


class Query(nn.Module):
    """One linear layer from a token to H queries of width Q, optionally RMS-normalized per head.

    The weight starts Xavier uniform, as in the published layer ("Memory Layers at Scale").
    """

    def __init__(self, spec: MemorySpec, make: WeightFactory) -> None:
        super().__init__()
        self.heads = spec.heads
        hidden, width = spec.hidden_size, spec.heads * spec.key_dim
        xavier = math.sqrt(6 / (hidden + width))
        self.linear = ReplicatedLinear(make.uniform("query", width, hidden, bound=xavier), make)
        self.norm = ReplicatedRMSNorm(spec.key_dim, make) if spec.qk_norm else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return query_THQ."""
        query_THQ = self.linear(x_TD).unflatten(-1, (self.heads, -1))
        return query_THQ if self.norm is None else self.norm(query_THQ)
