"""UltraMem and UltraMemV2 against their formulas, and W ranks against one process, in float64."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.layers.tucker_keys import TuckerKeys
from megamem.layers.variants import placement_seed_of, pool_names
from megamem.layers.variants.scales import mean_of_best, score_moments
from megamem.layers.variants.ultramem_v2 import PRE_VALUES
from megamem.layers.variants.variant import VALUES
from megamem.ops import place_rows
from megamem.optimizer import StepOptions, TableOptimizer
from megamem.parallel.memory_group import MemoryGroup, form, partition
from megamem.resolution import resolve
from megamem.spec import Layout, MemorySpec
from tests.helpers.distributed import run_distributed
from tests.layers.test_memory import HIDDEN, Case, _all_cases
from tests.optimizer.test_table_optimizer import KINDS as OPTIMIZERS

BASE: dict[str, Any] = {
    "memory_layers": [0, 1],
    "memory_num_keys": 9,  # 81 rows: even over 1 and 3 ranks only
    "memory_topk": 4,
    "memory_final_topk": 7,
    "memory_key_dim": 10,
    "memory_value_dim": 48,  # six blocks of columns: uneven over 4 ranks
    "memory_value_init_std": 0.3,
    "memory_core_aux_weight": 0,
}
V1 = {**BASE, "memory_variant": "ultramem"}
V2 = {**BASE, "memory_variant": "ultramem-v2", "memory_pre_value_dim": 24}
SINGLE = {"memory_expansion_proj": "single"}
KINDS = {
    "v1": V1,
    "v1, one projection": {**V1, **SINGLE},
    "v1, one core": {**V1, "memory_cores": 1, "memory_expansion": 1},
    "v1, rank 3, 3 cores": {**V1, "memory_tucker_rank": 3, "memory_cores": 3},
    "v2": V2,
    "v2, shared by two": {**V2, "memory_share_layers": 2, "memory_heads": 2},
    "v2, expanded": {**V2, "memory_expansion": 4},
    "v2, blocks": {**V2, "memory_expansion": 4, "memory_expansion_proj": "block"},
    "v2, one core": {**V2, "memory_cores": 1, "memory_rank_queries": "off"},
}


def _spec(settings: dict[str, Any], **more: Any) -> MemorySpec:
    return resolve(MemoryConfig(**{**settings, **more}), HIDDEN, seed=1234)


def _rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _by_formula(spec: MemorySpec, layer: MemoryLayer, pool: MemoryPool, x_TD: Tensor) -> Tensor:
    """The output, token by token, as sections 1 and 2 of the specification write it."""
    keys, query = layer.keys, layer.query
    assert isinstance(keys, TuckerKeys)
    width, ranks, n = spec.key_dim // 2, spec.tucker_rank, spec.keys_per_side
    k_2HNAC = _rms_norm(keys.sub_keys, keys.norm.weight)
    values, rows_seed = pool.values.weight, placement_seed_of(layer.layer, spec)
    pre = pool.tables[PRE_VALUES].weight if spec.pre_value_dim else None
    outputs = []
    for x_D in x_TD:
        q = (query.linear.weight @ x_D).view(2, -1, width)
        q = _rms_norm(q, query.norm.weight).expand(2, ranks, width)
        blocks = [torch.zeros(spec.value_dim, dtype=x_D.dtype) for _ in range(spec.expansion)]
        for head in range(spec.heads):
            s_row, s_column = torch.einsum("znac,zac->zna", k_2HNAC[:, head], q)
            cores = keys.cores[:, head]
            left, _, right = torch.linalg.svd(cores.sum(0).detach())
            u, t = left[:, 0], right[0]
            if u.sum() + t.sum() < 0:
                u, t = -u, -t
            row_ids = (s_row @ u).topk(spec.topk).indices.tolist()
            column_ids = (s_column @ t).topk(spec.topk).indices.tolist()
            pairs = [(i, j) for i in row_ids for j in column_ids]
            singles = torch.stack([s_row[i] @ cores @ s_column[j] for i, j in pairs])
            for at in singles.sum(1).topk(spec.final_topk).indices.tolist():
                i, j = pairs[at]
                placed = int(place_rows(torch.tensor(i * n + j), n, rows_seed))
                block, row = divmod(placed, spec.num_rows)
                weights = singles[at]
                if pre is not None:
                    weights = weights * (pre[row] @ (layer.token.weight @ x_D))
                pieces = values[row].view(spec.cores, -1) * weights.unsqueeze(1)
                blocks[block] = blocks[block] + pieces.flatten()
        read = sum(blocks) if spec.expansion_proj == "single" else torch.cat(blocks)
        outputs.append(layer.output.proj.weight @ read)
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_its_formula(kind: str) -> None:
    """The output, and the gradient of every weight, table and token."""
    spec = _spec(KINDS[kind], memory_placement_seed=5)
    pool = MemoryPool(spec, "t", dtype=torch.float64)
    layer = MemoryLayer(spec, pool, layer=1, dtype=torch.float64)
    x_TD = torch.randn(7, HIDDEN, dtype=torch.float64, requires_grad=True)
    grad_TD = torch.randn(7, HIDDEN, dtype=torch.float64)
    weights = [x_TD, *layer.parameters(), *pool.tables.parameters()]
    y_TD = layer(x_TD.unsqueeze(1)).squeeze(1)
    expected_TD = _by_formula(spec, layer, pool, x_TD)
    torch.testing.assert_close(y_TD, expected_TD)
    assert y_TD.abs().max() > 1e-3
    for got, want in zip(
        torch.autograd.grad(y_TD, weights, grad_TD),
        torch.autograd.grad(expected_TD, weights, grad_TD),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
        assert want.any()


def _cases(settings: dict[str, Any], world: int) -> list[Case]:
    wires, sharded = ("alltoall", "allgather"), (False, True)
    counts = tuple(range(world)) if world > 1 else (3,)
    cases = [
        Case(_spec(settings, memory_wire=wire, memory_pieces=pieces), tokens, recompute, buffer=own)
        for wire, tokens, (recompute, own, pieces) in product(
            wires, sharded, [(False, True, 1), (True, False, 2)]
        )
    ]
    cases += [Case(_spec(settings, memory_wire=wire), True, counts=counts) for wire in wires]
    cases.append(Case(_spec(settings, memory_wire="alltoall"), True, counts=counts, vary=True))
    if settings["memory_variant"] == "ultramem" and world > 1:
        cases += [
            Case(_spec(settings, memory_wire=wire), tokens, column_ranks=columns, buffer=True)
            for columns in {2, world}
            if world % columns == 0
            for wire, tokens in product(wires, sharded)
        ]
    return cases


# every kind is its formula in one process; what is sent differs in these
SENT = ("v1", "v1, rank 3, 3 cores", "v2, shared by two", "v2, blocks")


def _all_kinds(kinds: tuple[str, ...], world: int) -> None:
    for kind in kinds:
        _all_cases(_cases(KINDS[kind], world))


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process(world_size: int) -> None:
    run_distributed(_all_kinds, world_size, SENT, world_size)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_equal_one_process_in_every_kind(world_size: int) -> None:
    run_distributed(_all_kinds, world_size, tuple(KINDS), world_size)


def _step_alike(settings: dict[str, Any]) -> None:
    """One step of each table optimizer, of the tables of all ranks and of one process."""
    ranks = list(range(dist.get_world_size()))
    generator = torch.Generator().manual_seed(7)
    hidden, grad = torch.randn(2, 3 * len(ranks), 1, HIDDEN, generator=generator).double()
    for kind in OPTIMIZERS:
        spec = _spec(settings, memory_optimizer=kind, memory_wire="alltoall")
        group = form(partition([ranks], Layout("row", len(ranks)).grid))
        stepped = []
        for of_table, tokens in ((MemoryGroup(), ranks), (group, [group.member])):
            own = replace(spec, layout=Layout.of_grid(of_table.grid))
            pool = MemoryPool(own, "t", of_table, dtype=torch.float64)
            layer = MemoryLayer(own, pool, dtype=torch.float64)
            for table in pool:
                table.leave_to_optimizer()
            steps = StepOptions(betas=(0.9, 0.95), eps=1e-8)
            optimizer = TableOptimizer(pool, own, steps, lr=0.1, weight_decay=0.1)
            mine = [slice(3 * rank, 3 * rank + 3) for rank in tokens]
            x, g = (torch.cat([part[piece] for piece in mine]) for part in (hidden, grad))
            counts = [3 * len(ranks)] if of_table.members is None else [3] * len(ranks)
            layer(x, counts).backward(g)
            optimizer.reduce()
            optimizer.step(0.5)
            stepped.append(pool)
        alone, many = stepped
        for one, other in zip(alone, many, strict=True):
            rows = other.shard.rows.local
            torch.testing.assert_close(other.weight, one.weight[rows], msg=f"{kind}: {one.name}")
            start = MemoryPool(spec, "t", dtype=torch.float64).tables[
                VALUES if one is alone.values else PRE_VALUES
            ]
            assert not torch.equal(one.weight, start.weight)


@pytest.mark.gloo
@pytest.mark.parametrize("kind", ["v1", "v2, shared by two"])
def test_a_step_of_each_optimizer_equals_that_of_one_process(kind: str) -> None:
    run_distributed(_step_alike, 2, KINDS[kind])


def test_layers_that_share_a_table_read_it_by_permutations_of_their_own() -> None:
    spec = _spec(KINDS["v2, shared by two"])
    assert pool_names(spec) == ["layer_0"]
    assert [placement_seed_of(layer, spec) for layer in (0, 1)] == [0, 1]
    assert (spec.num_rows, spec.keys_per_side) == (162, 12)
    four = _spec({**V2, "memory_share_layers": 2}, memory_layers=[1, 3, 4, 7])
    assert pool_names(four) == ["layer_1", "layer_4"]


def test_directions_are_state_in_fp32() -> None:
    """They follow the cores with a sign that stays, whatever the dtype of the model."""
    spec = _spec(V1)
    layer = MemoryLayer(spec, MemoryPool(spec), dtype=torch.float32)
    keys = layer.keys
    assert isinstance(keys, TuckerKeys) and not keys.directions.any()
    x = torch.randn(3, 1, HIDDEN)
    layer(x)
    first = keys.directions.clone()
    assert (first.sum((0, 2)) > 0).all()
    # a pair of the other sign stays, and follows small changes of the cores
    keys.directions.neg_()
    keys.cores.data.mul_(1.01)
    layer(x)
    torch.testing.assert_close(keys.directions, -first)
    # somebody who watches the cores says when they change
    keys.watched = True
    keys.cores.data.copy_(torch.eye(2) * torch.tensor([1.0, 3.0]))
    layer(x)
    torch.testing.assert_close(keys.directions, -first)
    keys.stale = True
    layer(x)
    torch.testing.assert_close(keys.directions, -torch.tensor([0.0, 1.0]).expand(2, 2, 2))
    layer.bfloat16()
    assert keys.directions.dtype == torch.float32 and keys.cores.dtype == torch.bfloat16
    assert "keys.directions" in layer.state_dict()


def _mean_score(**settings: Any) -> float:
    """The mean weight of a lookup at the start, for the released code's initial weights."""
    config = MemoryConfig(memory_layers=[0], memory_init="released", **settings)
    spec = resolve(config, 768, num_layers=20)
    layer = MemoryLayer(spec, MemoryPool(spec, device="meta"))
    torch.manual_seed(0)
    with torch.no_grad():
        _, weights_TLO = layer.keys(layer.query(torch.randn(32, 768)))
    return float(weights_TLO.mean())


