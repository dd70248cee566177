"""Metrics against loops over the same lookups, and bytes sent against what collectives send."""

import math
import time
from collections import Counter
from dataclasses import replace
from statistics import fmean
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.metrics import (
    MAP_SIDE,
    SAMPLED_ROWS,
    Metrics,
    Watched,
    _spreading_multiplier,
    kl_from_uniform,
)
from megamem.parallel.memory_group import MemoryGroup, form, partition
from megamem.resolution import resolve
from megamem.spec import Grid
from tests.helpers.distributed import run_distributed
from tests.helpers.pools import on_group, read

HIDDEN, HEADS, TOPK, LAYER, TABLE = 16, 2, 4, 3, "shared"


def _watched(num_keys: int) -> Watched:
    return Watched(layers=[1, LAYER], tables=[TABLE], num_keys=num_keys, heads=HEADS, topk=TOPK)


def _lookups(num_keys: int, tokens: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    # crowded towards row 0, so that usage is not even
    rows = (torch.rand(tokens, HEADS * TOPK) ** 3 * num_keys**2).long()
    weights = torch.randn(tokens, HEADS, TOPK).softmax(-1)
    return rows, weights.flatten(1), torch.randn(tokens, HIDDEN)


def _model(
    num_keys: int = 9, group: MemoryGroup | None = None, **settings
) -> tuple[MemoryLayer, Metrics]:
    config = MemoryConfig(
        memory_layers=[1, LAYER],
        memory_num_keys=num_keys,
        memory_heads=HEADS,
        memory_topk=TOPK,
        **settings,
    )
    group = group or MemoryGroup()
    spec = resolve(config, HIDDEN, seed=0, tokens_vary=group.world_size > 1)
    pool = MemoryPool(on_group(spec, group), TABLE, group, dtype=torch.float64)
    layer = MemoryLayer(pool.spec, pool, layer=LAYER, dtype=torch.float64)
    metrics = Metrics(_watched(num_keys), "cpu")
    layer.metrics, pool.values.metrics = metrics.layers[LAYER], metrics.tables[TABLE]
    return layer, metrics


def _hidden(tokens: int = 6) -> Tensor:
    return torch.randn(tokens, 1, HIDDEN, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("num_keys", [9, 300])
def test_counts_are_those_of_a_loop(num_keys: int) -> None:
    torch.manual_seed(0)
    metrics, passes = Metrics(_watched(num_keys), "cpu"), [_lookups(num_keys) for _ in range(3)]
    for lookups in passes:
        metrics.layers[LAYER].record(*lookups)
    report = metrics.report(1)
    assert report is not None

    side = min(num_keys, MAP_SIDE)
    rows = [row for rows, _, _ in passes for row in rows.flatten().tolist()]
    cells = Counter(
        (row // num_keys * side // num_keys, row % num_keys * side // num_keys) for row in rows
    )
    assert report.usage[LAYER].sum() == len(rows)
    assert all(report.usage[LAYER][cell] == count for cell, count in cells.items())

    weights = torch.cat([weights for _, weights, _ in passes]).view(-1, TOPK).double()
    gates = torch.cat([gate for _, _, gate in passes]).double()
    shown = {name.split("/")[1]: value for name, value in report.scalars.items()}
    assert {name.split("/")[2] for name in report.scalars} == {f"layer_{LAYER}"}
    assert shown["top1_weight"] == pytest.approx(weights.amax(1).mean().item())
    entropy = -(weights * weights.log()).sum(1).mean().item()
    assert shown["score_entropy"] == pytest.approx(entropy)
    assert shown["gate_mean"] == pytest.approx(gates.mean().item(), abs=1e-6)
    # the mean of a softmax says nothing
    assert "weight_mean" not in shown
    if num_keys < MAP_SIDE:
        assert shown["rows_used"] == pytest.approx(100 * len(set(rows)) / num_keys**2)


@pytest.mark.parametrize("cores", [1, 2])
def test_scores_of_any_sign_count_by_their_absolute_share(cores: int) -> None:
    torch.manual_seed(0)
    watched = replace(_watched(9), softmax=False)
    metrics = Metrics(watched, "cpu")
    rows, _, _ = _lookups(9)
    weights = torch.randn(len(rows), HEADS * TOPK, cores, dtype=torch.float64) * 5 - 2
    # a head without any weight, and a pass without tokens
    weights[3, TOPK:] = 0.0
    given = weights.squeeze(-1)
    metrics.layers[LAYER].record(rows, given, None)
    metrics.layers[LAYER].record(rows[:0], given[:0], None)
    report = metrics.report(1)
    assert report is not None
    shown = {name.split("/")[1]: value for name, value in report.scalars.items()}
    tops, entropies = [], []
    for token in weights.tolist():
        for head in (token[:TOPK], token[TOPK:]):
            sizes = [sum(map(abs, lookup)) for lookup in head]
            shares = [size / (sum(sizes) or 1) for size in sizes]
            tops.append(max(shares))
            entropies.append(-sum(share * math.log(share) for share in shares if share))
    assert shown["top1_weight"] == pytest.approx(fmean(tops))
    assert shown["score_entropy"] == pytest.approx(fmean(entropies))
    assert shown["weight_mean"] == pytest.approx(weights.mean().item(), rel=1e-5)
    assert "gate_mean" not in shown


def test_rows_used_in_a_large_table_is_a_fair_sample() -> None:
    num_keys, used = 1024, 0.2
    metrics = Metrics(_watched(num_keys), "cpu")
    rows = torch.arange(int(used * num_keys**2) // 8 * 8).view(-1, 8)
    metrics.layers[LAYER].record(rows, torch.full(rows.shape, 0.25), None)
    report = metrics.report(1)
    assert report is not None
    # four standard deviations of a sample drawn at random
    error = 400 * math.sqrt(used * (1 - used) / SAMPLED_ROWS)
    assert report.scalars[f"memory/rows_used/layer_{LAYER}"] == pytest.approx(20, abs=error)


@settings(deadline=None)
@given(st.integers(1, 2**31))
def test_every_row_has_a_place_of_its_own(num_rows: int) -> None:
    factor = _spreading_multiplier(num_rows)
    assert math.gcd(factor, num_rows) == 1
    assert factor * num_rows < 2**63


@pytest.mark.parametrize("num_keys", [9, 300])
def test_kl_of_even_reads_is_zero_and_of_one_cell_the_log_of_its_share(num_keys: int) -> None:
    side = min(num_keys, MAP_SIDE)
    keys = torch.tensor([0.0] * side)
    for key in range(num_keys):
        keys[key * side // num_keys] += 1
    even = 7 * torch.outer(keys, keys).double()
    assert kl_from_uniform(even, num_keys) == pytest.approx(0, abs=1e-12)
    one_cell = torch.zeros_like(even)
    one_cell[0, 1] = 5
    share = keys[0] * keys[1] / num_keys**2
    assert kl_from_uniform(one_cell, num_keys) == pytest.approx(-math.log(share), rel=1e-6)


def test_only_passes_that_are_learnt_from_are_counted_and_each_once() -> None:
    layer, metrics = _model()
    with torch.no_grad():
        layer(_hidden())
    assert not metrics.sums.any() and not metrics.tables[TABLE].timings
    checkpoint(layer, _hidden(), use_reentrant=True).sum().backward()
    assert metrics.layers[LAYER].usage.sum() == 6 * HEADS * TOPK
    assert metrics.tables[TABLE].received == 6 * HEADS * TOPK
    assert len(metrics.tables[TABLE].timings) == 1


def _fill(layer: nn.Module, metrics: Metrics, squares: float = 0.0) -> None:
    table = layer.pool.values
    metrics.tables[TABLE].fill(table.weight, table.shard, squares)


def test_a_report_ends_a_window() -> None:
    layer, metrics = _model()
    layer(_hidden()).sum().backward()
    _fill(layer, metrics, squares=16.0)
    first = metrics.report(1, gradient_scale=0.5)
    assert first is not None
    assert first.scalars[f"memory/grad_norm/{TABLE}"] == 2.0
    norms = layer.pool.values.weight.detach().norm(dim=1)
    row_norm = norms.square().mean().sqrt().item()
    assert first.scalars[f"memory/row_norm/{TABLE}"] == pytest.approx(row_norm)
    assert first.scalars[f"memory/shard_load/{TABLE}"] == 1.0
    assert first.scalars[f"memory/lookup_ms/{TABLE}"] > 0
    _fill(layer, metrics)
    second = metrics.report(1)
    assert second is not None
    names = {name.split("/")[1] for name in second.scalars}
    assert names == {"grad_norm", "row_norm", "sent_megabytes"}
    assert second.scalars[f"memory/grad_norm/{TABLE}"] == 0.0


def test_a_report_without_passes_shows_nothing() -> None:
    report = Metrics(_watched(9), "cpu").report(1)
    assert report is not None and report.scalars == {}


@pytest.mark.parametrize("num_keys", [9, 300])
def test_recording_never_waits_for_the_device(num_keys: int) -> None:
    # a fake tensor has no numbers: to ask for one, or for a size that depends on one, raises
    with FakeTensorMode():
        metrics = Metrics(_watched(num_keys), "cpu")
        metrics.layers[LAYER].record(*_lookups(num_keys))
        assert metrics.report(1, wanted=False) is None


class Wire:
    """Counts the bytes that this rank hands to others."""

    def __init__(self) -> None:
        self.bytes, self.rank, self.ranks = 0, dist.get_rank(), dist.get_world_size()

    def all_to_all_single(self, out, x, recv, send, **how):
        row = x[:1].nbytes if len(x) else 0
        self.bytes += (sum(send) - send[self.rank]) * row
        return TRULY["all_to_all_single"](out, x, recv, send, **how)

    def all_gather_into_tensor(self, out, x, **how):
        self.bytes += (self.ranks - 1) * x.nbytes
        return TRULY["all_gather_into_tensor"](out, x, **how)

    def reduce_scatter_tensor(self, out, x, **how):
        self.bytes += (self.ranks - 1) * out.nbytes
        return TRULY["reduce_scatter_tensor"](out, x, **how)


TRULY = {
    name: getattr(dist, name)
    for name in ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
}


def _bytes_are_those_on_the_wire() -> None:
    tokens = 5 + 2 * dist.get_rank()
    groups = {
        "row": form(partition([[0, 1]], Grid(local_rows=2))),
        "column": form(partition([[0, 1]], Grid(local_columns=2))),
    }
    for mode, wire in (("row", "alltoall"), ("row", "allgather"), ("column", "auto")):
        layer, metrics = _model(group=groups[mode], memory_wire=wire, memory_mode=mode)
        rows, weights, _ = _lookups(9, tokens)
        weights = weights.requires_grad_()
        counted = Wire()
        with mock.patch.multiple(dist, **{name: getattr(counted, name) for name in TRULY}):
            read(layer.pool, rows, weights, [5, 7]).sum().backward()
        assert counted.bytes > 0
        assert metrics.tables[TABLE].bytes_sent == counted.bytes, (mode, wire)


def _ranks_report_what_one_process_does() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x = torch.randn(12, 1, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    alone, expected = _model()
    with mock.patch.object(dist, "is_initialized", return_value=False):
        expected = Metrics(_watched(9), "cpu")
        alone.metrics = expected.layers[LAYER]
        alone.pool.values.metrics = expected.tables[TABLE]
        alone(x)
        _fill(alone, expected, squares=9.0)
        wanted = expected.report(1)
    for columns in (False, True):
        group = form(partition([[0, 1]], Grid(1, 1, 1, 2) if columns else Grid(1, 1, 2, 1)))
        layer, metrics = _model(group=group)
        layer(x.split([5, 7])[rank])
        _fill(layer, metrics, squares=4.5)
        report = metrics.report(1, wanted=rank == ranks - 1)
        assert (report is None) == (rank != ranks - 1)
        if report is not None:
            assert torch.equal(report.usage[LAYER], wanted.usage[LAYER])
            same = [n for n in wanted.scalars if not n.split("/")[1].endswith(("_ms", "load"))]
            same.remove(f"memory/sent_megabytes/{TABLE}")
            for name in same:
                assert report.scalars[name] == pytest.approx(wanted.scalars[name], rel=1e-6), name
            assert 1.0 <= report.scalars[f"memory/shard_load/{TABLE}"] <= 2.0
            assert report.scalars[f"memory/sent_megabytes/{TABLE}"] > 0

    # a stage without memory layers takes part with zeros
    _, metrics = _model()
    if rank == 0:
        metrics.layers[LAYER].record(*_lookups(9))
        metrics.tables[TABLE].received += 320
        metrics.tables[TABLE].fill(alone.pool.values.weight, alone.pool.values.shard)
    report = metrics.report(1)
    assert report.usage[LAYER].sum() == 320 and not report.usage[1].any()
    assert report.scalars[f"memory/shard_load/{TABLE}"] == 1.0


def _on_two_ranks() -> None:
    _bytes_are_those_on_the_wire()
    _ranks_report_what_one_process_does()


@pytest.mark.gloo
def test_ranks_together_report_what_one_process_does_and_the_bytes_they_send() -> None:
    run_distributed(_on_two_ranks, 2)


@pytest.mark.slow
@pytest.mark.parametrize("num_keys", [64, 512])
def test_recording_and_reporting_every_step_costs_little(num_keys: int, monkeypatch) -> None:
    """Under 2 % of a step of a model that is one memory layer and nothing else."""
    # interpreted kernels would make any cost look small
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokens, width = 512, 512
    config = MemoryConfig(memory_layers=[0], memory_num_keys=num_keys)
    spec = resolve(config, width, seed=0)
    pool = MemoryPool(spec, TABLE)
    layer, table = MemoryLayer(spec, pool), pool.values
    metrics = Metrics(
        Watched(layers=[0], tables=[TABLE], num_keys=num_keys, heads=4, topk=32), "cpu"
    )
    x = torch.randn(tokens, 1, width)
    lookups = (
        torch.randint(num_keys**2, (tokens, 128)),
        torch.rand(tokens, 128),
        torch.randn(tokens, width),
    )

    def cost() -> None:
        metrics.layers[0].record(*lookups)
        metrics.tables[TABLE].fill(table.weight, table.shard)
        metrics.report(1)

    def step() -> None:
        layer(x).sum().backward()
        # the least that any optimizer does
        table.weight.grad = None

    def seconds(work) -> float:
        work()
        times = []
        for _ in range(5):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return min(times)

    try:
        share = seconds(cost) / seconds(step)
    finally:
        torch.set_num_threads(threads)
    assert share < 0.02, f"{share:.2%}"
