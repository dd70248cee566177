"""A memory layer, its table and the table's optimizer, without Megatron."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.optimizer.table_optimizer import StepOptions, TableOptimizer
from megamem.resolution import resolve


@dataclass(frozen=True)
class Sizes:
    """The sizes of one layer, whose rows are as wide as the hidden states."""

    tokens: int
    hidden: int
    num_keys: int
    heads: int
    topk: int

    @property
    def key_dim(self) -> int:
        """The width of a sub-key: a quarter of a row, as in memory+."""
        return self.hidden // 4


@dataclass(frozen=True)
class TrainedLayer:
    """A layer with its optimizer, an input and the gradient of its output."""

    layer: MemoryLayer
    optimizer: TableOptimizer
    hidden: Tensor
    grad: Tensor

    def forward(self) -> Tensor:
        """The output of the layer."""
        return self.layer(self.hidden)

    def backward(self, out: Tensor) -> None:
        """The backward pass of an output."""
        out.backward(self.grad)

    def forward_backward(self) -> None:
        """Forward and backward pass."""
        self.backward(self.forward())


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> TrainedLayer:
    """Build a layer, and an AdamW that holds its table's gradient, fp32 copy and moments."""
    config = MemoryConfig(
        memory_layers=[0],
        memory_num_keys=sizes.num_keys,
        memory_heads=sizes.heads,
        memory_topk=sizes.topk,
    )
    spec = resolve(config, sizes.hidden, seed=1)
    pool = MemoryPool(spec, device=device, dtype=dtype)
    layer = MemoryLayer(spec, pool, device=device, dtype=dtype)
    optimizer = TableOptimizer(pool, spec, StepOptions(), lr=1e-3, weight_decay=0.1)
    shape = (sizes.tokens, 1, sizes.hidden)
    generator = torch.Generator(device).manual_seed(1)
    hidden, grad = (
        torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(2)
    )
    return TrainedLayer(layer, optimizer, hidden.requires_grad_(), grad)
