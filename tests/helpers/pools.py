"""Pools of tables for tests, spread over whatever group a test has formed."""

from dataclasses import replace

import torch
from torch import Tensor

from megamem.layers.memory_pool import MemoryPool
from megamem.parallel.memory_group import MemoryGroup
from megamem.row_gradient import RowGradient
from megamem.spec import Layout, MemorySpec


def on_group(spec: MemorySpec, group: MemoryGroup) -> MemorySpec:
    """The spec with the layout of a group."""
    return replace(spec, layout=Layout.of_grid(group.grid))


def pool_of(
    spec: MemorySpec, dtype: torch.dtype, group: MemoryGroup | None = None, name: str = "t"
) -> MemoryPool:
    """A pool whose tables are an optimizer's, not autograd's."""
    group = group or MemoryGroup()
    pool = MemoryPool(on_group(spec, group), name, group, dtype=dtype)
    for table in pool:
        table.leave_to_optimizer()
    return pool


def assert_no_gradient(gradient: RowGradient) -> None:
    """No row is touched, and what has to be cleared is."""
    assert not gradient.touched.any()
    assert not gradient.needs_clearing or not gradient.buffer.any()


def read(pool: MemoryPool, pairs_TL: Tensor, weights_TL: Tensor, counts: list[int]) -> Tensor:
    """out_TV of a variant that does not look at tokens."""
    return pool.read(pairs_TL, weights_TL, counts, weights_TL.new_empty(len(weights_TL), 0))
