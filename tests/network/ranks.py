"""What every rank runs: plain collectives for the rates of the links, then the layouts.

    python -m tests.network.ranks RANK FOLDER REPETITIONS SIZES

Rank 0 writes FOLDER/measured.json. Every measurement is the median of its repetitions, between
which the cases take turns; bytes are those of the last repetition, as the kernel counts them.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megamem.config import MemoryConfig
from megamem.layers.memory_pool import MemoryPool
from megamem.parallel.memory_group import form, partition
from megamem.resolution import resolve
from tests.network.cases import CASES, HOSTS, RANKS_PER_HOST, WORLD, Case, Sizes
from tests.network.hosts import DEVICE, LOOPBACK, host_of, sent_bytes
from tests.network.prediction import Collective, Link, rate_key

RATE_BYTES, FEW_BYTES = 4_000_000, 64
"""Bytes that a rank sends in a collective that measures a rate, and in one for the latency."""


class _Sleep(torch.autograd.Function):
    """Takes the place of reading rows: bags of ones, and gradients of ones, after a sleep."""

    @staticmethod
    def forward(ctx: Any, weights_M: Tensor, bags_Gv: Tensor, seconds: float) -> Tensor:
        ctx.lookups, ctx.seconds = len(weights_M), seconds
        time.sleep(seconds)
        return bags_Gv

    @staticmethod
    def backward(ctx: Any, grad_Gv: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return torch.ones(ctx.lookups), None, None


class SleepingVariant:
    """A variant whose ranks sleep while they would read rows."""

    reads_tokens = False

    def __init__(self, pool: MemoryPool, seconds: float) -> None:
        self._width, self._dtype = pool.values.shard.shape[1], pool.values.weight.dtype
        self._seconds = seconds

    def read_out(self, tables: Any, received: Any) -> Tensor:
        """bags_Gv of ones."""
        bags = torch.ones(len(received.offsets) - 1, self._width, dtype=self._dtype)
        return _Sleep.apply(received.weights_M, bags, self._seconds)


def pool_of(case: Case, sizes: Sizes) -> MemoryPool:
    """The pool of a case; every rank makes the pools in the same order."""
    config = MemoryConfig(
        memory_layers=[0],
        memory_num_keys=sizes.num_keys,
        memory_value_dim=sizes.width,
        memory_heads=1,
        memory_topk=sizes.lookups,
        memory_wire=case.wire,
        memory_grid=case.grid_text,
        memory_pieces=case.pieces,
    )
    spec = resolve(config, 64, stage_ranks=WORLD, ranks_per_node=RANKS_PER_HOST)
    group = form(partition([list(range(WORLD))], spec.layout.grid))
    pool = MemoryPool(
        spec, case.name, group, dtype={2: torch.bfloat16, 4: torch.float32}[sizes.element]
    )
    pool.variant = SleepingVariant(pool, sizes.bag_seconds / case.pieces)
    return pool


def _counted() -> tuple[int, int]:
    """Bytes that this host has sent to others, and that have stayed inside."""
    sent = sent_bytes(Path("/proc/net/dev").read_text())
    return sent[DEVICE], sent[LOOPBACK]


def measured(run: Callable[[], Any]) -> dict[str, Any]:
    """Seconds until the last rank has ended, and the bytes of every host."""
    dist.barrier()
    before = _counted()
    # no rank sends before the counters of its host are read
    dist.barrier()
    started = time.perf_counter()
    run()
    took = torch.tensor(time.perf_counter() - started)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    after = _counted()
    sent = torch.zeros(HOSTS, 2)
    if dist.get_rank() % RANKS_PER_HOST == 0:
        sent[host_of(dist.get_rank())] = torch.tensor(after) - torch.tensor(before)
    dist.all_reduce(sent)
    across, inside = sent.mean(0).tolist()
    return {"seconds": took.item(), "across": across, "inside": inside}


def _rates(repetitions: int) -> dict[str, dict[str, float]]:
    """Bytes per second of a host, and seconds of a small collective, of each kind and link."""
    found: dict[str, dict[str, float]] = {"bytes_per_second": {}, "latency": {}}
    for link, lists in _groups():
        groups = [(ranks, dist.new_group(ranks)) for ranks in lists]
        group = next(group for ranks, group in groups if dist.get_rank() in ranks)
        size = dist.get_world_size(group)
        for kind in ("all-to-all", "all-gather"):
            times = {}
            for sent in (FEW_BYTES, RATE_BYTES):
                # a small collective takes so little time that any other work on its core shows
                count = repetitions if sent == RATE_BYTES else 5 * repetitions
                run = _plain(kind, sent, group)
                results = [measured(run)["seconds"] for _ in range(count + 1)]
                times[sent] = statistics.median(results[1:])
            key = rate_key(link, kind, size)
            found["latency"][key] = times[FEW_BYTES]
            took = times[RATE_BYTES] - times[FEW_BYTES]
            found["bytes_per_second"][key] = RANKS_PER_HOST * RATE_BYTES / took
    return found


def _groups() -> Iterator[tuple[Link, list[list[int]]]]:
    """For each link and number of ranks, groups that take up the links of all hosts alike."""
    for hosts in (2, HOSTS):
        lists = [
            [host * RANKS_PER_HOST + local for host in range(first, first + hosts)]
            for first in range(0, HOSTS, hosts)
            for local in range(RANKS_PER_HOST)
        ]
        yield "across", lists
    yield "inside", [[*range(at, at + RANKS_PER_HOST)] for at in range(0, WORLD, RANKS_PER_HOST)]


def _plain(kind: Collective, sent: int, group: Any) -> Callable[[], Any]:
    """A collective in which a rank sends these bytes to others."""
    size = dist.get_world_size(group)
    part = torch.zeros(sent // (size - 1), dtype=torch.uint8)
    whole = torch.zeros(len(part) * size, dtype=torch.uint8)
    out = torch.empty_like(whole)
    if kind == "all-to-all":
        return lambda: dist.all_to_all_single(out, whole, group=group)
    return lambda: dist.all_gather_into_tensor(out, part, group=group)


class Exchange:
    """A forward and a backward of one case."""

    def __init__(self, case: Case, sizes: Sizes) -> None:
        self._pool, self._counts = pool_of(case, sizes), [sizes.tokens] * WORLD
        generator = torch.Generator().manual_seed(dist.get_rank())
        shape = (sizes.tokens, sizes.lookups)
        self._pairs = torch.randint(sizes.num_keys**2, shape, generator=generator)
        self._weights = torch.rand(shape, generator=generator, requires_grad=True)
        self._tokens = torch.empty(sizes.tokens, 0)
        self._grad = torch.ones(sizes.tokens, sizes.width, dtype=self._pool.values.weight.dtype)
        self._out = self._grad

    def forward(self) -> None:
        """Read all tokens."""
        self._out = self._pool.read(self._pairs, self._weights, self._counts, self._tokens)

    def backward(self) -> None:
        """Send their gradients."""
        self._out.backward(self._grad)


def main(rank: int, folder: Path, repetitions: int, sizes: Sizes) -> None:
    """Measure, and write the results."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    rates = _rates(repetitions)
    exchanges = [(case, Exchange(case, sizes)) for case in CASES]
    results: list[list[dict[str, Any]]] = [[] for _ in CASES]
    # the first of each makes connections
    for repetition in range(repetitions + 1):
        for (_, exchange), found in zip(exchanges, results, strict=True):
            forward = measured(exchange.forward)
            backward = measured(exchange.backward)
            if repetition:
                found.append({"forward": forward, "backward": backward})
    if rank == 0:
        rows = [
            {"case": asdict(case)} | {way: _median(found, way) for way in ("forward", "backward")}
            for case, found in zip(CASES, results, strict=True)
        ]
        content = {"sizes": asdict(sizes), "rates": rates, "rows": rows}
        (folder / "measured.json").write_text(json.dumps(content, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def _median(found: list[dict[str, Any]], way: str) -> dict[str, Any]:
    seconds = [each[way]["seconds"] for each in found]
    return found[-1][way] | {"seconds": statistics.median(seconds), "all_seconds": seconds}


if __name__ == "__main__":
    number, out, times, given = sys.argv[1:]
    main(int(number), Path(out), int(times), replace(Sizes(), **json.loads(given)))
