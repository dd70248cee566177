"""The part that compares passes in pieces: its ranks over gloo, and what it calls wrong."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamem.layers.memory_pool import Lookups, MemoryPool
from megamem.layers.value_table import ValueTable
from megamem.ops.row_buffer import RowBuffer
from megamem.parallel import routing
from megamem.parallel.collectives import HostCopy
from tests.gpu import pieces as part
from tests.gpu.layer import Sizes
from tests.gpu.pieces_ranks import CASES, PIECES, bits
from tests.helpers.distributed import run_distributed

SIZES = Sizes(tokens=10, hidden=32, num_keys=8, heads=2, topk=4)
STEPS = 2 * len(CASES)


def _failures(fault: AbstractContextManager) -> list[str]:
    with fault:
        rows = bits(SIZES, CASES, STEPS, torch.device("cpu"))
    return [part.failure_of(row, waits_count=False) for row in rows]


def _lose_a_token() -> AbstractContextManager:
    """Pieces leave a token of rank 0 out of what they read."""
    collect = MemoryPool.collect

    def lossy(pool: MemoryPool, lookups: Lookups) -> Tensor:
        out_TV = collect(pool, lookups)
        if pool.spec.pieces == 1 or dist.get_rank():
            return out_TV
        keep = torch.ones(len(out_TV), 1, dtype=out_TV.dtype)
        keep[-1] = 0
        return out_TV * keep

    return mock.patch.object(MemoryPool, "collect", lossy)


def _lose_a_row_gradient() -> AbstractContextManager:
    """The last piece adds its gradients to a copy of the buffer, and marks the rows all the same.

    Read-outs and gradients of weights stay right.
    """
    calls, buffer = 0, ValueTable._buffer

    def lossy(table: ValueTable) -> RowBuffer | None:
        nonlocal calls
        found, calls = buffer(table), calls + 1
        # one call of the table of one piece, then those of the other
        if calls % (1 + PIECES) or found is None:
            return found
        return RowBuffer(torch.zeros_like(found.buffer_rV), found.flags, found.overwrites)

    return mock.patch.object(ValueTable, "_buffer", lossy)


def _lose_a_weight_gradient() -> AbstractContextManager:
    """The gradient of the first lookup is lost where lookups are sorted by pieces."""
    calls, backward = 0, routing._Permute.backward

    def lossy(ctx: Any, grad_J: Tensor) -> tuple[Tensor, None]:
        nonlocal calls
        found, calls = backward(ctx, grad_J)[0], calls + 1
        # one call of one piece, then one of several
        return (found if calls % 2 else found.index_fill(0, torch.tensor([0]), 0)), None

    return mock.patch.object(routing._Permute, "backward", staticmethod(lossy))


def _wait_for_each_piece() -> AbstractContextManager:
    """The host waits for a copy of its own in each of several pieces."""
    plan = routing.RoutingPlan.offsets

    def waits(self: routing.RoutingPlan) -> Tensor:
        found = plan(self)
        HostCopy(found).numbers()
        return found

    return mock.patch.object(routing.RoutingPlan, "offsets", waits)


# what is said of each case
FAULTS: tuple[tuple[Callable[[], AbstractContextManager], list[str]], ...] = (
    (_lose_a_token, ["other read-outs in 2 steps, first in step 1"] * 3),
    (_lose_a_row_gradient, ["gradients of tables differ by"] * 3),
    # only alltoall sorts lookups
    (_lose_a_weight_gradient, ["other gradients of weights in 2 steps", "", ""]),
    (_wait_for_each_piece, ["waits for [2, 5] copies", *["waits for [1, 4] copies"] * 2]),
)


def _judge() -> None:
    assert _failures(nullcontext()) == [""] * len(CASES)
    for fault, said in FAULTS:
        for found, expected in zip(_failures(fault()), said, strict=True):
            # one fault is in rank 0 alone
            if dist.get_rank() == 0:
                assert expected in found and bool(found) == bool(expected), (fault, found)


@pytest.mark.gloo
def test_pieces_pass_over_gloo_and_fail_where_they_are_wrong() -> None:
    run_distributed(_judge, 2)


def _row(**changed: Any) -> dict[str, Any]:
    row = {"case": "2x1x1x1 alltoall", "routed": True, "rank": 0, "steps": 67, "unequal_steps": {}}
    row |= {"table_gradient_apart": 1e-7, "bits": "0123", "moved": 0.9, "finite": True}
    waits = {"copies": 1, "syncs": 2, "sites": {}}
    return row | {"waits_in_1": waits, f"waits_in_{PIECES}": waits} | changed


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        pytest.param({}, "", id="right"),
        pytest.param({"table_gradient_apart": float("inf")}, "differ by inf", id="no number"),
        pytest.param({"finite": False}, "is not trained", id="not finite"),
        pytest.param({"moved": 0.0}, "is not trained, 0% of", id="never moved"),
        pytest.param(
            {"waits_in_4": {"copies": 1, "syncs": 5, "sites": {}}},
            "4 pieces synchronise 5 times, 1 2",
            id="syncs",
        ),
        pytest.param({"routed": False}, "waits for [1, 1] copies", id="copies"),
    ],
)
def test_verdicts_on_steps(changed: dict[str, Any], said: str) -> None:
    failure = part.failure_of(_row(**changed), waits_count=True)
    assert said in failure if said else not failure


def test_bits_must_not_depend_on_launches() -> None:
    rows = [_row(), _row(rank=1)]
    assert part.changed(rows, rows) == []
    assert part.changed(rows, [_row(), _row(rank=1, bits="4567")]) == [
        "2x1x1x1 alltoall, rank 1: bits depend on CUDA_LAUNCH_BLOCKING"
    ]


def test_the_summary_of_costs_is_that_of_rank_0() -> None:
    times = [(0, "one rank", 1, 4.0), (0, "one rank", 4, 4.4), (1, "grid", 1, 8.0)]
    rows = [
        {"rank": rank, "case": case, "pieces": pieces, "ms": ms, "ratio": ms / 4.0}
        for rank, case, pieces, ms in times
    ]
    assert part.cost_summary(rows) == "one rank 4 ms, 4 pieces 1.10x"
