"""Sparse finetuning: which rows are chosen, and that no other row changes."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from megamem.config import ConfigurationError, MemoryConfig
from megamem.layers.value_table import ValueTable
from megamem.ops import place_rows
from megamem.optimizer import StepOptions, TableOptimizer
from megamem.optimizer.sparse_rows import choose_rows, inverse_frequency
from megamem.optimizer.state import MASTER
from megamem.parallel.row_shard import RowShard
from megamem.read_counter import ReadCounter
from megamem.resolution import resolve
from megamem.row_gradient import RowGradient
from tests.helpers.pools import assert_no_gradient, pool_of
from tests.optimizer.test_table_optimizer import (
    BETAS,
    DECAY,
    EPS,
    LR,
    NUM_KEYS,
    WIDTH,
    _batches,
    _dense_gradients,
    _optimizer,
    _read,
    _spec,
)

SPARSE = ("sgd", "lazy_adamw")
ROWS = NUM_KEYS**2


def best_rows(lookups: list[int], read_counts: list[int], batches: int, limit: int) -> list[int]:
    """The definition, row by row; without a background the share alone."""

    def score(row: int) -> float:
        share = lookups[row] / sum(lookups)
        return share * math.log((batches + 1) / (1 + read_counts[row])) if batches else share

    read = [row for row, count in enumerate(lookups) if count]
    return sorted(sorted(read, key=lambda row: (-score(row), row))[:limit])


@st.composite
def cases(draw) -> tuple[list[int], list[int], int, int]:
    """Few different numbers, so that many scores are equal."""
    rows, batches = draw(st.integers(1, 40)), draw(st.integers(0, 6))
    lookups = draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    read_counts = draw(st.lists(st.integers(0, batches), min_size=rows, max_size=rows))
    return lookups, read_counts, batches, draw(st.integers(1, 50))


@given(cases())
@example(([2, 0, 2, 2, 1], [0, 0, 1, 0, 0], 3, 2))
@example(([1, 3, 3], [0, 0, 0], 0, 2))
@example(([0, 0], [1, 1], 1, 3))
@example(([5, 1, 4], [2, 2, 2], 2, 2))
def test_the_rows_are_those_of_the_definition(case) -> None:
    lookups, read_counts, batches, limit = case
    frequencies = inverse_frequency(torch.tensor(read_counts, dtype=torch.int32), batches)
    shard = RowShard(len(lookups), 0, 1)
    choice = choose_rows(torch.tensor(lookups), frequencies, limit, shard, None)
    expected = best_rows(*case) if any(lookups) else []
    assert choice.rows.tolist() == expected
    theirs = sum(lookups[row] for row in expected)
    assert choice.counts.tolist() == [len(expected), theirs, sum(lookups)]


def _background(table: ValueTable) -> tuple[list[int], int]:
    """Some rows read always, some never, some now and then."""
    batches = 8
    read_counts = [(0, 8, 3, 5)[row % 4] for row in range(len(table.weight))]
    table.reads.counts.copy_(torch.tensor(read_counts))
    table.reads.batches.fill_(batches)
    return read_counts, batches


def _expected_rows(limit: int, read_counts: list[int], batches: int) -> list[list[int]]:
    """By the definition, the rows of every step."""
    found = []
    for pairs, _, _ in _batches(torch.float64):
        counted = Counter(place_rows(pairs, NUM_KEYS, 0).flatten().tolist())
        found.append(best_rows([counted[row] for row in range(ROWS)], read_counts, batches, limit))
    return found


def _of_chosen(weights: Tensor, grads: list[Tensor], chosen: list[list[int]], kind: str) -> Tensor:
    """Row by row, where a row only lives in the steps that choose it."""
    weights = weights.clone()
    for row in range(ROWS):
        first = second = torch.zeros(WIDTH, dtype=weights.dtype)
        steps = [step for step, rows in enumerate(chosen) if row in rows]
        for count, step in enumerate(steps, 1):
            grad = grads[step][row]
            if kind == "lazy_adamw":
                first = BETAS[0] * first + (1 - BETAS[0]) * grad
                second = BETAS[1] * second + (1 - BETAS[1]) * grad**2
                grad = first / (1 - BETAS[0] ** count)
                grad = grad / ((second / (1 - BETAS[1] ** count)).sqrt() + EPS)
            weights[row] = weights[row] * (1 - LR * DECAY) - LR * grad
    return weights


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("limit", [3, 100])
def test_only_chosen_rows_move_and_only_then(kind: str, microbatches: int, limit: int) -> None:
    pool = pool_of(_spec(kind, memory_finetune_rows=limit), torch.float64)
    table = pool.values
    optimizer = _optimizer(pool)
    read_counts, batches = _background(table)
    start, grads = table.weight.detach().clone(), _dense_gradients(torch.float64)
    chosen = _expected_rows(limit, read_counts, batches)
    assert limit > ROWS or len({row for rows in chosen for row in rows}) < ROWS
    for batch, rows, grad in zip(_batches(torch.float64), chosen, grads, strict=True):
        before = table.weight.detach().clone()
        kept = {name: state.clone() for name, state in optimizer.state[table.weight].items()}
        for part in range(microbatches):
            _read(pool, batch, slice(part * 4 // microbatches, (part + 1) * 4 // microbatches))
        everything = optimizer.squared_norm()["t"]
        torch.testing.assert_close(everything, grad.square().sum())
        optimizer.choose()
        torch.testing.assert_close(optimizer.squared_norm()["t"], grad[rows].square().sum())
        optimizer.step()
        moved = (table.weight != before).any(1).nonzero().squeeze(1)
        assert moved.tolist() == rows
        for name, state in optimizer.state[table.weight].items():
            others = [row for row in range(ROWS) if row not in rows]
            assert torch.equal(state[others], kept[name][others]), name
        assert_no_gradient(table.gradient)
        assert not table.reads.lookups.any()
    torch.testing.assert_close(table.weight.detach(), _of_chosen(start, grads, chosen, kind))
    assert table.reads.counts.tolist() == read_counts and table.reads.batches.tolist() == [batches]
    lookups = [
        sum((place_rows(pairs, NUM_KEYS, 0) == row).sum() for row in rows)
        for rows, (pairs, _, _) in zip(chosen, _batches(torch.float64), strict=True)
    ]
    numbers = [sum(map(len, chosen)), int(sum(lookups)), len(chosen) * 4 * 3]
    assert optimizer.chosen["t"].tolist() == numbers


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("kind", SPARSE)
def test_a_bf16_table_and_its_master_stay_bit_for_bit(kind: str, random: bool) -> None:
    pool = pool_of(
        _spec(kind, memory_finetune_rows=2, memory_stochastic_rounding=random), torch.bfloat16
    )
    table = pool.values
    optimizer = _optimizer(pool)
    _background(table)
    state = optimizer.state[table.weight]
    if not random:
        # a master that is not a bf16 number, so that rounding it would be noticed
        state[MASTER] += 1e-4
    for batch in _batches(torch.bfloat16):
        before = [table.weight.detach().clone(), state.get(MASTER, torch.zeros(ROWS, 1)).clone()]
        _read(pool, batch)
        optimizer.choose()
        rows = table.gradient.touched.nonzero().squeeze(1).tolist()
        assert len(rows) == 2
        optimizer.step()
        others = [row for row in range(ROWS) if row not in rows]
        after = [table.weight, state.get(MASTER, torch.zeros(ROWS, 1))]
        for new, old in zip(after, before, strict=True):
            assert torch.equal(new[others], old[others])
        assert (table.weight[rows] != before[0][rows]).any(1).all()


def test_training_counts_the_batches_that_read_a_row() -> None:
    pool = pool_of(_spec(), torch.float64)
    table = pool.values
    optimizer = _optimizer(pool)
    expected = torch.zeros(ROWS, dtype=torch.int32)
    for number, batch in enumerate(_batches(torch.float64)):
        _read(pool, batch, slice(0, 2))
        _read(pool, batch, slice(2, 4))
        if number == 2:
            # a batch that is skipped was not learnt from
            optimizer.zero_grad()
            continue
        optimizer.step()
        expected[place_rows(batch[0], NUM_KEYS, 0).unique()] += 1
    assert table.reads.counts.equal(expected) and table.reads.batches.tolist() == [
        len(_batches(torch.float64)) - 1
    ]
    assert expected.unique().numel() > 2


def test_a_skipped_batch_leaves_no_lookups_and_a_nan_outside_the_choice_shows() -> None:
    pool = pool_of(_spec("sgd", memory_finetune_rows=1), torch.float64)
    table = pool.values
    optimizer = _optimizer(pool)
    read_counts, batches = _background(table)
    first, second, *_ = _batches(torch.float64)
    chosen = _expected_rows(1, read_counts, batches)
    _read(pool, first)
    table.gradient.buffer[[row for row in range(ROWS) if row not in chosen[0]]] = float("nan")
    assert not optimizer.squared_norm()["t"].isfinite()
    optimizer.zero_grad()
    before = table.weight.detach().clone()
    table.gradient.buffer.zero_()
    _read(pool, second)
    optimizer.choose()
    optimizer.step()
    assert (table.weight != before).any(1).nonzero().squeeze(1).tolist() == chosen[1]


def test_a_row_of_u_and_its_row_of_v_are_chosen_together() -> None:
    config = MemoryConfig(
        memory_layers=[0],
        memory_variant="peer",
        memory_num_keys=NUM_KEYS,
        memory_topk=2,
        memory_optimizer="sgd",
        memory_finetune_rows=3,
    )
    pool = pool_of(resolve(config, WIDTH, seed=1), torch.float64)
    optimizer = TableOptimizer(pool, pool.spec, StepOptions(), lr=LR)
    for table in pool:
        read_counts, batches = _background(table)
    for (pairs, weights, grads), rows in zip(
        _batches(torch.float64), _expected_rows(3, read_counts, batches), strict=True
    ):
        before = [table.weight.clone() for table in pool]
        x_TD = torch.randn(len(pairs), WIDTH, dtype=torch.float64, requires_grad=True)
        pool.read(pairs, weights.requires_grad_(), [len(pairs)], x_TD).backward(grads)
        optimizer.choose()
        optimizer.step()
        for old, table in zip(before, pool, strict=True):
            assert (old != table.weight).any(1).nonzero().squeeze(1).tolist() == rows


def test_a_state_without_counters_leaves_those_that_there_are() -> None:
    table, other = (pool_of(_spec(), torch.float64).values for _ in range(2))
    bare = other.state_dict()
    assert sorted(bare) == ["placement", "weight"]
    table.accumulate_into(RowGradient(table.weight), ReadCounter(table.weight))
    _background(table)
    whole = {name: tensor.clone() for name, tensor in table.state_dict().items()}
    table.reads.in_checkpoint = False
    table.load_state_dict(bare)
    assert table.reads.in_checkpoint
    names = ("read_counts", "batches")
    assert all(torch.equal(table.state_dict()[name], whole[name]) for name in names)
    other.accumulate_into(RowGradient(other.weight), ReadCounter(other.weight))
    other.load_state_dict(whole)
    assert torch.equal(other.reads.counts, table.reads.counts) and other.reads.batches.tolist() == [
        8
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_finetune_rows": 0}, "--memory-finetune-rows 0 must be at least 1"),
        (
            {"memory_finetune_rows": 5},
            "--memory-optimizer adamw updates every row .* --memory-optimizer sgd or lazy_adamw",
        ),
        (
            {"memory_finetune_rows": 5, "memory_optimizer": "rowwise_adamw"},
            "--memory-optimizer rowwise_adamw updates every row",
        ),
        (
            {"memory_background": "there"},
            "--memory-background there needs --memory-finetune-rows, which",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MemoryConfig(**settings)


@pytest.mark.parametrize("kind", SPARSE)
def test_settings_that_work(kind: str) -> None:
    config = MemoryConfig(memory_optimizer=kind, memory_finetune_rows=1, memory_background="there")
    assert config.memory_finetune_rows == 1
