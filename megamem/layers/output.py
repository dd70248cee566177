"""Turns the read-out of the tables into the output of a memory layer.

Letters: T tokens on this rank, D hidden size, V row width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megamem.layers.init import WeightFactory
from megamem.layers.linear import LateWeights, ReplicatedLinear
from megamem.spec import MemorySpec


class Output(nn.Module):
    """Returns the read-out itself."""

    def compute_gate(self, x_TD: Tensor) -> Tensor | None:
        """Return the factor of the read-out that depends on the token alone; None if there is none.

        It is computed while the lookups are sent.
        """
        return None

    def late_weights(self) -> LateWeights | None:
        """Return the weights of forward() such that their gradients are computed late.

        It is called between the departure of lookups and the arrival of read-outs. The backward
        then sends the gradients of read-outs before it computes those of the weights.
        """
        return None

    def forward(
        self, out_TV: Tensor, gate_TV: Tensor | None, late: LateWeights | None = None
    ) -> Tensor:
        """Return y_TD from the read-out and the results of compute_gate() and late_weights()."""
        return out_TV


class GatedOutput(Output):
    """W2 (read-out * silu(W1 x)), the output of Memory+ ("Memory Layers at Scale", section 3.1).

    The weights start with a standard deviation of D**-0.5, the biases at zero.
    """

    def __init__(self, spec: MemorySpec, make: WeightFactory) -> None:
        super().__init__()
        hidden, width = spec.hidden_size, spec.value_dim
        std = hidden**-0.5
        self.gate = ReplicatedLinear(make.normal("gate", width, hidden, std=std), make)
        self.proj = ReplicatedLinear(make.normal("proj", hidden, width, std=std), make)

    def compute_gate(self, x_TD: Tensor) -> Tensor:
        """Return gate_TV = silu(W1 x)."""
        return F.silu(self.gate(x_TD))

    def late_weights(self) -> LateWeights:
        """Return W2 and its bias such that their gradients are computed late."""
        return self.proj.late_weights()

    def forward(
        self, out_TV: Tensor, gate_TV: Tensor | None, late: LateWeights | None = None
    ) -> Tensor:
        """Return y_TD = W2 (out_TV * gate_TV)."""
        assert gate_TV is not None
        return self.proj(out_TV * gate_TV, late)


class Projection(Output):
    """W read-out, without a bias: one projection of the sums of all blocks side by side.

    It is the sum over the blocks of UltraMem's implicit value expansion of a projection for each
    (Huang et al. 2024, "Ultra-Sparse Memory Network").
    """

    def __init__(self, spec: MemorySpec, make: WeightFactory, std: float) -> None:
        super().__init__()
        weight = make.normal("proj", spec.hidden_size, spec.read_width, std=std)
        self.proj = ReplicatedLinear(weight, make, bias=False)

    def late_weights(self) -> LateWeights:
        """Return W such that its gradient is computed late."""
        return self.proj.late_weights()

    def forward(
        self, out_TV: Tensor, gate_TV: Tensor | None, late: LateWeights | None = None
    ) -> Tensor:
        """Return y_TD."""
        return self.proj(out_TV, late)
