"""The losses of Tucker scores against their formulas, and their gradients on ranks, in float64."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megamem.config import MemoryConfig
from megamem.layers import losses
from megamem.layers.losses import LossScale, balance_loss, core_loss, start_loss
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.metrics import Metrics, Watched
from megamem.parallel.memory_group import MemoryGroup, form, partition
from megamem.parallel.row_shard import even_counts
from megamem.resolution import resolve
from tests.helpers.distributed import run_distributed

HIDDEN, BATCH = 16, 2


def _rotated(values: list[float], seed: int = 0) -> Tensor:
    """A core with these singular values, [1, A, A]."""
    torch.manual_seed(seed)
    size = len(values)
    left, right = (torch.linalg.qr(torch.randn(size, size).double())[0] for _ in range(2))
    return (left @ torch.diag(torch.tensor(values).double()) @ right.mT).unsqueeze(0)


def test_the_loss_of_the_cores_is_its_formula() -> None:
    cores = torch.stack((_rotated([2.0, 0.5, 0.25]), torch.zeros(1, 3, 3).double()))
    expected = ((0.5 - 0.15) ** 2 + (0.25 - 0.15) ** 2) / 2
    assert core_loss(cores, 0.15).item() == pytest.approx(expected)
    # a core whose other singular values are within the margin, and one of rank 1
    assert core_loss(_rotated([3.0, 0.1])[None], 0.15) == 0
    assert core_loss(torch.tensor([[[[3.0]]]]), 0.15) == 0


def test_the_loss_is_the_mean_over_heads_of_the_sum_of_cores() -> None:
    # [[2, 1], [1, 2]] has the singular values 3 and 1; the other head has 2 and 2
    cores = torch.tensor(
        [[[[2, 0], [0, 2]], [[2, 0], [0, 0]]], [[[0, 1], [1, 0]], [[0, 0], [0, 2]]]]
    )
    assert core_loss(cores.double(), 0.5).item() == pytest.approx((0.5**2 + 1.5**2) / 2)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("turned", [False, True])
def test_the_gradient_of_the_cores_is_that_of_their_singular_values(
    ranks: int, turned: bool
) -> None:
    torch.manual_seed(ranks)
    cores = torch.rand(2, 3, ranks, ranks, dtype=torch.float64)
    if turned:
        cores = -cores.flip(-1)  # of another sign of the determinant
    cores.requires_grad_()
    values = torch.linalg.svdvals(cores.sum(0))
    expected = (values[:, 1:] - 0.15).clamp(min=0).square().sum(1).mean() / (ranks - 1)
    loss = core_loss(cores, 0.15)
    torch.testing.assert_close(loss, expected)
    assert loss > 0
    (ours,), (truth,) = (torch.autograd.grad(each, cores) for each in (loss, expected))
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("values", [[2.0, 1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
def test_equal_singular_values_have_finite_gradients(values: list[float]) -> None:
    """Torch's gradient of an SVD is not finite there."""
    core = _rotated(values).requires_grad_()
    core_loss(core[None], 0.15).backward()
    left, _, right = torch.linalg.svd(core.detach())
    slopes = [0.0, *(2 * max(0.0, value - 0.15) for value in values[1:])]
    expected = left @ torch.diag(torch.tensor(slopes).double()) @ right / (len(values) - 1)
    if values.count(values[0]) == 1:
        torch.testing.assert_close(core.grad, expected)
    assert core.grad.isfinite().all()
    torch.testing.assert_close(core.grad.norm(), expected.norm())


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_core_that_is_not_finite_does_not_end_the_run(ranks: int) -> None:
    """LAPACK would; Megatron skips such a batch, or stops with a message of its own."""
    core = torch.ones(1, 1, ranks, ranks)
    core[0, 0, 1, 1] = math.nan
    assert core_loss(core, 0.15).isnan()
    core[0, 0, 1, 1] = math.inf
    core_loss(core, 0.15)


def _balance_by_definition(
    query_T2AC: Tensor, keys_2HNAC: Tensor, directions_2HA: Tensor, topk: int
) -> Tensor:
    by_rank_T2HNA = torch.einsum(
        "tzac,zhnac->tzhna", query_T2AC.expand(-1, -1, keys_2HNAC.shape[3], -1), keys_2HNAC
    )
    scores_T2HN = torch.einsum("tzhna,zha->tzhn", by_rank_T2HNA, directions_2HA)
    chosen_T2HN = torch.zeros_like(scores_T2HN).scatter(-1, scores_T2HN.topk(topk).indices, 1.0)
    products_2HN = scores_T2HN.softmax(-1).mean(0) * chosen_T2HN.mean(0)
    return keys_2HNAC.shape[2] * products_2HN.sum((0, 2)).mean()


