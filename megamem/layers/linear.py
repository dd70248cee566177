"""A linear layer and a norm whose weights every rank of a group holds whole."""

import torch.nn.functional as F
from torch import Tensor, nn

from megamem.layers.init import WeightFactory
from megamem.parallel.collectives import reduce_gradient


class ReplicatedLinear(nn.Module):
    """x -> x W^T + b. Where ranks bring tokens of their own, gradients are summed over them."""

    def __init__(self, weight: nn.Parameter, make: WeightFactory) -> None:
        super().__init__()
        self.gradient_group = make.gradient_group
        self.weight = weight
        self.bias = make.constant(len(weight), value=0)

    def forward(self, x: Tensor) -> Tensor:
        weight = reduce_gradient(self.weight, self.gradient_group)
        return F.linear(x, weight, reduce_gradient(self.bias, self.gradient_group))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


class ReplicatedRMSNorm(nn.Module):
    """x -> gain * x / rms(x) over the last dimension."""

    def __init__(self, width: int, make: WeightFactory, gain: float = 1, eps: float = 1e-6) -> None:
        super().__init__()
        self.gradient_group, self.eps = make.gradient_group, eps
        self.weight = make.constant(width, value=gain)

    def forward(self, x: Tensor) -> Tensor:
        weight = reduce_gradient(self.weight, self.gradient_group)
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)
