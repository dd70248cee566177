"""The published models' parameter counts, from models built on the meta device."""

import pytest
import torch

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.resolution import resolve

VOCABULARY = 32_000
MILLION = 1e6

# layers, hidden size, FFN hidden size, published total of the dense model in millions
BASES = {
    "134M": (12, 768, 2048, 134.1),
    "373M": (24, 1024, 2816, 373.9),
    "720M": (22, 1536, 4096, 721.2),
    "1.3B": (22, 2048, 5632, 1261.5),
}
MEMORIES = [
    ("134M", "memory+", [2, 6, 10], 1024, 937.1),
    ("1.3B", "memory", [11], 1024, 3377.6),
    ("134M", "peer", [6], 768, 1036.9),
    ("1.3B", "peer", [11], 768, 3645.7),
    ("1.3B", "memory+", [3, 11, 19], 2048, 9823.2),
    ("1.3B", "memory+", [3, 11, 19], 4096, 35618.1),
    ("1.3B", "memory+", [3, 11, 19], 8192, 138747.7),
]


def _ffn(hidden: int, ffn: int) -> int:
    return 3 * hidden * ffn


def _dense(layers: int, hidden: int, ffn: int) -> int:
    """Llama-shaped: untied embeddings, no biases, two norms a layer and one last."""
    attention, norms = 4 * hidden * hidden, 2 * hidden
    return 2 * VOCABULARY * hidden + hidden + layers * (attention + norms + _ffn(hidden, ffn))


def _count(module: torch.nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


@pytest.mark.parametrize("base", BASES)
def test_dense_totals(base: str) -> None:
    layers, hidden, ffn, total = BASES[base]
    assert _dense(layers, hidden, ffn) / MILLION == pytest.approx(total, abs=0.051)


@pytest.mark.parametrize(("base", "variant", "places", "num_keys", "total"), MEMORIES)
def test_memory_totals(base, variant, places, num_keys, total) -> None:
    layers, hidden, ffn, _ = BASES[base]
    config = MemoryConfig(memory_layers=places, memory_variant=variant, memory_num_keys=num_keys)
    spec = resolve(config, hidden)
    pool = MemoryPool(spec, device="meta")
    memories = [MemoryLayer(spec, pool, layer=place, device="meta") for place in places]
    count = _dense(layers, hidden, ffn) + _count(pool.tables)
    count += sum(_count(memory) - _ffn(hidden, ffn) for memory in memories)
    assert count / MILLION == pytest.approx(total, abs=0.051)


def test_the_table_is_used_not_owned() -> None:
    """A layer's own parameters leave out the table, which its model counts once."""
    config = MemoryConfig(memory_layers=[0, 1], memory_num_keys=8, memory_topk=2)
    spec = resolve(config, 16)
    pool = MemoryPool(spec)
    layer = MemoryLayer(spec, pool)
    assert all(param is not pool.values.weight for param in layer.parameters())
    assert not [name for name in layer.state_dict() if "pool" in name or "table" in name]
