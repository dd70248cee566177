"""A permutation of rows that is part of a layer's state, in place of that of a seed."""

import pytest
import torch

from megamem.config import ConfigurationError, MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.resolution import resolve

HIDDEN = 32
SETTINGS = {"memory_layers": [0, 1], "memory_num_keys": 5, "memory_topk": 4}
VARIANTS = {
    "blocks": {"memory_variant": "ultramem"},
    "one sum of all blocks": {"memory_variant": "ultramem", "memory_expansion_proj": "single"},
    "shared": {"memory_variant": "ultramem-v2", "memory_share_layers": 2},
}


def _layer(settings: dict, placement: str, layer: int = 1) -> MemoryLayer:
    config = MemoryConfig(**SETTINGS, **settings, memory_placement=placement)
    spec = resolve(config, HIDDEN)
    pool = MemoryPool(spec, dtype=torch.float64)
    return MemoryLayer(spec, pool, layer=layer, dtype=torch.float64)


@pytest.mark.parametrize("kind", VARIANTS)
def test_it_starts_as_that_of_the_seed_and_is_state(kind: str) -> None:
    settings = VARIANTS[kind]
    by_seed, stored = (_layer(settings, placement) for placement in ("seed", "stored"))
    x = torch.randn(6, 2, HIDDEN, dtype=torch.float64)
    assert stored(x).equal(by_seed(x))
    state = stored.state_dict()
    assert "permutation" not in by_seed.state_dict()
    assert sorted(state["permutation"].tolist()) != state["permutation"].tolist()
    other = state | {"permutation": state["permutation"].roll(3)}
    stored.load_state_dict(other)
    assert not stored(x).allclose(by_seed(x))


@pytest.mark.parametrize("kind", ["blocks", "one sum of all blocks"])
def test_another_permutation_reads_rows_where_it_says(kind: str) -> None:
    """Rows that are moved with the permutation give the same sums, block by block."""
    layer = _layer(VARIANTS[kind], "stored")
    assert layer.permutation is not None
    x = torch.randn(6, 2, HIDDEN, dtype=torch.float64)
    before, rows = layer(x), torch.randperm(25)
    with torch.no_grad():
        weight = layer.pool.values.weight
        weight.copy_(weight[rows.argsort()])
        blocks, old = layer.permutation // 25, layer.permutation.long() % 25
        layer.permutation.copy_(blocks * 25 + rows[old])
    torch.testing.assert_close(layer(x), before)


def test_other_variants_have_none() -> None:
    config = MemoryConfig(**SETTINGS, memory_placement="stored")
    with pytest.raises(ConfigurationError, match="--memory-placement stored needs --memory-vari"):
        resolve(config, HIDDEN)
