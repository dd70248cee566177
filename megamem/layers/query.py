"""Token -> the queries of its heads."""

import math

from torch import Tensor, nn

from megamem.config import MemoryConfig
from megamem.layers.init import WeightFactory
from megamem.layers.linear import ReplicatedLinear, ReplicatedRMSNorm


class Query(nn.Module):
    """One linear from the token to H queries of width Q; optionally RMS-normalised per head.

    Xavier uniform, as the published layer.
    """

    def __init__(self, config: MemoryConfig, hidden_size: int, make: WeightFactory) -> None:
        super().__init__()
        self.heads = config.memory_heads
        width = config.memory_heads * config.key_dim
        xavier = math.sqrt(6 / (hidden_size + width))
        self.linear = ReplicatedLinear(
            make.uniform("query", width, hidden_size, bound=xavier), make
        )
        self.norm = ReplicatedRMSNorm(config.key_dim, make) if config.memory_qk_norm else None

    def forward(self, x_TD: Tensor) -> Tensor:
        query_THQ = self.linear(x_TD).unflatten(-1, (self.heads, -1))
        return query_THQ if self.norm is None else self.norm(query_THQ)
