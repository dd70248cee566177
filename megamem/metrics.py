"""What memory layers and their tables did since the last report, as numbers and usage maps.

    record     in a forward pass that will be learnt from: adds to this rank's numbers on the
               device, and waits for nothing
    report     now and then: one all-reduce of the one tensor that holds the numbers of all layers
               and tables, and a new window

Every rank looks up tokens of its own, so sums over all ranks are those of the batch. Every rank
takes part in a report, with or without memory layers: a layer has the same place in the tensor
everywhere, and whoever does not hold it adds zeros.

Shape key: J lookups; P x P cells of the usage map; I rows whose norm is taken.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megamem.parallel.collectives import group_rank
from megamem.parallel.routing import RoutingPlan
from megamem.parallel.row_shard import TableShard

MAP_SIDE = 256
"""The usage map of N x N product keys is pooled to at most this many cells a side."""

SAMPLED_ROWS = MAP_SIDE**2
"""Rows that are watched one by one, in a table of more."""

NORM_ROWS = 2**12
"""Rows whose norm is taken, in a table of more."""

TIMED_PASSES = 64
"""Passes of a table that are timed in one window."""

NUM_SUMS = 5
TRAINED = ("trained_rows", "their_lookups", "all_lookups")
PER_TABLE = ("holders", "bytes", "passes", "lookup", "exchange", "gradient", "rows", "row_squares")
PLACES = (*PER_TABLE, *TRAINED)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What there is to measure, the same on every rank."""

    layers: Sequence[int]
    """Memory layers of the whole model."""
    tables: Sequence[str]
    """Value tables of the whole model, by name."""
    num_keys: int
    """N."""
    heads: int
    topk: int

    @property
    def num_rows(self) -> int:
        """R."""
        return self.num_keys**2

    @property
    def side(self) -> int:
        """P, cells along a side of the usage map."""
        return min(self.num_keys, MAP_SIDE)

    @property
    def is_sampled(self) -> bool:
        """Whether a cell of the map is more than a row, so that rows are watched by sample."""
        return self.side < self.num_keys


@dataclass(frozen=True)
class Report:
    """One window, summed over all ranks."""

    scalars: dict[str, float]
    """memory/<metric>/<layer or table> -> value."""
    usage: dict[int, Tensor]
    """Layer -> [P, P] reads of every cell, on the device."""


class LayerMetrics:
    """Counts of one layer.

    usage      reads of each cell of the map: sub-key i lies in line i * P // N
    sampled    which of the sampled rows were read, and a spare place at the end
    sums       how many heads read, how many gates; sums of largest weights, entropies, gates
    """

    def __init__(self, watched: Watched, places: Tensor) -> None:
        self.watched = watched
        self.usage, self.sampled, self.sums = places.split(_layer_sizes(watched))
        self.one = torch.ones((), dtype=places.dtype, device=places.device)
        self.multiplier = _spreading_multiplier(watched.num_rows)

    @torch.no_grad()
    def record(self, row_ids_TL: Tensor, weights_TL: Tensor, gate_TV: Tensor | None) -> None:
        """Add one pass: pairs of sub-keys, i * N + j, a softmax over each head's K, the gate."""
        watched = self.watched
        rows_J, cells_J = row_ids_TL.flatten(), row_ids_TL.flatten()
        if watched.is_sampled:
            side, num_keys = watched.side, watched.num_keys
            cells_J = rows_J // num_keys * side // num_keys * side
            cells_J += rows_J % num_keys * side // num_keys
            drawn_J = (rows_J * self.multiplier).remainder_(watched.num_rows)
            self.sampled[drawn_J.clamp_(max=SAMPLED_ROWS)] = 1.0
        self.usage.scatter_add_(0, cells_J, self.one.expand_as(cells_J))

        weights_THK = weights_TL.view(len(weights_TL), watched.heads, watched.topk)
        sums = [
            weights_THK.amax(-1).sum(),
            torch.special.entr(weights_TL).sum(),
            self.one.new_zeros(()) if gate_TV is None else gate_TV.sum(dtype=torch.float32),
        ]
        self.sums[0] += len(weights_TL) * watched.heads
        self.sums[1] += 0 if gate_TV is None else gate_TV.numel()
        self.sums[2:] += torch.stack([s.to(self.one.dtype) for s in sums])


