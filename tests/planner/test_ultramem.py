"""Plans for UltraMem and UltraMemV2: counts of their papers and of the released code, by flags.

The counts of the code are those of its modules; those of the papers are in their tables, or follow
from the widths there.
"""

from dataclasses import replace

import pytest

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.layers.variants.scales import score_moments
from megamem.parallel.traffic import expected_unique
from megamem.planner import ModelShape, make_plan
from megamem.planner.cost import layout_cost
from megamem.planner.sizes import (
    Experts,
    active_parameters,
    dense_parts,
    memory_flops_per_token,
    memory_layer_parameters,
    numbers_read,
    score_flops_per_token,
    table_parameters,
    total_parameters,
)
from megamem.planner.stages import (
    GATE,
    NORM,
    PAIRS,
    SUMS,
    SUMS_BACK,
    TUCKER,
    TUCKER_BACK,
    rank_share,
)
from megamem.resolution import resolve
from megamem.spec import Layout, MemorySpec
from tests.planner.jobs import job_of

V1, V2 = "ultramem", "ultramem-v2"
# the 227M models: 20 layers of width 768
SMALL = {"memory_key_dim": 384, "memory_value_dim": 384}
SMALL_V1 = SMALL | {"memory_variant": V1, "memory_num_keys": 808, "memory_topk": 80}
SMALL_V2 = SMALL | {"memory_variant": V2, "memory_num_keys": 360, "memory_topk": 32}
SMALL_V2 |= {"memory_value_dim": 192, "memory_pre_value_dim": 192}


def _spec(layers: int, hidden_size: int, **settings) -> MemorySpec:
    # the counts do not depend on initial values, of which those of the paper take a while
    defaults = {"memory_layers": list(range(layers))}
    if settings["memory_variant"] in (V1, V2):
        defaults["memory_init"] = "released"
    return resolve(MemoryConfig(**defaults | settings), hidden_size)


def _shape(num_layers: int, hidden_size: int, ffn: int | None = None, **more) -> ModelShape:
    """A model without norms' biases and those of linears, with the vocabulary of OLMo."""
    return ModelShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=12,
        padded_vocab_size=50304,
        seq_length=2048,
        ffn_hidden_size=ffn,
        add_bias_linear=False,
        layer_norm_bias=False,
        **more,
    )


def _without_norms(shape: ModelShape, count: int) -> int:
    return count - (2 * shape.num_layers + 1) * shape.hidden_size


def test_a_layer_of_ultramem_has_the_parameters_of_the_released_one() -> None:
    spec = _spec(4, 768, **SMALL_V1)
    assert memory_layer_parameters(spec) == 3_957_136
    assert table_parameters(spec) == 1_002_799_104


@pytest.mark.parametrize(("queries", "parameters"), [("off", 1_464_200), ("on", 1_759_112)])
def test_a_layer_of_ultramem_v2_has_the_parameters_of_the_released_one(
    queries: str, parameters: int
) -> None:
    """Half of all 20 layers' rows are those of 10 layers, for which there are 1138 sub-keys."""
    settings = SMALL_V2 | {"memory_rank_queries": queries, "memory_share_layers": 10}
    spec = _spec(20, 768, **settings)
    assert spec.keys_per_side == 1138
    assert memory_layer_parameters(spec) == parameters
    assert table_parameters(spec) == 995_328_000
    # as many rows, if each layer has its own
    assert table_parameters(_spec(20, 768, **SMALL_V2)) == 995_328_000


def test_models_of_227m_have_the_parameters_of_the_scripts() -> None:
    experts = Experts(count=64, topk=8, width=384)
    shape = _shape(20, 768, experts=experts, swiglu=True, layers=("*E",) * 20)
    parts = total_parameters(shape, None)
    total = _without_norms(shape, parts["total"])
    assert total - parts["embeddings"] == 1_180_631_040
    idle = 20 * ((64 - 8) * dense_parts(shape).expert + 64 * 768)
    assert total - idle == 227_377_152

    for settings, layers, ffn, millions, active in (
        (SMALL_V1, 4, 2752, 1192.6, 228.5),
        (SMALL_V2 | {"memory_share_layers": 10, "memory_rank_queries": "off"}, 20, 2496)
        + (1186.8, 230.1),
    ):
        spec, shape = _spec(layers, 768, **settings), _shape(20, 768, ffn, swiglu=True)
        parts = total_parameters(shape, spec)
        total = _without_norms(shape, parts["total"])
        assert round((total - parts["embeddings"]) / 1e6, 1) == millions
        # the scripts do not count the rows that are read
        read = len(spec.layers) * numbers_read(spec)
        found = _without_norms(shape, active_parameters(shape, spec)) - read
        assert round(found / 1e6, 1) == active


