"""A linear layer and a norm whose weights are replicated over the ranks of a group."""

import torch.nn.functional as F
from torch import Tensor, nn

from megamem.layers.init import WeightFactory
from megamem.parallel.collectives import reduce_gradient


class ReplicatedLinear(nn.Module):
    """x W^T + b, with the gradients of W and b summed over the factory's gradient group.

    The bias starts at zero.
    """

    def __init__(self, weight: nn.Parameter, make: WeightFactory) -> None:
        super().__init__()
        self.gradient_group = make.gradient_group
        self.weight = weight
        self.bias = make.constant(len(weight), value=0)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        weight = reduce_gradient(self.weight, self.gradient_group)
        return F.linear(x, weight, reduce_gradient(self.bias, self.gradient_group))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


class ReplicatedRMSNorm(nn.Module):
    """gain * x / rms(x) over the last dimension; the gradient of the gain is summed likewise."""

    def __init__(self, width: int, make: WeightFactory, gain: float = 1, eps: float = 1e-6) -> None:
        super().__init__()
        self.gradient_group, self.eps = make.gradient_group, eps
        self.weight = make.constant(width, value=gain)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [..., width] over the last dimension."""
        weight = reduce_gradient(self.weight, self.gradient_group)
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)
