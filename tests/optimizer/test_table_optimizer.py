"""The tables' optimizer against dense references, over steps in which rows lie idle."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megamem.config import MemoryConfig
from megamem.layers.memory_pool import MemoryPool
from megamem.optimizer import StepOptions, TableOptimizer
from megamem.optimizer.state import MASTER, SLOTS
from megamem.planner import table_state
from megamem.resolution import resolve
from megamem.spec import MemorySpec
from tests.helpers.pools import assert_no_gradient, pool_of, read

NUM_KEYS, WIDTH, STEPS = 5, 16, 6
LR, DECAY, BETAS, EPS = 0.05, 0.1, (0.8, 0.95), 1e-6
KINDS = ("adamw", "lazy_adamw", "rowwise_adamw", "sgd")


def _spec(kind: str = "adamw", **settings) -> MemorySpec:
    config = MemoryConfig(
        memory_layers=[0],
        memory_num_keys=NUM_KEYS,
        memory_topk=2,
        memory_optimizer=kind,
        **settings,
    )
    return resolve(config, WIDTH, seed=1)


def _optimizer(pool: MemoryPool, **options) -> TableOptimizer:
    steps = StepOptions(betas=BETAS, eps=EPS, **options)
    return TableOptimizer(pool, pool.spec, steps, lr=LR, weight_decay=DECAY)


def _batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Pairs, weights and read-out gradients of every step; few rows each, so most lie idle."""
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randint(NUM_KEYS**2, (4, 3), generator=generator),
            torch.rand(4, 3, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(4, WIDTH, generator=generator, dtype=torch.float64).to(dtype),
        )
        for _ in range(STEPS)
    ]


def _read(pool: MemoryPool, batch: tuple[Tensor, Tensor, Tensor], part: slice = slice(None)):
    pairs, weights, grads = (x[part] for x in batch)
    read(pool, pairs, weights.requires_grad_(), [len(pairs)]).backward(grads)


def _dense_gradients(dtype: torch.dtype) -> list[Tensor]:
    """By autograd, in another table of the same rows."""
    pool = MemoryPool(_spec(), "t", dtype=dtype)
    weight, found = pool.values.weight, []
    for batch in _batches(dtype):
        weight.grad = None
        _read(pool, batch)
        found.append(weight.grad)
    return found


def _adamw(weights: Tensor, grads: list[Tensor]) -> Tensor:
    weights = weights.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weights], lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS)
    for grad in grads:
        weights.grad = grad
        optimizer.step()
    return weights.detach()


def _sgd(weights: Tensor, grads: list[Tensor]) -> Tensor:
    weights = weights.clone().requires_grad_()
    optimizer = torch.optim.SGD([weights], lr=LR, weight_decay=DECAY)
    for grad in grads:
        weights.grad = grad
        optimizer.step()
    return weights.detach()


def _rowwise(weights: Tensor, grads: list[Tensor]) -> Tensor:
    weights, first = weights.clone(), torch.zeros_like(weights)
    second = torch.zeros(len(weights), 1, dtype=weights.dtype)
    for step, grad in enumerate(grads, 1):
        first = BETAS[0] * first + (1 - BETAS[0]) * grad
        second = BETAS[1] * second + (1 - BETAS[1]) * grad.square().mean(1, keepdim=True)
        scaled = (second / (1 - BETAS[1] ** step)).sqrt() + EPS
        weights = weights * (1 - LR * DECAY) - LR * first / (1 - BETAS[0] ** step) / scaled
    return weights


def _lazy(weights: Tensor, grads: list[Tensor]) -> Tensor:
    """Row by row: AdamW that sees only the steps that touch the row, and catches up its decay."""
    weights = weights.clone()
    for row in range(len(weights)):
        touched = [step for step, grad in enumerate(grads) if grad[row].any()]
        first = second = torch.zeros(WIDTH, dtype=weights.dtype)
        last = -1
        for count, step in enumerate(touched, 1):
            grad = grads[step][row]
            first = BETAS[0] * first + (1 - BETAS[0]) * grad
            second = BETAS[1] * second + (1 - BETAS[1]) * grad**2
            scaled = (second / (1 - BETAS[1] ** count)).sqrt() + EPS
            weights[row] *= (1 - LR * DECAY) ** (step - last)
            weights[row] -= LR * first / (1 - BETAS[0] ** count) / scaled
            last = step
    return weights


REFERENCES: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "adamw": _adamw,
    "lazy_adamw": _lazy,
    "rowwise_adamw": _rowwise,
    "sgd": _sgd,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("microbatches", [1, 4])
