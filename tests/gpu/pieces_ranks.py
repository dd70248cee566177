"""Runs a table over two ranks with one piece and with several; the part `pieces` starts the ranks.

    bits    many steps of training, in which several pieces must read what one piece reads
    cost    milliseconds of a forward and a backward by the number of pieces

A rank is started as `python -m tests.gpu.pieces_ranks TASK`, where TASK is JSON (class Task).
"""

import json
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megamem.config import MemoryConfig
from megamem.layers.memory_pool import MemoryPool
from megamem.optimizer.table_optimizer import StepOptions, TableOptimizer
from megamem.parallel.collectives import HostCopy
from megamem.parallel.memory_group import MemoryGroup, form, partition
from megamem.resolution import resolve
from megamem.row_gradient import RowGradient
from megamem.spec import Grid, Layout, Wire
from tests.gpu.layer import Sizes
from tests.gpu.sync_sites import SyncSites

RANKS = 2
PIECES = 4
PIECE_COUNTS = (1, 2, 4)
TIMEOUT = timedelta(seconds=60)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Case:
    """How the table is sharded, and how lookups are sent."""

    grid: Grid
    wire: Wire

    @property
    def routed(self) -> bool:
        """Whether the host waits for numbers of lookups, once a forward."""
        return self.wire == "alltoall" and self.grid.row_ranks > 1

    def __str__(self) -> str:
        return f"{self.grid} {self.wire}"


# each rank is a node of its own; over columns alone both wires gather
CASES = (
    Case(Grid(2, 1, 1, 1), "alltoall"),
    Case(Grid(2, 1, 1, 1), "allgather"),
    Case(Grid(1, 2, 1, 1), "allgather"),
)
ONE_RANK = Case(Grid(), "allgather")


@dataclass(frozen=True)
class Task:
    """What a rank does."""

    job: str
    """bits or cost."""
    sizes: dict[str, int]
    """Those of tests.gpu.layer.Sizes."""
    repeats: int
    """Number of steps, or of measurements."""
    out: str
    """The rows of rank P are written to OUT-P.json."""
    cpu: bool


@dataclass(frozen=True)
class Batch:
    """The lookups of one rank, and the gradient of their read-out."""

    pairs_TL: Tensor
    weights_TL: Tensor
    grad_TV: Tensor
    counts: list[int]


def draw(sizes: Sizes, counts: list[int], rank: int, generator: torch.Generator) -> Batch:
    """Draw the batch of a rank that has counts[rank] tokens."""
    tokens, lookups, device = counts[rank], sizes.heads * sizes.topk, generator.device
    options: dict[str, Any] = {"generator": generator, "device": device}
    return Batch(
        torch.randint(sizes.num_keys**2, (tokens, lookups), **options),
        torch.rand(tokens, lookups, **options),
        torch.randn(tokens, sizes.hidden, **options).to(torch.bfloat16),
        counts,
    )


def build(sizes: Sizes, case: Case, group: MemoryGroup, device: torch.device) -> MemoryPool:
    """Return a pool with one table in bf16, which reads in one piece."""
    config = MemoryConfig(
        memory_layers=[0],
        memory_num_keys=sizes.num_keys,
        memory_heads=sizes.heads,
        memory_topk=sizes.topk,
    )
    spec = resolve(config, sizes.hidden, seed=1)
    spec = replace(spec, layout=Layout.of_grid(case.grid), wire=case.wire)
    return MemoryPool(spec, "shared", group, device=device, dtype=torch.bfloat16)