@dataclass
class TableMetrics:
    """Counts of one table on one rank."""

    places: Tensor
    """[len(PLACES)] in the tensor that is summed."""
    received: Tensor
    """[]; lookups that arrived here."""
    bytes_sent: int = 0
    laps: list[list[tuple[str, Any]]] = field(default_factory=list)

    def mark(self, rows_M: Tensor) -> None:
        """Lookups arrived here; -1 is none."""
        self.received += (rows_M >= 0).sum()

    def start(self) -> Callable[[str], None]:
        """Begin to time a pass; call what is returned with the name of each part that ended."""
        device = self.places.device
        if len(self.laps) == TIMED_PASSES or _is_capturing(device):
            return untimed
        lap = [("", _now(device))]
        self.laps.append(lap)
        return lambda name: lap.append((name, _now(device)))

    def fill(
        self,
        weight_rv: Tensor,
        shard: TableShard,
        gradient_squares: Tensor | float = 0.0,
        trained_3: Tensor | None = None,
    ) -> None:
        """Put what the host knows, and the table's norms, in place for a report.

        Args:
            weight_rv: this rank's piece.
            shard: where it lies.
            gradient_squares: sum over this piece, 0 where another rank answers for it.
            trained_3: TRAINED, where only some rows are; 0 where another rank answers for them.
        """
        num_rows, width = shard.global_shape
        stride = -(-num_rows // NORM_ROWS)
        rows_Iv = weight_rv[-shard.offset[0] % stride :: stride]
        times = self._times()
        numbers = {
            "holders": 1.0,
            "bytes": float(self.bytes_sent),
            "passes": float(len(times)),
            "lookup": sum(t.get("lookup", 0.0) for t in times),
            "exchange": sum(t.get("exchange", 0.0) for t in times),
            "gradient": 0.0,
            # some of a row's columns are as much of a row; each replica counts in both sums
            "rows": len(rows_Iv) * rows_Iv.shape[1] / width,
            "row_squares": 0.0,
            **dict.fromkeys(TRAINED, 0.0),
        }
        self.places.copy_(torch.tensor(list(numbers.values()), dtype=self.places.dtype))
        self.places[PLACES.index("gradient")] += gradient_squares
        wide = torch.promote_types(weight_rv.dtype, torch.float32)
        norms_I = torch.linalg.vector_norm(rows_Iv.detach(), dim=1, dtype=wide)
        self.places[PLACES.index("row_squares")] += norms_I.double().square().sum()
        if trained_3 is not None:
            self.places[-len(TRAINED) :] += trained_3
        self.bytes_sent = 0
        self.laps.clear()

    def _times(self) -> list[dict[str, float]]:
        """Milliseconds of every part, of the passes that the device has done."""
        found = []
        for lap in self.laps:
            if all(_is_past(mark) for _, mark in lap):
                times: dict[str, float] = {}
                for (_, begin), (name, end) in zip(lap, lap[1:], strict=False):
                    times[name] = times.get(name, 0.0) + _milliseconds(begin, end)
                found.append(times)
        return found


class Metrics:
    """The numbers of all layers and tables of a model, in one fp64 tensor: counts are exact."""

    def __init__(
        self, watched: Watched, device: torch.device | str | int, group: ProcessGroup | None = None
    ) -> None:
        """Allocate, about 1 MiB a layer; `group` is all ranks that train, by default the world."""
        self.watched, self.group = watched, group
        ranks, rank = 1, 0
        if dist.is_initialized():
            ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        of_layer, of_table = sum(_layer_sizes(watched)), len(PLACES) + ranks
        num_layers, num_tables = len(watched.layers), len(watched.tables)
        sizes = [of_layer] * num_layers + [of_table] * num_tables
        self.places = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        parts = self.places.split(sizes)
        self.layers = {
            layer: LayerMetrics(watched, part)
            for layer, part in zip(watched.layers, parts[:num_layers], strict=True)
        }
        self.tables = {
            name: TableMetrics(part[: len(PLACES)], part[len(PLACES) + rank])
            for name, part in zip(watched.tables, parts[num_layers:], strict=True)
        }
        self.sizes = sizes

    @torch.no_grad()
    def report(
        self, iterations: int, gradient_scale: float = 1.0, *, wanted: bool = True
    ) -> Report | None:
        """Sum the window over all ranks, and begin a new one. Every rank must call this.

        Args:
            iterations: in the window.
            gradient_scale: what the gradients that fill() was told of are multiplied by.
            wanted: False on ranks that show nothing; they do not wait for the device.
        """
        total = self.places.clone()
        self.places.zero_()
        if dist.is_initialized():
            dist.all_reduce(total, group=self.group)
        if not wanted:
            return None
        parts = total.split(self.sizes)
        num_layers = len(self.watched.layers)
        scalars: dict[str, float] = {}
        usage: dict[int, Tensor] = {}
        for layer, part in zip(self.watched.layers, parts[:num_layers], strict=True):
            counted, sampled, sums = part.split(_layer_sizes(self.watched))
            numbers = _layer_numbers(self.watched, counted, sampled, sums)
            scalars |= {f"memory/{name}/layer_{layer}": number for name, number in numbers.items()}
            usage[layer] = counted.view(self.watched.side, -1)
        for name, part in zip(self.watched.tables, parts[num_layers:], strict=True):
            numbers = _table_numbers(part.tolist(), iterations, gradient_scale)
            scalars |= {f"memory/{what}/{name}": number for what, number in numbers.items()}
        return Report(scalars, usage)


def untimed(name: str) -> None:
    """Stands for what TableMetrics.start() returns where nobody wants to know."""


def kl_from_uniform(usage_PP: Tensor, num_keys: int) -> Tensor:
    """Nats between the reads of the cells and those of a uniform pick of rows.

    KL = sum_c p_c log(p_c / q_c), p_c the share of reads that fell on cell c and q_c the share of
    rows that lie in it (Lample et al. 2019, section 4.1, with reads in place of weights). Cells
    are rows where N <= 256; otherwise this is a lower bound of the KL of rows. n reads by uniform
    chance give about P**2 / 2n rather than 0.
    """
    side = len(usage_PP)
    lines = torch.arange(num_keys, device=usage_PP.device) * side // num_keys
    keys_P = torch.bincount(lines, minlength=side).double()
    uniform_PP = torch.outer(keys_P, keys_P) / num_keys**2
    shares_PP = usage_PP / usage_PP.sum()
    return torch.special.xlogy(shares_PP, shares_PP / uniform_PP).sum()


def sent_bytes(
    plan: RoutingPlan,
    weights_M: Tensor,
    bags_Gv: Tensor,
    *,
    lookups: int,
    column_counts: Sequence[int],
    width: int,
    column_rank: int,
) -> int:
    """Bytes that this rank sends to others in one pass of a table, forward and backward.

    An all-gather and a reduce-scatter count as what each rank must send at least: its part to
    every other rank.

    Args:
        plan, weights_M, bags_Gv: of the pass; weights as dispatched, bags before they go home.
        lookups: L.
        column_counts: T of every column rank.
        width: V.
        column_rank: of this rank.
    """
    rank, own = group_rank(plan.group), plan.bag_counts[group_rank(plan.group)]
    peers, neighbours = len(plan.bag_counts) - 1, len(column_counts) - 1
    number, weight = bags_Gv.element_size(), weights_M.element_size()
    slice_bytes, lookup = bags_Gv.shape[1] * number, plan.sent_M.element_size() + weight

    # lookups to the owners of their rows; the gradients of weights come back
    if plan.send is None or plan.recv is None:
        away = home = peers * plan.bag_counts[0] * lookups
        counts = 0
    else:
        away, home = sum(plan.send) - plan.send[rank], sum(plan.recv) - plan.recv[rank]
        counts = peers * own * torch.int64.itemsize
    total = counts + away * lookup + home * weight
    # partial bags home, and their gradients to everybody who summed a part
    total += gather_and_scatter_bytes(plan, slice_bytes)

    # lookups to the neighbours that hold other columns, and columns home
    total += neighbours * max(column_counts) * lookups * (lookup + weight)
    tokens = column_counts[column_rank]
    total += (sum(column_counts) - tokens) * slice_bytes
    return total + tokens * (width - bags_Gv.shape[1]) * number


def gather_and_scatter_bytes(plan: RoutingPlan, row_bytes: int) -> int:
    """Bytes that this rank sends where a row for every bag is gathered, and its like scattered."""
    own, peers = plan.bag_counts[group_rank(plan.group)], len(plan.bag_counts) - 1
    return (sum(plan.bag_counts) - own + peers * max(plan.bag_counts)) * row_bytes


def _layer_sizes(watched: Watched) -> list[int]:
    return [watched.side**2, (SAMPLED_ROWS + 1) * watched.is_sampled, NUM_SUMS]


def _spreading_multiplier(num_rows: int) -> int:
    """A factor that takes every row to a place of its own, modulo R, and neighbours far apart."""
    factor = max(1, min(int(num_rows * (math.sqrt(5) - 1) / 2), 2**62 // num_rows))
    while math.gcd(factor, num_rows) != 1:
        factor -= 1
    return factor


def _layer_numbers(
    watched: Watched, counted: Tensor, sampled: Tensor, sums: Tensor
) -> dict[str, float]:
    """What a layer shows; nothing where it read nothing."""
    reads, gates, top, entropy, gate = sums.tolist()
    if not reads:
        return {}
    used = sampled[:-1] if watched.is_sampled else counted
    divergence = kl_from_uniform(counted.view(watched.side, -1), watched.num_keys)
    numbers = {
        "rows_used": 100 * float((used > 0).double().mean()),
        "kl_from_uniform": float(divergence),
        "top1_weight": top / reads,
        "score_entropy": entropy / reads,
    }
    return numbers | ({"gate_mean": gate / gates} if gates else {})


def _table_numbers(
    numbers: list[float], iterations: int, gradient_scale: float
) -> dict[str, float]:
    """What a table shows; nothing where nobody holds it."""
    of: Mapping[str, float] = dict(zip(PLACES, numbers, strict=False))
    received = numbers[len(PLACES) :]
    if not of["holders"]:
        return {}
    shown = {
        "grad_norm": math.sqrt(of["gradient"]) * gradient_scale,
        "row_norm": math.sqrt(of["row_squares"] / of["rows"]),
        "sent_megabytes": of["bytes"] / of["holders"] / iterations / 1e6,
    }
    if sum(received):
        shown["shard_load"] = max(received) * of["holders"] / sum(received)
    if of["all_lookups"]:
        shown["trained_rows"] = of["trained_rows"] / iterations
        shown["trained_lookups"] = 100 * of["their_lookups"] / of["all_lookups"]
    if of["passes"]:
        shown["lookup_ms"] = of["lookup"] / of["passes"]
        shown["exchange_ms"] = of["exchange"] / of["passes"]
    return shown


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _now(device: torch.device) -> Any:
    """A moment: of the device's stream, or of the host."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _is_past(moment: Any) -> bool:
    return isinstance(moment, float) or moment.query()


def _milliseconds(begin: Any, end: Any) -> float:
    return (end - begin) * 1e3 if isinstance(begin, float) else begin.elapsed_time(end)
