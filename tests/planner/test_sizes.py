"""Parameter counts, compared with published totals and with modules."""

from dataclasses import replace

import pytest

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.megatron.reports.sizes import layer_flops_per_token
from megamem.planner import (
    preset,
)
from megamem.planner.sizes import (
    memory_flops_per_token,
    memory_layer_parameters,
    stage_parameters,
    table_parameters,
    total_parameters,
)
from megamem.resolution import resolve
from tests.planner.jobs import spec_of


@pytest.mark.parametrize(
    ("base", "num_keys", "millions"),
    [("134m", None, 134.1), ("373m", None, 373.9), ("1.3b", None, 1261.5)]
    + [("134m", 1024, 937.1), ("1.3b", 2048, 9823.2)]
    + [("1.3b", 4096, 35618.1), ("1.3b", 8192, 138747.7)],
)
def test_published_totals(base: str, num_keys: int | None, millions: float) -> None:
    shape = preset(base)[0]
    memory = spec_of(base, num_keys) if num_keys else None
    total = total_parameters(shape, memory)["total"]
    assert total / 1e6 == pytest.approx(millions, abs=0.051)


def test_the_published_plain_memory() -> None:
    memory = spec_of(memory_variant="memory", memory_layers=[11])
    total = total_parameters(preset("1.3b")[0], memory)["total"]
    assert total / 1e6 == pytest.approx(3377.6, abs=0.051)


def test_llama_3_8b() -> None:
    """Meta's checkpoint has 8,030,261,248 parameters."""
    assert total_parameters(preset("8b")[0], None)["total"] == 8_030_261_248


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"memory_variant": "memory"},
        {"memory_qk_norm": True, "memory_heads": 2, "memory_key_dim": 48},
        {"memory_value_dim": 64, "memory_pool": "layer", "memory_num_keys": 33},
    ],
)
def test_counts_are_those_of_the_modules(settings: dict) -> None:
    hidden = 256
    spec = resolve(MemoryConfig(memory_layers=[1, 2], **settings), hidden)
    pool = MemoryPool(spec, device="meta")
    layer = MemoryLayer(spec, pool, layer=1, device="meta")
    count = sum(param.numel() for param in layer.parameters())
    assert memory_layer_parameters(spec) == count
    tables = 2 if spec.pool == "layer" else 1
    assert table_parameters(spec) == tables * sum(p.numel() for p in pool.tables.parameters())
    assert memory_flops_per_token(spec) == layer_flops_per_token(spec)


def test_stages_and_shards_add_up() -> None:
    """All stages together hold the model once; tensor-parallel ranks replicate norms and memory."""
    shape, memory = preset("373m")[0], spec_of("373m", memory_pool="layer")
    parts = total_parameters(shape, memory)
    total = parts["total"] - parts["value table"]
    assert sum(stage_parameters(shape, memory, 1, 4)) == total
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    replicated = norms + parts["memory layers"]
    assert sum(stage_parameters(shape, memory, 2, 4)) == (total - replicated) / 2 + replicated
    tied = replace(shape, untied=False)
    embedding = shape.padded_vocab_size * shape.hidden_size
    # the copy of a tied embedding on the last stage counts
    assert sum(stage_parameters(tied, memory, 1, 2)) == total
    assert stage_parameters(tied, memory, 1, 1) == [total - embedding]