@pytest.mark.parametrize(
    ("variant", "num_keys", "mean"),
    [("ultramem", 808, 1.68), ("ultramem", 202, 1.13), ("ultramem-v2", 1138, 0.37)],
)
def test_scores_start_as_in_the_released_code(variant: str, num_keys: int, mean: float) -> None:
    settings = {"memory_variant": variant, "memory_num_keys": num_keys, "memory_key_dim": 384}
    topk = 80 if variant == "ultramem" else 32
    # a mean over the cores of many heads
    found = _mean_score(memory_topk=topk, memory_heads=24, **settings)
    assert abs(found / mean - 1) < 0.08, found


def test_scores_start_at_a_mean_of_one() -> None:
    """UltraMemV2, appendix A: what score_moments finds is undone by the gains."""
    config = MemoryConfig(
        memory_layers=[0],
        memory_variant="ultramem-v2",
        memory_num_keys=360,
        memory_key_dim=384,
        memory_heads=16,
    )
    spec = resolve(config, 768, num_layers=20)
    layer = MemoryLayer(spec, MemoryPool(spec, device="meta"))
    torch.manual_seed(0)
    with torch.no_grad():
        _, weights_TLO = layer.keys(layer.query(torch.randn(128, 768)))
    assert 0.8 < float(weights_TLO.mean()) < 1.25
    mean, variance = score_moments(360, 32, 32, 2, 2)
    squares = float(weights_TLO.var()) / float(weights_TLO.mean()) ** 2
    assert spec.query_gain == mean**-0.5 and 0.5 < squares / variance < 2


def test_mean_of_the_best_of_normal_numbers() -> None:
    drawn = torch.randn(4000, 300, generator=torch.Generator().manual_seed(0)).topk(20).values
    assert abs(mean_of_best(20, 300) - float(drawn.mean())) < 0.01
