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
    Experts,
    active_parameters,
    dense_flops_per_token,
    dense_parts,
    even_placement,
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
    assert _held(shape, memory, 1, 4) == total
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    replicated = norms + parts["memory layers"]
    assert _held(shape, memory, 2, 4) == (total - replicated) / 2 + replicated
    tied = replace(shape, untied=False)
    embedding = shape.padded_vocab_size * shape.hidden_size
    # the copy of a tied embedding on the last stage counts
    assert _held(tied, memory, 1, 2) == total
    assert _held(tied, memory, 1, 1) == total - embedding


def _held(shape, memory, tp: int, stages: int, **more) -> int:
    """Parameters of one rank of each stage, summed."""
    placement = even_placement(shape.num_layers, stages)
    return sum(held.total for held in stage_parameters(shape, memory, tp, placement, **more))


MIXTURE = Experts(count=8, topk=2, width=512, shared_width=256, shared_gate=True)


def test_experts_are_spread_and_memories_replace_them() -> None:
    """Four expert-parallel ranks hold a quarter of the experts; the rest is on each of them."""
    dense = preset("134m")[0]
    kinds = ("*-", "*E") * 6
    shape = replace(dense, experts=MIXTURE, layers=kinds, prediction=("*E",))
    memory = spec_of("134m", memory_layers=[1], memory_pool="layer")
    parts, one = total_parameters(shape, memory), dense_parts(shape).expert
    assert one == 3 * 768 * 512
    # five layers are left, and the module that predicts
    assert parts["experts"] == 5 * (8 * one + 8 * 768 + 3 * 768 * 256 + 768)
    table = parts["value table"]
    embedding = shape.padded_vocab_size * shape.hidden_size
    # the last of several stages has a copy of the embedding, for the module that predicts
    assert _held(shape, memory, 1, 1) == parts["total"] - table
    assert _held(shape, memory, 1, 2) == parts["total"] - table + embedding
    spread = _held(shape, memory, 1, 1, expert_ranks=4)
    assert spread == parts["total"] - table - 6 * 6 * one
    lookups = memory.lookups_per_token * memory.value_dim
    idle = 6 * (MIXTURE.count - MIXTURE.topk) * one
    assert active_parameters(shape, memory) == parts["total"] - idle - table + lookups


def test_flops_count_the_experts_that_a_token_is_sent_to() -> None:
    dense = preset("134m")[0]
    shape = replace(dense, experts=MIXTURE, layers=("*E",) * 12)
    inner = 2 * MIXTURE.width + MIXTURE.shared_width
    more = 12 * (3 * 768 * (inner - dense.ffn_width) + 8 * 768 + 768)
    assert dense_flops_per_token(shape, None) == dense_flops_per_token(dense, None) + 6 * more
    predicts = replace(dense, prediction=("*-",))
    once = dense_flops_per_token(predicts, None) - dense_flops_per_token(dense, None)
    layer = dense_flops_per_token(dense, None) - dense_flops_per_token(
        replace(dense, num_layers=11), None
    )
    assert once == layer + 6 * 768 * (2 * 768 + dense.padded_vocab_size)
