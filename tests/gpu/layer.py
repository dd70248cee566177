"""A memory layer, its table and the table's optimizer, without Megatron around them."""

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
    """Of one layer: rows are as wide as the hidden states."""

    tokens: int
    hidden: int
    num_keys: int
    heads: int
    topk: int

    @property
    def key_dim(self) -> int:
        """C, the width of a sub-key: a quarter of a row, as in memory+."""
        return self.hidden // 4


@dataclass(frozen=True)
class TrainedLayer:
    """What a training step of one layer takes."""

    layer: MemoryLayer
    optimizer: TableOptimizer
    hidden_SBD: Tensor
    grad_SBD: Tensor

    def forward(self) -> Tensor:
        return self.layer(self.hidden_SBD)

    def backward(self, out_SBD: Tensor) -> None:
        out_SBD.backward(self.grad_SBD)

    def forward_backward(self) -> None:
        self.backward(self.forward())


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> TrainedLayer:
    """The layer with an AdamW that keeps its table's gradient, fp32 copy and moments."""
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