def _table(variant: str, num_keys: int, width: int, pre: int | None = None) -> dict:
    sizes = {"memory_num_keys": num_keys, "memory_value_dim": width, "memory_pre_value_dim": pre}
    return {"memory_variant": variant} | sizes


@pytest.mark.parametrize(
    ("layers", "hidden", "settings", "printed"),
    [
        # UltraMem's 151M, 680M and 1.6B, and Memory+ beside the models of 227M
        (3, 1024, _table(V1, 1100, 512), "1.859"),
        (4, 1536, _table(V1, 1632, 768), "8.182"),
        (6, 2048, _table(V1, 1789, 1024), "19.66"),
        (4, 768, _table("memory+", 1138, 768), "0.9946"),
        # UltraMemV2's 1B/7B and 500M/6B, and its tables with and without pre-values
        (16, 2048, _table(V2, 528, 768, 384), "5.14"),
        (24, 1152, _table(V2, 964, 144, 144), "6.42"),
        (1, 1152, _table(V2, 558, 288, 288), "0.1793"),
        (1, 1152, _table(V1, 789, 288), "0.1793"),
    ],
)
def test_tables_are_as_large_as_printed(
    layers: int, hidden: int, settings: dict, printed: str
) -> None:
    billions = table_parameters(_spec(layers, hidden, **settings)) / 1e9
    assert f"{billions:.{len(printed.split('.')[1])}f}" == printed


@pytest.mark.parametrize(
    ("layers", "hidden", "millions"),
    [(12, 1024, 150.99), (24, 1536, 679.48), (32, 2048, 1610.6), (32, 4096, 6442.5)],
)
def test_the_dense_models_are_as_large_as_printed(
    layers: int, hidden: int, millions: float
) -> None:
    parts = dense_parts(replace(_shape(layers, hidden), num_attention_heads=16))
    found = layers * (parts.attention + parts.ffn) / 1e6
    assert round(found, 2 if millions < 1000 else 1) == millions


def _multiply_adds(spec: MemorySpec) -> float:
    """Those of the matrices of all layers, in the forward, in millions."""
    bare = replace(spec, cores=0)
    return len(spec.layers) * memory_flops_per_token(bare) / 6e6


# sub-keys of one rank, and one core; the paper's rank 2 cuts a query, so that it adds no numbers
SPLIT = {"memory_variant": V1, "memory_tucker_rank": 1, "memory_cores": 1, "memory_value_dim": 512}
SPLIT |= {"memory_num_keys": 1000, "memory_key_dim": 1000, "memory_expansion": 1}
CUT = SPLIT | {"memory_tucker_rank": 2, "memory_rank_queries": "on", "memory_key_dim": 500}


@pytest.mark.parametrize(
    ("layers", "settings", "millions", "tables"),
    [
        ([5], _table("memory", 1224, 1024) | {"memory_heads": 2, "memory_key_dim": 4896})
        + (173.01, "1.534"),
        # a query of its own for each of two heads is as large as one for a head twice as wide
        ([5], SPLIT | {"memory_heads": 1, "memory_key_dim": 9792, "memory_num_keys": 1728})
        + (178.47, "1.529"),
        ([5], SPLIT | {"memory_key_dim": 4896, "memory_num_keys": 1728}, 173.46, "1.529"),
        ([1, 5, 9], SPLIT, 161.64, "1.536"),
        ([1, 5, 9], SPLIT | {"memory_expansion": 4}, 172.36, "1.536"),
        ([1, 5, 9], CUT | {"memory_expansion": 4}, 172.36, "1.536"),
    ],
)
def test_the_ablation_of_ultramem(layers: list, settings: dict, millions: float, tables: str):
    """The column of parameters without tables, beside a dense model of 151.0M."""
    spec = _spec(12, 1024, **settings | {"memory_layers": layers})
    assert round(151.0 + _multiply_adds(spec), 2) == millions
    assert f"{table_parameters(spec) / 1e9:.3f}" == tables