def test_each_optimizer_is_its_reference(kind: str, microbatches: int) -> None:
    pool = pool_of(_spec(kind), torch.float64)
    table = pool.values
    expected = REFERENCES[kind](table.weight.detach(), _dense_gradients(torch.float64))
    optimizer = _optimizer(pool)
    for batch in _batches(torch.float64):
        for part in range(microbatches):
            _read(pool, batch, slice(part * 4 // microbatches, (part + 1) * 4 // microbatches))
        optimizer.step()
        assert_no_gradient(table.gradient)
    torch.testing.assert_close(table.weight.detach(), expected)
    assert optimizer.table_steps == STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_gradient_is_a_gradient_times_the_scale(kind: str) -> None:
    results = []
    for factor, scale in ((1.0, 1.0), (4.0, 0.125), (torch.tensor(0.5), torch.tensor(1.0))):
        pool = pool_of(_spec(kind), torch.float64)
        table = pool.values
        optimizer = _optimizer(pool)
        for pairs, weights, grads in _batches(torch.float64):
            table.gradient.factor = factor
            _read(pool, (pairs, weights, grads / (factor * scale)))
            optimizer.step(scale)
        results.append(table.weight.detach())
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_the_norm_is_that_of_the_dense_gradient() -> None:
    pool = pool_of(_spec(), torch.float64)
    table = pool.values
    optimizer = _optimizer(pool)
    batch, dense = _batches(torch.float64)[0], _dense_gradients(torch.float64)[0]
    _read(pool, batch)
    table.gradient.factor = torch.tensor(3.0)
    squares = optimizer.squared_norm()["t"]
    torch.testing.assert_close(squares, 9 * dense.square().sum())
    assert optimizer.count_zeros() == (dense == 0).sum()
    optimizer.zero_grad()
    assert not optimizer.squared_norm()["t"].any() and table.gradient.factor == 1.0


def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_can_be_dropped() -> None:
    pool = pool_of(_spec(), torch.float32)
    table = pool.values
    optimizer = _optimizer(pool)
    before = table.weight.detach().clone()
    pairs, weights, grads = _batches(torch.float32)[0]
    grads[1, 2] = float("nan")
    _read(pool, (pairs, weights, grads))
    assert not optimizer.squared_norm()["t"].isfinite()
    optimizer.zero_grad()
    assert torch.equal(table.weight, before)
    assert_no_gradient(table.gradient)


def test_evaluation_leaves_no_trace() -> None:
    pool = pool_of(_spec(), torch.float32)
    table = pool.values
    _optimizer(pool)
    pairs, weights, _ = _batches(torch.float32)[0]
    with torch.no_grad():
        read(pool, pairs, weights, [len(pairs)])
    assert not table.gradient.touched.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bf16_table_follows_its_fp32_master(kind: str) -> None:
    pool = pool_of(_spec(kind), torch.bfloat16)
    table = pool.values
    optimizer = _optimizer(pool)
    master = optimizer.state[table.weight][MASTER]
    assert torch.equal(master, table.weight.float())
    expected = master.clone()
    for batch in _batches(torch.bfloat16):
        _read(pool, batch)
        optimizer.step()
    moved = (master - expected).abs().max()
    assert moved > 0.01
    # the interpreter cuts bits off where a GPU rounds
    gap = (table.weight.float() - master).abs()
    assert (gap <= torch.finfo(torch.bfloat16).eps * master.abs()).all()
    table.weight.data.zero_()
    optimizer.reload_masters()
    assert not master.any()


@pytest.mark.parametrize("kind", KINDS)
def test_random_rounding_keeps_no_master_repeats_and_follows_fp32(kind: str) -> None:
    runs = []
    for seed in (1, 1, 2):
        pool = pool_of(_spec(kind, memory_stochastic_rounding=True), torch.bfloat16)
        table = pool.values
        optimizer = _optimizer(pool, seed=seed)
        assert MASTER not in optimizer.state[table.weight]
        for batch in _batches(torch.bfloat16):
            _read(pool, batch)
            optimizer.step()
        runs.append(table.weight.detach().float())
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])

    pool = pool_of(_spec(kind), torch.bfloat16)
    table = pool.values
    optimizer = _optimizer(pool)
    for batch in _batches(torch.bfloat16):
        _read(pool, batch)
        optimizer.step()
    exact = optimizer.state[table.weight][MASTER]
    # each step may go one place wrong, either way
    place = torch.finfo(torch.bfloat16).eps * exact.abs().clamp(min=0.25)
    assert ((runs[0] - exact).abs() <= STEPS * place + 0.02).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "random"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
def test_state_takes_the_bytes_the_planner_counts(kind: str, random: bool, dtype) -> None:
    pool = pool_of(_spec(kind, memory_stochastic_rounding=random), dtype)
    table = pool.values
    state = _optimizer(pool).state[table.weight]
    planned = table_state(kind, half_precision=dtype == torch.bfloat16, stochastic_rounding=random)
    rows = len(table.weight)
    wide = sum(x.nbytes for x in state.values() if x.dim() == 2)
    narrow = sum(x.nbytes for x in state.values() if x.dim() == 1)
    assert wide == planned.optimizer * table.weight.numel()
    assert narrow + table.reads.counts.nbytes == planned.per_row * rows
    assert table.weight.nbytes == planned.weights * table.weight.numel()
    assert table.gradient.buffer.nbytes == planned.gradient * table.weight.numel()


def test_ranks_without_a_table_have_an_optimizer_too() -> None:
    optimizer = TableOptimizer([], _spec(), StepOptions(), lr=LR)
    optimizer.zero_grad()
    optimizer.reduce()
    assert optimizer.squared_norm() == {} and optimizer.count_zeros() == 0
    optimizer.step()
    assert optimizer.table_steps == 1 and optimizer.param_groups[0]["lr"] == LR


def test_every_kind_has_its_slots() -> None:
    assert set(SLOTS) == set(KINDS)
