"""Read-out -> the layer's output."""

import torch.nn.functional as F
from torch import Tensor, nn

from megamem.layers.init import WeightFactory
from megamem.layers.linear import ReplicatedLinear
from megamem.spec import MemorySpec


class Output(nn.Module):
    """The read-out is the output."""

    def gate_of(self, x_TD: Tensor) -> Tensor | None:
        """What the output needs of the token alone, computed while the lookups travel."""
        return None

    def forward(self, out_TV: Tensor, gate_TV: Tensor | None) -> Tensor:
        """y_TD of the read-out and what gate_of() returned."""
        return out_TV


class GatedOutput(Output):
    """W2 (read-out * silu(W1 x)). Both weights N(0, hidden**-0.5), biases zero."""

    def __init__(self, spec: MemorySpec, make: WeightFactory) -> None:
        super().__init__()
        hidden, width = spec.hidden_size, spec.value_dim
        std = hidden**-0.5
        self.gate = ReplicatedLinear(make.normal("gate", width, hidden, std=std), make)
        self.proj = ReplicatedLinear(make.normal("proj", hidden, width, std=std), make)

    def gate_of(self, x_TD: Tensor) -> Tensor:
        """gate_TV, which needs no read-out."""
        return F.silu(self.gate(x_TD))

    def forward(self, out_TV: Tensor, gate_TV: Tensor | None) -> Tensor:
        assert gate_TV is not None
        return self.proj(out_TV * gate_TV)