@pytest.mark.parametrize(("expansion", "percent"), [(4, 6.6), (9, 15.2), (16, 25.7)])
def test_implicit_value_expansion_adds_flops(expansion: int, percent: float) -> None:
    one, many = (
        151.0 + _multiply_adds(_spec(3, 1024, **SPLIT | {"memory_expansion": blocks}))
        for blocks in (1, expansion)
    )
    assert round(100 * (many / one - 1), 1) == percent


def test_stage_two_counts_by_core() -> None:
    """At K 128 these are 66k for two cores of rank 2, with those by the core."""
    spec = _spec(4, 768, **SMALL_V2 | {"memory_topk": 128})
    scores = 2 * 360 * 192 * 2
    assert score_flops_per_token(spec) == 6 * (scores + 2 * (128 * 2**2 + 128**2 * 2))
    sub_keys = replace(spec, cores=0)
    assert score_flops_per_token(sub_keys) == 6 * scores


def test_bytes_read_for_a_token() -> None:
    big = _spec(6, 2048, memory_variant=V1, memory_num_keys=1789)
    assert big.lookups_per_token == 84 and 2 * numbers_read(big) == 172_032
    one = _spec(4, 768, **SMALL_V1)
    two = _spec(20, 768, **SMALL_V2)
    assert 4 * 2 * numbers_read(one) == 20 * 2 * numbers_read(two) == 491_520


@pytest.mark.parametrize(
    ("hidden", "layers", "ffn", "settings", "std"),
    [
        (768, 20, 2496, SMALL_V2, 0.0678),
        (2048, 16, 5632, _table(V2, 528, 768, 384) | {"memory_final_topk": 128}, 0.0370),
    ],
)
def test_the_initial_values_of_ultramem_v2(hidden, layers, ffn, settings, std) -> None:
    """Printed for weights without a variance."""
    config = MemoryConfig(memory_layers=list(range(layers)), **settings)
    spec = resolve(config, hidden, num_layers=layers, ffn_width=ffn)
    _, variance = score_moments(
        spec.keys_per_side, spec.topk, spec.final_topk, spec.tucker_rank, spec.cores
    )
    assert variance > 0
    assert round(spec.value_init_std * (1 + variance) ** 0.25, 4) == std


