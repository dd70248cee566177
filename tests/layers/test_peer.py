"""PEER against its definition, and W ranks against one process, in float64."""

from itertools import product

import pytest
import torch
from torch import Tensor

from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.layers.value_table import ValueTable
from megamem.layers.variants import table_names
from megamem.layers.variants.peer import U
from megamem.ops import unplace_rows
from megamem.row_gradient import RowGradient
from megamem.spec import MemorySpec
from tests.helpers.distributed import run_distributed
from tests.layers.test_memory import HIDDEN, Case, _all_cases, _spec

PEER = {"memory_variant": "peer", "memory_value_dim": None}
SILENT = {"memory_value_init_std": 0.0}


def _build(**settings) -> tuple[MemoryPool, MemoryLayer]:
    spec = _spec(**PEER, **settings)
    pool = MemoryPool(spec, "t", dtype=torch.float64)
    return pool, MemoryLayer(spec, pool, dtype=torch.float64)


def _v_and_u(pool: MemoryPool) -> list[ValueTable]:
    v, u = pool
    assert pool.tables[U] is u
    return [v, u]


def _by_definition(spec: MemorySpec, u_RD: Tensor, v_RD: Tensor, layer, x_TD: Tensor) -> Tensor:
    """All N * N scores of every head, the K largest, their softmax, weight * gelu(u x) * v."""
    query_THQ = layer.query(x_TD)
    first, second = query_THQ.chunk(2, -1)
    scores = torch.einsum("thc,hnc->thn", first, layer.keys.sub_keys[0])[..., :, None]
    scores = scores + torch.einsum("thc,hnc->thn", second, layer.keys.sub_keys[1])[..., None, :]
    best_THK, pairs_THK = scores.flatten(-2).topk(spec.topk, -1)
    hidden_THK = torch.einsum("thkd,td->thk", u_RD[pairs_THK], x_TD)
    # gelu written out: x times the normal distribution up to x
    active_THK = hidden_THK * (1 + torch.erf(hidden_THK / 2**0.5)) / 2
    return torch.einsum("thk,thkd->td", best_THK.softmax(-1) * active_THK, v_RD[pairs_THK])


def _by_pair(table: ValueTable, spec: MemorySpec) -> Tensor:
    """A table's weight with the row of pair (i, j) at i * N + j."""
    rows_R = torch.arange(spec.num_rows)
    pairs_R = unplace_rows(rows_R, spec.num_keys, spec.placement_seed)
    return torch.empty_like(table.weight).index_copy(0, pairs_R, table.weight)


@pytest.mark.parametrize("wire", ["alltoall", "allgather"])
def test_a_layer_is_its_definition(wire: str) -> None:
    pool, layer = _build(memory_wire=wire, memory_placement_seed=5)
    spec, (v, u) = pool.spec, _v_and_u(pool)
    x_TD = torch.randn(7, HIDDEN, dtype=torch.float64, requires_grad=True)
    grad_TD = torch.randn(7, HIDDEN, dtype=torch.float64)
    inputs = [x_TD, v.weight, u.weight, *layer.parameters()]
    expected = _by_definition(spec, _by_pair(u, spec), _by_pair(v, spec), layer, x_TD)
    expected_grads = torch.autograd.grad(expected, inputs, grad_TD)
    out = layer(x_TD.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out, inputs, grad_TD)
    for ours, truth in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, truth)


def test_u_and_v_start_apart_and_v_can_start_at_zero() -> None:
    pools = (_build(memory_num_keys=40, **s)[0] for s in ({}, SILENT))
    (v, u), (silent_v, silent_u) = map(_v_and_u, pools)
    for weight in (v.weight, u.weight, silent_u.weight):
        assert weight.std().item() == pytest.approx(HIDDEN**-0.5, rel=0.02)
    assert not silent_v.weight.any()
    flat = torch.stack((v.weight.flatten(), u.weight.flatten()))
    assert abs(torch.corrcoef(flat)[0, 1]) < 0.03


def test_every_table_has_a_name() -> None:
    shared, own = (_spec(**PEER, memory_pool=pool) for pool in ("shared", "layer"))
    assert table_names(shared) == ["shared", "shared.u"]
    assert table_names(own) == ["layer_0", "layer_0.u", "layer_1", "layer_1.u"]
    assert table_names(_spec(memory_pool="layer")) == ["layer_0", "layer_1"]


def test_a_layer_of_another_variant_is_not_given_experts() -> None:
    peer, plain = _spec(**PEER), _spec()
    for spec, other in ((peer, plain), (plain, peer)):
        with pytest.raises(AssertionError):
            MemoryLayer(spec, MemoryPool(other))


def test_bf16_is_fp64_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dots and activations in fp32, whatever the tables are: only rows and bags are rounded."""
    # the interpreter truncates
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pool, layer = _build()
    x_TD = torch.randn(9, HIDDEN, dtype=torch.float64).bfloat16()
    row_ids_TL, weights_TL = (y.detach() for y in layer.keys(layer.query(x_TD.double())))
    pool.tables.to(torch.bfloat16)
    out = pool.read(row_ids_TL, weights_TL.float(), [9], x_TD)
    assert out.dtype == torch.bfloat16
    exact = MemoryPool(_spec(**PEER), "t")
    exact.tables.load_state_dict(pool.tables.state_dict())
    exact.tables.double()
    truth = exact.read(row_ids_TL, weights_TL, [9], x_TD.double())
    assert ((out.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-6).all()


def test_experts_get_gradients_where_nothing_else_does() -> None:
    """The buffers of both tables get gradients though tokens and weights are frozen."""
    pool, layer = _build()
    for table in pool:
        table.weight.requires_grad_(False)
        table.accumulate_into(RowGradient(table.weight, table.weight.dtype))
    x_TD = torch.randn(4, HIDDEN, dtype=torch.float64)
    row_ids_TL, weights_TL = (y.detach() for y in layer.keys(layer.query(x_TD)))
    pool.read(row_ids_TL, weights_TL, [4], x_TD).sum().backward()
    for table in pool:
        gradient = table.gradient
        assert (gradient.buffer.abs().sum(1) > 0).equal(gradient.touched)


def _cases(world: int) -> list[Case]:
    wires, sharded = ("alltoall", "allgather"), (False, True)
    cases = [
        Case(_spec(**PEER, memory_wire=wire, memory_qk_norm=both), s, recompute=both, buffer=both)
        for wire, s, both in product(wires, sharded, (False, True))
    ]
    # ranks with unequal tokens, one of them with none; a table smaller than the group
    counts = tuple(range(world)) if world > 1 else (3,)
    for wire in wires:
        cases += [
            Case(_spec(**PEER, memory_wire=wire), True, counts=counts),
            Case(_spec(**PEER, memory_wire=wire), True, counts=counts, vary=True, buffer=True),
            Case(_spec(**PEER, memory_wire=wire, memory_num_keys=1, memory_topk=1), True),
        ]
        # groups that leave replicas
        cases += [
            Case(_spec(**PEER, memory_wire=wire), s, group_size=size, buffer=s)
            for size in range(1, world)
            if world % size == 0
            for s in sharded
        ]
    return cases


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_equal_one_process(world_size: int) -> None:
    run_distributed(_all_cases, world_size, _cases(world_size))