def forward(pool: MemoryPool, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the read-out, and the weights, which get a gradient."""
    weights_TL = batch.weights_TL.clone().requires_grad_()
    # this variant does not read the tokens
    no_tokens = weights_TL.new_empty(len(weights_TL), 0)
    return pool.read(batch.pairs_TL, weights_TL, batch.counts, no_tokens), weights_TL


class Side:
    """A table and its optimizer, read in a number of pieces."""

    def __init__(
        self, sizes: Sizes, case: Case, group: MemoryGroup, device: torch.device, pieces: int
    ) -> None:
        """Build the table; it is the same for all numbers of pieces."""
        self.pool = build(sizes, case, group, device)
        self.pool.spec = replace(self.pool.spec, pieces=pieces)
        spec, options = self.pool.spec, StepOptions()
        self.optimizer = TableOptimizer(self.pool, spec, options, lr=1e-3, weight_decay=0.1)

    @property
    def table(self) -> Tensor:
        """This rank's shard of the table."""
        return self.pool.values.weight.data

    def read(self, batch: Batch) -> dict[str, Tensor]:
        """Make a forward and a backward; return what several pieces must not change."""
        out_TV, weights_TL = forward(self.pool, batch)
        out_TV.backward(batch.grad_TV)
        assert weights_TL.grad is not None
        (gradient,) = self.optimizer.gradients.values()
        return {
            "read-outs": out_TV.detach(),
            "gradients of weights": weights_TL.grad,
            "touched rows": gradient.touched,
        }

    def gradient(self) -> Tensor:
        """The gradient of the table; rows that were not touched are zero."""
        (gradient,) = self.optimizer.gradients.values()
        return gradient.buffer.masked_fill(~gradient.touched.unsqueeze(1), 0)


def as_integers(x: Tensor) -> Tensor:
    """The bits of each number."""
    return x.contiguous().view(INTEGERS[x.element_size()])


def digest(x: Tensor) -> Tensor:
    """An int64 that depends on every bit and its place, computed without waiting for the device."""
    bits = as_integers(x).flatten().long()
    places = torch.arange(1, 2 * len(bits), 2, device=x.device)
    # overflow wraps, and integer sums do not depend on their order
    return (bits * places).sum()


class Seen:
    """What the steps of a case showed. It stays on the device, so that the host runs ahead."""

    def __init__(self, device: torch.device) -> None:
        self.unequal: dict[str, list[Tensor]] = {}
        """What -> for each step, whether a bit differed."""
        self.apart: list[Tensor] = []
        """For each step, the difference of the gradients of tables."""
        self.bits = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, one: Side, several: Side, batch: Batch) -> None:
        """Read a batch in one piece and in several, and compare."""
        expected, found = one.read(batch), several.read(batch)
        for what, ours in found.items():
            differs = (as_integers(ours) != as_integers(expected[what])).any()
            self.unequal.setdefault(what, []).append(differs)
        ours, theirs = several.gradient(), one.gradient()
        self.apart.append((ours - theirs).abs().max() / theirs.abs().max())
        for x in (*found.values(), ours):
            self.bits = self.bits * 1_000_003 + digest(x)

    def row(self) -> dict[str, Any]:
        """The steps at which something differed, the largest difference, and a hash of all bits."""
        unequal = {
            what: torch.stack(at).nonzero().flatten().tolist() for what, at in self.unequal.items()
        }
        apart = torch.stack(self.apart)
        return {
            "steps": len(apart),
            "unequal_steps": {what: steps for what, steps in unequal.items() if steps},
            # as a difference that is no number is no JSON either
            "table_gradient_apart": apart.nan_to_num(torch.inf, torch.inf).max().item(),
            "bits": f"{self.bits.item() % 2**64:016x}",
        }


class Trial:
    """A table that is read in several pieces and trained, beside one that is read in one piece.

    Each step reads new lookups, in one piece and in several, from equal tables: read-outs,
    gradients of weights and the touched rows must be the same bits, and gradients of tables the
    same up to the order of sums. Then the table of several pieces makes a step with its own
    gradient, and is copied to the other. So what pieces leave behind in gradients and moments
    spreads over the steps that follow, and into the hash, while the next step still compares bit by
    bit. If both tables made steps, the rounding of their gradients would part them at once.
    """

    def __init__(self, sizes: Sizes, case: Case, device: torch.device) -> None:
        """Build both tables. Every rank of the world must call this, and all methods."""
        group = _form(case)
        self.case, self.device, self.seen = case, device, Seen(device)
        self.one = Side(sizes, case, group, device, 1)
        self.several = Side(sizes, case, group, device, PIECES)
        self._before = self.several.table.clone()

    def step(self, batch: Batch) -> None:
        """Compare, and train."""
        self.seen.add(self.one, self.several, batch)
        self.several.optimizer.step()
        self.one.optimizer.zero_grad()
        self.one.table.copy_(self.several.table)

    def row(self, last: Batch) -> dict[str, Any]:
        """What the steps showed, and how often the host waits in a pass over one more batch."""
        table = self.several.table
        sides = (self.one, self.several)
        return {
            "case": str(self.case),
            "routed": self.case.routed,
            "rank": dist.get_rank(),
            **self.seen.row(),
            "moved": (table != self._before).float().mean().item(),
            "finite": table.isfinite().all().item(),
            **{f"waits_in_{s.pool.spec.pieces}": _waits(s, last, self.device) for s in sides},
        }