@pytest.mark.parametrize(
    "settings",
    [
        {"memory_variant": V1},
        {"memory_variant": V1, "memory_expansion_proj": "single", "memory_tucker_rank": 3},
        {"memory_variant": V2, "memory_share_layers": 2, "memory_cores": 1},
        {"memory_variant": V2, "memory_expansion": 4, "memory_expansion_proj": "block"},
        {"memory_variant": V2, "memory_query_conv": 3, "memory_heads": 3, "memory_final_topk": 50},
    ],
)
def test_counts_are_those_of_the_modules(settings: dict) -> None:
    """Four layers, of which two may share tables."""
    spec = _spec(4, 64, memory_num_keys=32, memory_topk=8, **settings)
    pool, layers = MemoryPool(spec, device="meta"), len(spec.layers)
    layer = MemoryLayer(spec, pool, layer=1, device="meta")
    assert memory_layer_parameters(spec) == sum(param.numel() for param in layer.parameters())
    pools = -(-layers // spec.share_layers)
    assert table_parameters(spec) == pools * sum(p.numel() for p in pool.tables.parameters())


def test_plans_of_both() -> None:
    """All layouts of the 1.3B base model: the best fits, and shows the stages of the scores."""
    for variant, modes in ((V1, {"row", "column", "2d"}), (V2, {"row"})):
        job = job_of(memory_variant=variant, memory_init="released", world=64)
        plan = make_plan(job)
        assert {cost.layout.mode for cost in plan.costs} == modes
        assert plan.recommended is not None
        step = plan.recommended.seconds["h100"]
        stages = {stage.name: stage for stage in step.stages}
        assert {TUCKER, PAIRS, TUCKER_BACK} <= stages.keys() and GATE not in stages
        # estimates are named as such
        assert not any(stages[name].record for name in (TUCKER, PAIRS, TUCKER_BACK))
        assert plan.parameters["memory layers"] == 3 * memory_layer_parameters(job.spec)


def test_what_is_sent_depends_on_cores_blocks_and_pre_values() -> None:
    layout = Layout("row", 8)
    common = {"memory_init": "released", "memory_wire": "alltoall"}
    one = job_of(memory_variant=V1, **common).exchange
    assert (one.cores, one.blocks, one.token_width) == (2, 4, None)
    two = job_of(memory_variant=V2, **common).exchange
    assert (two.cores, two.blocks, two.token_width, two.sends_tokens) == (2, 1, 256, True)
    assert two.lookups == 32 and one.lookups == 84

    def backward(**settings) -> float:
        job = job_of(memory_variant=V1, **common, **settings)
        return layout_cost(job, layout).sent.backward

    # four times as many read-outs come home, in bf16, from 7 of 8 ranks
    projected = backward(memory_expansion_proj="block") - backward(memory_expansion_proj="single")
    assert projected == pytest.approx(3 * 1024 * 2 * 7, rel=0.01)


def test_sums_come_home_in_every_block() -> None:
    common = {"memory_variant": V1, "memory_init": "released"}
    names = [SUMS, SUMS_BACK]
    blocks, single = (
        {
            stage.name: stage.seconds
            for stage in layout_cost(job_of(**common, memory_expansion_proj=how), Layout("row", 8))
            .seconds["h100"]
            .stages
        }
        for how in ("block", "single")
    )
    for name in names:
        if name in single:
            assert blocks[name] == pytest.approx(4 * single[name])
    assert SUMS in single


def test_tables_of_different_width_are_held_and_updated() -> None:
    """Of V2 a rank holds values of 3 D / 8 and pre-values of D / 8: half of a table of width D."""
    shared = {"memory_pool": "shared", "memory_heads": 4, "memory_topk": 32}
    job = job_of(memory_variant=V2, memory_init="released", **shared)
    plain = job_of(memory_variant="memory", **shared)
    for layout in (Layout("row", 1), Layout("row", 8)):
        ours, theirs = (layout_cost(each, layout) for each in (job, plain))
        assert 2 * ours.bytes.weights == theirs.bytes.weights
        assert 2 * ours.bytes.gradients == theirs.bytes.gradients
        # a byte for each row and table says whether a row has a gradient
        rows = plain.spec.num_rows / layout.group_size
        extra = ours.replicas_inside / theirs.replicas_inside if theirs.replicas_inside else 0.5
        assert extra == pytest.approx((2048 * 2 + 2) / (2048 * 4 + 1), rel=0.01), rows
        norms = [
            next(s for s in cost.seconds["h100"].stages if s.name == NORM).seconds
            for cost in (ours, theirs)
        ]
        assert 2 * norms[0] == pytest.approx(norms[1])


def test_shared_layers_hold_one_pool_for_each_block_of_layers() -> None:
    common = {
        "memory_variant": V2,
        "memory_init": "released",
        "memory_layers": [2, 3, 8, 9, 11, 12],
    }
    own, shared = (job_of(**common, memory_share_layers=g) for g in (1, 2))
    assert own.stage_pools == [6] and shared.stage_pools == [3]
    layout = Layout("row", 8)
    six, three = (rank_share(job, layout) for job in (own, shared))
    assert six.by_row == 6 * (768 + 256) and three.by_row == 3 * (768 + 256)
    assert three.rows == 2 * six.rows
    assert three.tables == 6
    # a table is read by two layers
    reads = 2 * three.picks * shared.replicas(layout) * shared.cluster.microbatches
    assert three.touched_by_step == expected_unique(three.rows, reads)
    split = job_of(**common, memory_share_layers=2, cluster={"pipeline_model_parallel_size": 2})
    # layers 2 to 9 are on the first of two stages of 11 layers
    assert split.stage_pools == [2, 1]
