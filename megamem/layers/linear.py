"""A linear layer and a norm whose weights are replicated over the ranks of a group."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamem.layers.init import WeightFactory
from megamem.parallel.collectives import reduce_gradient


class ReplicatedLinear(nn.Module):
    """x W^T + b, with the gradients of W and b summed over the factory's gradient group.

    The bias starts at zero, if there is one.
    """

    def __init__(self, weight: nn.Parameter, make: WeightFactory, bias: bool = True) -> None:
        super().__init__()
        self.gradient_group = make.gradient_group
        self.weight = weight
        self.bias = make.constant(len(weight), value=0) if bias else None

    def forward(self, x: Tensor, late: "LateWeights | None" = None) -> Tensor:
        """Map [..., in] to [..., out], with weights of late_weights() if they are given."""
        if late is not None:
            return late.linear(x)
        return F.linear(x, *self._weights())

    def late_weights(self) -> "LateWeights":
        """Return the weights such that their gradients are computed late."""
        return LateWeights(*self._weights())

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        weight = reduce_gradient(self.weight, self.gradient_group)
        if self.bias is None:
            return weight, None
        return weight, reduce_gradient(self.bias, self.gradient_group)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


class LateWeights:
    """A weight and a bias whose gradients the backward computes when it reaches this object.

    Among the nodes that are ready, autograd runs the one that was made last. A linear computes the
    gradients of its weights together with that of its input, so that whatever waits for the latter
    waits for the former. Here they are computed in a node of their own, which is as old as this
    object: the nodes that were made between it and linear() run first. The numbers are the same.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Make the node that computes the gradients of [out, in] and [out], or None."""
        self.kept: tuple[Tensor, Tensor] | None = None
        self.weight, self.bias = _ComputeGradients.apply(weight, bias, self)

    def linear(self, x: Tensor) -> Tensor:
        """Return x W^T + b; call it once."""
        return _InputGradient.apply(x, self.weight, self.bias, self)


class _ComputeGradients(torch.autograd.Function):
    """Forward: nothing. Backward: the gradients of a linear's weights, from what it has kept."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, late: LateWeights
    ) -> tuple[Tensor, Tensor | None]:
        ctx.late = late
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    def backward(
        ctx: Any, _: Tensor, has_bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None, None]:
        (x, grad), ctx.late.kept = ctx.late.kept, None
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)
        return grad.t().mm(x), None if has_bias is None else grad.sum(0), None


class _InputGradient(torch.autograd.Function):
    """Forward: a linear. Backward: the gradient of its input; what the others need is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, late: LateWeights
    ) -> Tensor:
        ctx.late = late
        ctx.save_for_backward(x, weight, bias)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, bias = ctx.saved_tensors
        ctx.late.kept = x, grad
        # these only have the right shape: nobody reads their numbers
        none = grad.new_zeros(())
        of_bias = None if bias is None else none.expand_as(bias)
        return grad.matmul(weight), none.expand_as(weight), of_bias, None


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
