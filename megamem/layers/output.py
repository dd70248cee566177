"""Read-out -> the layer's output."""

import torch.nn.functional as F
from torch import Tensor, nn

from megamem.config import MemoryConfig
from megamem.layers.init import WeightFactory
from megamem.layers.linear import ReplicatedLinear


class GatedOutput(nn.Module):
    """Memory+: out = W2 (read-out * silu(W1 x)). Both weights N(0, hidden**-0.5), biases zero."""

    def __init__(self, config: MemoryConfig, hidden_size: int, make: WeightFactory) -> None:
        super().__init__()
        std, width = hidden_size**-0.5, config.value_dim
        self.gate = ReplicatedLinear(make.normal("gate", width, hidden_size, std=std), make)
        self.proj = ReplicatedLinear(make.normal("proj", hidden_size, width, std=std), make)

    def gate_of(self, x_TD: Tensor) -> Tensor:
        """gate_TV, which needs no read-out."""
        return F.silu(self.gate(x_TD))

    def forward(self, out_TV: Tensor, gate_TV: Tensor) -> Tensor:
        return self.proj(out_TV * gate_TV)


class PlainOutput(nn.Module):
    """Memory and PEER: the read-out is the output."""

    def gate_of(self, x_TD: Tensor) -> None:
        """None: nothing is gated."""

    def forward(self, out_TV: Tensor, gate_TV: None) -> Tensor:
        return out_TV
