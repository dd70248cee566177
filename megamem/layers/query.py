"""Token -> the queries of its heads."""

import math

from torch import Tensor, nn

from megamem.layers.init import WeightFactory
from megamem.layers.linear import ReplicatedLinear, ReplicatedRMSNorm
from megamem.spec import MemorySpec


class Query(nn.Module):
    """One linear from the token to H queries of width Q; optionally RMS-normalised per head.

    Xavier uniform, as the published layer.
    """

    def __init__(self, spec: MemorySpec, make: WeightFactory) -> None:
        super().__init__()
        self.heads = spec.heads
        hidden, width = spec.hidden_size, spec.heads * spec.key_dim
        xavier = math.sqrt(6 / (hidden + width))
        self.linear = ReplicatedLinear(make.uniform("query", width, hidden, bound=xavier), make)
        self.norm = ReplicatedRMSNorm(spec.key_dim, make) if spec.qk_norm else None

    def forward(self, x_TD: Tensor) -> Tensor:
        query_THQ = self.linear(x_TD).unflatten(-1, (self.heads, -1))
        return query_THQ if self.norm is None else self.norm(query_THQ)