def bits(
    sizes: Sizes, cases: Sequence[Case], steps: int, device: torch.device
) -> list[dict[str, Any]]:
    """Make steps with several pieces beside one, which the cases take in turn.

    The number of tokens differs from step to step and from rank to rank. Every rank of the world
    must call it.

    Returns:
        a row for each case.
    """
    rank = dist.get_rank()
    trials = [Trial(sizes, case, device) for case in cases]
    generator, numbers = torch.Generator(device).manual_seed(rank), random.Random(1)
    for step in range(steps):
        # the same numbers on every rank
        counts = [numbers.randint(sizes.tokens // 2, sizes.tokens) for _ in range(RANKS)]
        trials[step % len(trials)].step(draw(sizes, counts, rank, generator))
    last = draw(sizes, [sizes.tokens] * RANKS, rank, generator)
    return [trial.row(last) for trial in trials]


def _waits(side: Side, batch: Batch, device: torch.device) -> dict[str, Any]:
    """How often the host waits for the device in a forward and a backward, and where."""
    side.optimizer.zero_grad()
    numbers, copies = HostCopy.numbers, 0

    def counted(copy: HostCopy) -> list[Any]:
        nonlocal copies
        copies += 1
        return numbers(copy)

    # torch does not warn of the wait for the event of a copy
    with mock.patch.object(HostCopy, "numbers", counted), SyncSites(device) as sites:
        side.read(batch)
    return {"copies": copies, "syncs": sites.count, "sites": dict(sites.sites)}


def cost(
    sizes: Sizes, case: Case, group: MemoryGroup, rank: int, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """Milliseconds of a forward and a backward, for each number of pieces.

    The numbers of pieces take turns, so that whatever slows the device down slows all of them.
    Every pass is the first of a batch, which overwrites the gradients of rows in its first piece
    and adds to them in the others.
    """
    pool, size = build(sizes, case, group, device), case.grid.size
    gradient = RowGradient(pool.values.weight)
    pool.values.accumulate_into(gradient)
    generator = torch.Generator(device).manual_seed(rank)
    batch = draw(sizes, [sizes.tokens] * size, rank, generator)
    times: dict[int, list[list[float]]] = {pieces: [] for pieces in PIECE_COUNTS}
    # the first round compiles kernels and allocates
    for measures in range(repeats + 1):
        for pieces in PIECE_COUNTS:
            pool.spec = replace(pool.spec, pieces=pieces)
            gradient.zero()
            kept: list[Tensor] = []

            def there(kept: list[Tensor] = kept) -> None:
                kept.append(forward(pool, batch)[0])

            def back(kept: list[Tensor] = kept) -> None:
                kept.pop().backward(batch.grad_TV)

            found = milliseconds(device, (there, back))
            if measures:
                times[pieces].append(found)
    rows = []
    for pieces, found in times.items():
        there_ms, back_ms = (statistics.median(part) for part in zip(*found, strict=True))
        ms = statistics.median(map(sum, found))
        rows.append(
            {
                "case": "one rank" if size == 1 else str(case),
                "rank": rank,
                "pieces": pieces,
                "forward_ms": there_ms,
                "backward_ms": back_ms,
                "ms": ms,
                "ratio": ms / (rows[0]["ms"] if rows else ms),
            }
        )
    return rows


def milliseconds(device: torch.device, phases: Sequence[Callable[[], None]]) -> list[float]:
    """Milliseconds of each phase; on a GPU from events, with nothing queued before the first."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for phase in phases:
            phase()
            marks.append(time.perf_counter())
        return [(end - start) * 1e3 for start, end in zip(marks, marks[1:], strict=False)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
    events[0].record()
    for phase, event in zip(phases, events[1:], strict=True):
        phase()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def _form(case: Case) -> MemoryGroup:
    return form(partition([[*range(RANKS)]], case.grid))


def _rows(task: Task, device: torch.device) -> list[dict[str, Any]]:
    sizes = Sizes(**task.sizes)
    if task.job == "bits":
        return bits(sizes, CASES, task.repeats, device)
    rank = dist.get_rank()
    rows = []
    for case in CASES:
        rows += cost(sizes, case, _form(case), rank, task.repeats, device)
    return rows


def main(task: Task) -> None:
    """Run the task on this rank, and write its rows."""
    device = torch.device("cpu" if task.cpu else "cuda:0")
    if not task.cpu:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if task.cpu else "nccl", timeout=TIMEOUT)
    try:
        rows = _rows(task, device)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        # an ordinary exit would wait for the other rank in NCCL's destructors
        os._exit(1)
    Path(f"{task.out}-{dist.get_rank()}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def as_words(task: Task) -> tuple[str, ...]:
    """The arguments of a rank that runs the task."""
    return (json.dumps(asdict(task)),)


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
