"""Sums the gradients of memory layers' own weights over tensor-parallel ranks, once a step.

Without sequence parallelism tensor-parallel ranks hold the same hidden states, and a memory layer
divides the tokens among them, so each rank has the gradients of its own tokens. By default a layer
all-reduces these gradients in every backward, one collective for each weight, layer and microbatch.
Here they are added up over the microbatches first, in the buffers of Megatron's
DistributedDataParallel, and summed over the ranks when the chunk finishes its gradients: after the
pipeline's last microbatch, and after the reduction over data-parallel ranks. With the distributed
optimizer a rank then has the complete sum over the data-parallel ranks for its part of the buffer,
which is the same part on all tensor-parallel ranks. Megatron does the same for norms under sequence
parallelism, but not for any weight without it.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamem.layers.memory import MemoryLayer
from megamem.patching import replace

JOINED_BELOW = 2**20
"""Gradients with fewer numbers are joined into one tensor, larger ones are summed in place."""


class LayerGradients:
    """The gradients of the memory layers of one chunk, of which each rank holds a part."""

    def __init__(self, layers: list[MemoryLayer]) -> None:
        """Keep the layers from summing their gradients in the backward.

        Args:
            layers: layers whose weights Megatron's DistributedDataParallel has a gradient for.
        """
        self.layers, self._complete = layers, False
        for layer in layers:
            assert layer.gradient_group is not None
            layer.gradient_group.in_backward = False

    @torch.no_grad()
    def sum(self) -> None:
        """Sum the gradients over the ranks, in place."""
        group = self.layers[0].gradient_group
        assert group is not None
        weights = [w for layer in self.layers for w in layer.parameters() if w.requires_grad]
        # read anew, because Megatron may have moved its buffers
        gradients: list[Tensor] = [getattr(weight, "main_grad") for weight in weights]  # noqa: B009
        small = [gradient for gradient in gradients if gradient.numel() < JOINED_BELOW]
        sent = [gradient for gradient in gradients if gradient.numel() >= JOINED_BELOW]
        if small:
            sent.append(torch.cat([gradient.flatten() for gradient in small]))
        pending = [dist.all_reduce(x, group=group.members, async_op=True) for x in sent]
        for work in pending:
            work.wait()
        if small:
            sums = sent[-1].split([gradient.numel() for gradient in small])
            for gradient, total in zip(small, sums, strict=True):
                gradient.copy_(total.view_as(gradient))
        self._complete = True

    def summed_after(self, finish: Callable[..., None]) -> Callable[..., None]:
        """The finish_grad_sync() of the chunk, which then sums these gradients."""

        def finish_grad_sync(*args: object, **options: object) -> None:
            finish(*args, **options)
            self.sum()

        return finish_grad_sync

    def before_step(self) -> None:
        """Sum the gradients, unless the chunk has finished them since the last step."""
        if not self._complete:
            self.sum()
        self._complete = False


def sum_once_a_step(chunks: Iterable[nn.Module]) -> list[LayerGradients]:
    """Let finish_grad_sync() of each chunk sum the gradients that its layers hold in parts.

    Args:
        chunks: the model on this rank, as Megatron's DistributedDataParallel wraps it.

    Returns:
        The gradients of each chunk that has such layers; the optimizer calls before_step(). Chunks
        whose weights have no gradient of DistributedDataParallel's are left as they are.
    """
    found = []
    for chunk in chunks:
        layers = [
            layer
            for layer in chunk.modules()
            if isinstance(layer, MemoryLayer)
            and layer.gradient_group is not None
            and layer.gradient_group.in_backward
        ]
        weights = [w for layer in layers for w in layer.parameters() if w.requires_grad]
        if weights and all(hasattr(weight, "main_grad") for weight in weights):
            found.append(gradients := LayerGradients(layers))
            replace(chunk, "finish_grad_sync", gradients.summed_after)
    return found
