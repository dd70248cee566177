"""Ranks that share tables and make different numbers of forwards wait for each other."""

import pytest
import torch
import torch.distributed as dist

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.parallel.memory_group import form, partition
from megamem.resolution import resolve
from megamem.spec import Grid
from tests.helpers.distributed import run_distributed

FORWARDS = ((3, 1, 4), (), (2, 2))
"""Tokens of each forward of each rank."""


def _layers(variant: str, ranks: int) -> list[MemoryLayer]:
    config = MemoryConfig(
        memory_layers=[0, 1],
        memory_num_keys=9,
        memory_topk=4,
        memory_key_dim=16,
        memory_variant=variant,
        memory_group_size=ranks,
    )
    spec = resolve(config, 16, stage_ranks=ranks, tokens_vary=True)
    group = form(partition([[*range(ranks)]], Grid(local_rows=ranks))) if ranks > 1 else None
    pool = MemoryPool(spec, group=group)
    return [MemoryLayer(spec, pool, layer=number) for number in spec.layers]


@torch.inference_mode()
def _all_are_done_together(variant: str) -> None:
    rank = dist.get_rank()
    layers, alone = _layers(variant, 3), _layers(variant, 1)
    for tokens in FORWARDS[rank]:
        x = torch.randn(tokens, 1, 16, generator=torch.Generator().manual_seed(10 * rank + tokens))
        for layer, own in zip(layers, alone, strict=True):
            torch.testing.assert_close(layer(x), own(x))
    joined = 0
    while all(layer.join() for layer in layers):
        joined += 1
    assert joined == 3 - len(FORWARDS[rank])


def _with_each_variant() -> None:
    for variant in ("memory+", "peer", "ultramem", "ultramem-v2"):
        _all_are_done_together(variant)


@pytest.mark.gloo
def test_a_rank_without_tokens_joins_until_all_are_done() -> None:
    run_distributed(_with_each_variant, 3)