@pytest.mark.parametrize("query_ranks", [1, 2])
@pytest.mark.parametrize("piece", [None, 100])
def test_the_balance_loss_is_its_formula(
    query_ranks: int, piece: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if piece:
        # three tokens at a time
        monkeypatch.setattr(losses, "PIECE", piece)
    torch.manual_seed(0)
    query = torch.randn(11, 2, query_ranks, 3, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 2, 7, 2, 3, dtype=torch.float64, requires_grad=True)
    directions = torch.nn.functional.normalize(torch.randn(2, 2, 2).double(), dim=-1)
    expected = _balance_by_definition(query, keys, directions, 3)
    loss = balance_loss(query, keys, directions, 3)
    torch.testing.assert_close(loss, expected)
    ours, truth = (torch.autograd.grad(5 * each, (query, keys)) for each in (loss, expected))
    torch.testing.assert_close(ours, truth)


def test_equally_chosen_sub_keys_have_a_balance_loss_of_twice_k() -> None:
    """p = 1 / N, and f = K / N on the mean over n: K for each side."""
    keys = torch.zeros(2, 1, 4, 1, 2, dtype=torch.float64)
    query = torch.zeros(3, 2, 1, 2, dtype=torch.float64)
    assert balance_loss(query, keys, torch.ones(2, 1, 1), 2).item() == pytest.approx(4)


def test_the_balance_loss_of_fp16_has_a_gradient() -> None:
    """It is far below the smallest number of fp16 before the loss scale."""
    torch.manual_seed(0)
    inputs = (torch.randn(64, 2, 1, 4), 1e-3 * torch.randn(2, 1, 50, 1, 4))
    found = []
    for dtype in (torch.float16, torch.float64):
        query, keys = (x.to(torch.float16).to(dtype).requires_grad_() for x in inputs)
        loss = balance_loss(query, keys, torch.ones(2, 1, 1), 5)
        start_loss(query, loss, LossScale(2.0**14), 64).backward(torch.zeros_like(query))
        found.append(query.grad.double() / 2**14)
    assert 0 < found[1].abs().max() < torch.finfo(torch.float16).tiny
    assert (found[0] - found[1]).abs().max() < 1e-2 * found[1].abs().max()


def _spec(**settings):
    base = {
        "memory_layers": [0],
        "memory_variant": "ultramem",
        "memory_num_keys": 5,
        "memory_topk": 4,
        "memory_final_topk": 6,
        "memory_key_dim": 8,
        "memory_core_aux_weight": 0.3,
        "memory_balance_weight": 0.2,
        "memory_query_conv": 3,
    }
    return resolve(MemoryConfig(**{**base, **settings}), HIDDEN, seed=7)


def _layer(spec, memory_group: MemoryGroup | None = None, **where) -> MemoryLayer:
    pool = MemoryPool(spec, group=memory_group, dtype=torch.float64)
    return MemoryLayer(spec, pool, dtype=torch.float64, **where)


def _trained(layer: MemoryLayer) -> MemoryLayer:
    """The layer after some training: its convolution sees the tokens before."""
    weight = layer.query_conv.weight.data
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return layer


def _hidden(positions: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (2, positions, BATCH, HIDDEN)
    x, grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), grad


def test_the_losses_of_a_layer_join_its_gradient() -> None:
    spec = _spec()
    layer, (x, grad) = _trained(_layer(spec)), _hidden(6)
    scale = LossScale(0.5)
    layer.losses.scale = scale
    query = layer.query(layer.query_conv(x.flatten(0, 1), BATCH, [6 * BATCH]))
    keys, cores = layer.keys.norm(layer.keys.sub_keys), layer.keys.cores
    layer.keys._refresh()
    directions = layer.keys.directions.double()
    beside = 0.3 * core_loss(cores, 0.15)
    beside = beside + 0.2 * _balance_by_definition(query, keys, directions, spec.topk)
    inputs = [x, *layer.parameters()]
    layer.losses, layer.keys.losses = None, None
    for by_tokens, factor in ((False, 0.5), (True, 0.5 * 12)):
        scale.by_tokens = by_tokens
        total = (layer(x) * grad).sum() + factor * beside
        expected = torch.autograd.grad(total, inputs, retain_graph=True)
        layer.keys.losses = losses.ScoreLosses(spec, None, scale)
        ours = torch.autograd.grad(layer(x), inputs, grad)
        torch.testing.assert_close(ours, expected)
        layer.keys.losses = None


def test_a_layer_that_does_not_train_has_no_losses() -> None:
    layer, (x, grad) = _layer(_spec()), _hidden(4)
    inputs = [x, *layer.parameters()]
    layer.eval()
    found = torch.autograd.grad(layer(x), inputs, grad)
    layer.keys.losses = None
    torch.testing.assert_close(found, torch.autograd.grad(layer(x), inputs, grad))
    assert _layer(_spec(memory_core_aux_weight=0, memory_balance_weight=0)).losses is None


def _gradients(layer: MemoryLayer, x: Tensor, grad: Tensor, recompute: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    out = checkpoint(layer, x, use_reentrant=True) if recompute else layer(x)
    out.backward(grad)
    weights = {**dict(layer.named_parameters()), "values": layer.pool.values.weight}
    return {"out": out.detach(), "x": x.grad, **{n: w.grad for n, w in weights.items()}}


def _measured(layer: MemoryLayer) -> Metrics:
    spec = layer.pool.spec
    watched = Watched(
        layers=[0],
        tables=[],
        num_keys=spec.keys_per_side,
        heads=spec.heads,
        topk=spec.reads_per_head,
        softmax=False,
    )
    metrics = Metrics(watched, "cpu")
    layer.metrics = layer.losses.metrics = metrics.layers[0]
    return metrics


def _ranks_equal_one_process(settings: dict, tokens_sharded: bool, recompute: bool) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    # replicated tokens are divided unevenly, and within a position
    positions = 2 * world if tokens_sharded else 5
    spec = _spec(**settings)
    scale = LossScale(0.5, by_tokens=recompute)
    alone = _trained(_layer(spec))
    alone.losses.scale = scale
    measured = _measured(alone)
    x, grad = _hidden(positions)
    expected = _gradients(alone, x, grad, recompute=False)

    # a replica of the table on each rank
    ranks = list(range(world))
    replicas = form(partition([ranks], spec.layout.grid), token_ranks=ranks)
    where = {"group": dist.group.WORLD, "tokens_sharded": tokens_sharded}
    layer = _trained(_layer(spec, replicas, **where))
    layer.losses.scale = scale
    measured_here = _measured(layer)
    counts = even_counts(positions, world)
    part = slice(sum(counts[:rank]), sum(counts[: rank + 1])) if tokens_sharded else slice(None)
    x, grad = _hidden(positions)
    own = x.detach()[part].clone().requires_grad_()
    found = _gradients(layer, own, grad[part], recompute)
    for name, truth in expected.items():
        ours = found[name]
        if name in ("out", "x"):
            truth = truth[part]
        elif tokens_sharded or name == "values":
            # as Megatron does for weights under sequence parallelism; tables have their own way
            dist.all_reduce(ours)
        torch.testing.assert_close(ours, truth, msg=lambda text, name=name: f"{name}: {text}")
        assert ours.abs().sum() > 0, name
    truth, ours = (each.report(1).scalars for each in (measured, measured_here))
    assert {"memory/core_loss/layer_0", "memory/balance_loss/layer_0"} < set(truth)
    assert ours == pytest.approx(truth)


CASES = (
    ({}, False, False),
    ({}, True, True),
    # a token sees more tokens before it than a rank has
    ({"memory_query_conv": 7}, True, False),
    ({"memory_query_conv": 9}, False, True),
    # replicated tokens are dropped alike on ranks with equal random states
    ({"memory_dropout": 0.25}, False, True),
    ({"memory_variant": "ultramem-v2", "memory_query_conv": 2}, False, False),
    ({"memory_variant": "ultramem-v2", "memory_tucker_rank": 3}, True, False),
)


def _all_cases() -> None:
    for case in CASES:
        _ranks_equal_one_process(*case)


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_equal_one_process(world_size: int) -> None:
    run_distributed(_all_cases, world_size)
