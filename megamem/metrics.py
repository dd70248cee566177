"""Metrics of memory layers and tables over a window of iterations: scalars and usage maps.

    record     in a forward pass with a backward: adds to this rank's sums on the device, without
               waiting for it
    report     at the end of a window: all-reduces the sums of all layers and tables, which are one
               tensor, and resets them

Each rank looks up different tokens, so the sums over all ranks are those of the batch. Every rank
takes part in a report, with or without memory layers: the sums of a layer are at the same offset on
all ranks, and the ranks that do not hold the layer add zeros.
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

from megamem.parallel.row_shard import TableShard

MAP_SIDE = 256
"""The usage map of N x N product keys is pooled to at most this many cells per side."""

SAMPLED_ROWS = MAP_SIDE**2
"""Number of rows that are sampled, where the cells of the usage map are larger than a row."""

NORM_ROWS = 2**12
"""Number of rows at most whose norm is computed."""

TIMED_PASSES = 64
"""Number of passes over a table that are timed in one window."""

LOSSES = ("core_loss", "balance_loss")
"""Losses that a layer may add to that of the model."""

OF_LOOKUPS = 6
NUM_SUMS = OF_LOOKUPS + 2 * len(LOSSES)
TRAINED = ("trained_rows", "trained_lookups", "all_lookups")
PER_TABLE = ("holders", "bytes", "passes", "lookup", "exchange", "gradient", "rows", "row_squares")
TABLE_SUMS = (*PER_TABLE, *TRAINED)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The layers and tables that are measured, the same on every rank."""

    layers: Sequence[int]
    """Numbers of all memory layers of the model, on all pipeline stages."""
    tables: Sequence[str]
    """Names of all value tables of the model."""
    num_keys: int
    """N, sub-keys of a layer per half. With virtual blocks of rows they are more than a side of the
    table, and a row is read by several of their pairs."""
    heads: int
    """H, heads of a layer."""
    topk: int
    """K, rows that a head reads."""
    softmax: bool = True
    """Whether the weights of a head are a softmax; otherwise they are scores of any sign."""

    @property
    def num_pairs(self) -> int:
        """Pairs of sub-keys; without virtual blocks, the rows of a table."""
        return self.num_keys**2

    @property
    def side(self) -> int:
        """P, cells along each side of the usage map."""
        return min(self.num_keys, MAP_SIDE)

    @property
    def is_sampled(self) -> bool:
        """Whether a cell of the map covers more than one row, so that used rows are sampled."""
        return self.side < self.num_keys


@dataclass(frozen=True)
class Report:
    """The metrics of one window, of all ranks together."""

    scalars: dict[str, float]
    """memory/<metric>/<layer or table> -> value."""
    usage: dict[int, Tensor]
    """Layer -> [P, P], the lookups of every cell of the map, on the device."""


class LayerMetrics:
    """The sums of one layer on one rank.

    usage      lookups of each cell of the map; sub-key i belongs to line i * P // N
    sampled    1 for each sampled pair that was read; the last entry is for all other pairs
    sums       number of reads (one head of one token) and of gate values; sums of the largest
               weights, of the entropies of the weights, of the gate values, and of the means of
               weights that are no softmax; for each loss its number and its sum

    The largest weight and the entropy are those of a distribution. Where weights are no softmax, it
    is the share of each lookup in the absolute weights of its head, summed over cores.
    """

    def __init__(self, watched: Watched, sums: Tensor) -> None:
        """Keep the sums in a part of the tensor that is all-reduced."""
        self.watched = watched
        self.usage, self.sampled, self.sums = sums.split(_layer_sizes(watched))
        self.one = torch.ones((), dtype=sums.dtype, device=sums.device)
        self.multiplier = _spreading_multiplier(watched.num_pairs)

    @torch.no_grad()
    def record(self, row_ids: Tensor, weights: Tensor, gate: Tensor | None) -> None:
        """Add one forward pass.

        Args:
            row_ids: [tokens, H * K] pairs of sub-keys, i * N + j.
            weights: their weights, [tokens, H * K], or [tokens, H * K, O] where each of O cores has
                one.
            gate: [tokens, V] values of the gate; None for a variant without one.
        """
        watched = self.watched
        rows, cells = row_ids.flatten(), row_ids.flatten()
        if watched.is_sampled:
            side, num_keys = watched.side, watched.num_keys
            cells = rows // num_keys * side // num_keys * side
            cells += rows % num_keys * side // num_keys
            sampled = (rows * self.multiplier).remainder_(watched.num_pairs)
            self.sampled[sampled.clamp_(max=SAMPLED_ROWS)] = 1.0
        self.usage.scatter_add_(0, cells, self.one.expand_as(cells))

        none = self.one.new_zeros(())
        mean = none
        if not watched.softmax:
            cores = weights.shape[2] if weights.dim() > 2 else 1
            mean = weights.sum(dtype=torch.float32) / (watched.topk * cores)
            weights = _absolute_shares(weights, watched.topk)
        by_head = weights.view(len(weights), watched.heads, watched.topk)
        sums = [
            by_head.amax(-1).sum(),
            torch.special.entr(weights).sum(),
            none if gate is None else gate.sum(dtype=torch.float32),
            mean,
        ]
        self.sums[0] += len(weights) * watched.heads
        self.sums[1] += 0 if gate is None else gate.numel()
        self.sums[2:OF_LOOKUPS] += torch.stack([s.to(self.one.dtype) for s in sums])

    @torch.no_grad()
    def record_loss(self, name: str, loss: Tensor) -> None:
        """Add one of LOSSES, [], of one forward pass on all ranks that share its tokens."""
        first = OF_LOOKUPS + 2 * LOSSES.index(name)
        self.sums[first : first + 2] += torch.stack((self.one, loss.to(self.one)))


@dataclass
class TableMetrics:
    """The sums of one table on one rank."""

    sums: Tensor
    """[len(TABLE_SUMS)], a part of the tensor that is all-reduced."""
    received: Tensor
    """[], the number of lookups that this rank received."""
    bytes_sent: Tensor = field(init=False)
    """[], bytes that this rank sent to others: one of the sums, so that an addition to it is done
    by the device, also when a CUDA graph is replayed."""
    timings: list[list[tuple[str, Any]]] = field(default_factory=list)
    """For each timed pass, the name of every part that ended and the moment when it did."""

    def __post_init__(self) -> None:
        self.bytes_sent = self.sums[TABLE_SUMS.index("bytes")]

    def mark(self, rows: Tensor) -> None:
        """Count the lookups that this rank received; -1 is none."""
        self.received += (rows >= 0).sum()

    def start(self) -> Callable[[str], None]:
        """Start to time a pass.

        Returns:
            A function to call at the end of each part of the pass, with the name of the part.
        """
        device = self.sums.device
        if len(self.timings) == TIMED_PASSES or _is_capturing(device):
            return untimed
        timing = [("", _now(device))]
        self.timings.append(timing)
        return lambda name: timing.append((name, _now(device)))

    def fill(
        self,
        weight: Tensor,
        shard: TableShard,
        gradient_squares: Tensor | float = 0.0,
        trained: Tensor | None = None,
        readers: int = 1,
    ) -> None:
        """Write the numbers that the host knows and the norms of the table, before a report.

        Args:
            weight: [r, v], this rank's shard of the table.
            shard: the position of the shard in the table.
            gradient_squares: sum of squared gradients of the shard; 0 on all but one of the ranks
                that hold it.
            trained: [3], the numbers of TRAINED in sparse finetuning; 0 on all but one of the ranks
                that hold the same rows.
            readers: number of layers on this rank that read the table.
        """
        # pipeline stages with more layers get more lookups, which is no matter of the sharding
        self.received /= max(1, readers)
        num_rows, width = shard.global_shape
        stride = -(-num_rows // NORM_ROWS)
        rows = weight[-shard.offset[0] % stride :: stride]
        times = self._times()
        numbers = {
            "holders": 1.0,
            "bytes": 0.0,
            "passes": float(len(times)),
            "lookup": sum(t.get("lookup", 0.0) for t in times),
            "exchange": sum(t.get("exchange", 0.0) for t in times),
            "gradient": 0.0,
            # a shard with some columns has a fraction of each row; replicas count in both sums
            "rows": len(rows) * rows.shape[1] / width,
            "row_squares": 0.0,
            **dict.fromkeys(TRAINED, 0.0),
        }
        sent = self.bytes_sent.clone()
        self.sums.copy_(torch.tensor(list(numbers.values()), dtype=self.sums.dtype))
        self.bytes_sent += sent
        self.sums[TABLE_SUMS.index("gradient")] += gradient_squares
        wide = torch.promote_types(weight.dtype, torch.float32)
        norms = torch.linalg.vector_norm(rows.detach(), dim=1, dtype=wide)
        self.sums[TABLE_SUMS.index("row_squares")] += norms.double().square().sum()
        if trained is not None:
            self.sums[-len(TRAINED) :] += trained
        self.timings.clear()

    def _times(self) -> list[dict[str, float]]:
        """Return part -> milliseconds for each timed pass that the device has completed."""
        found = []
        for timing in self.timings:
            if all(_is_past(moment) for _, moment in timing):
                times: dict[str, float] = {}
                for (_, begin), (name, end) in zip(timing, timing[1:], strict=False):
                    times[name] = times.get(name, 0.0) + _milliseconds(begin, end)
                found.append(times)
        return found


class Metrics:
    """The sums of all layers and tables of a model, in one fp64 tensor so that counts are exact."""

    def __init__(
        self, watched: Watched, device: torch.device | str | int, group: ProcessGroup | None = None
    ) -> None:
        """Allocate the sums, about 1 MiB per layer.

        Args:
            watched: the layers and tables that are measured.
            device: device of the sums.
            group: all ranks that train; None for all ranks of the world.
        """
        self.watched, self.group = watched, group
        ranks, rank = 1, 0
        if dist.is_initialized():
            ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        layer_size, table_size = sum(_layer_sizes(watched)), len(TABLE_SUMS) + ranks
        num_layers, num_tables = len(watched.layers), len(watched.tables)
        sizes = [layer_size] * num_layers + [table_size] * num_tables
        self.sums = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        parts = self.sums.split(sizes)
        self.layers = {
            layer: LayerMetrics(watched, part)
            for layer, part in zip(watched.layers, parts[:num_layers], strict=True)
        }
        self.tables = {
            name: TableMetrics(part[: len(TABLE_SUMS)], part[len(TABLE_SUMS) + rank])
            for name, part in zip(watched.tables, parts[num_layers:], strict=True)
        }
        self.sizes = sizes

    @torch.no_grad()
    def report(
        self, iterations: int, gradient_scale: float = 1.0, *, wanted: bool = True
    ) -> Report | None:
        """Sum the window over all ranks, and start a new one. Every rank must call this.

        Args:
            iterations: number of iterations in the window.
            gradient_scale: factor of the gradients whose squares fill() was given.
            wanted: whether this rank needs the report; a rank that does not need it does not wait
                for the device.

        Returns:
            The report; None where it is not wanted.
        """
        total = self.sums.clone()
        self.sums.zero_()
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
    """Do nothing; stands in for the result of TableMetrics.start() where a pass is not timed."""


def kl_from_uniform(usage: Tensor, num_keys: int) -> Tensor:
    """Return the KL divergence of the lookups from uniform lookups, in nats.

    KL = sum_c p_c log(p_c / q_c), where p_c is the share of cell c in the lookups and q_c its share
    in the rows (Lample et al. 2019, section 4.1, with lookups in place of weights). A cell is a row
    where N <= 256; otherwise the result is a lower bound of the divergence by rows. For n uniformly
    random lookups its expectation is about P**2 / 2n, not 0.

    Args:
        usage: [P, P], the lookups of every cell of the usage map.
        num_keys: N, sub-keys per half.
    """
    side = len(usage)
    lines = torch.arange(num_keys, device=usage.device) * side // num_keys
    keys = torch.bincount(lines, minlength=side).double()
    uniform = torch.outer(keys, keys) / num_keys**2
    shares = usage / usage.sum()
    return torch.special.xlogy(shares, shares / uniform).sum()


def _absolute_shares(weights: Tensor, topk: int) -> Tensor:
    """Return the share of each lookup in the absolute weights of its head, [tokens, H * K].

    The shares of a head whose weights are all zero are zero.
    """
    sizes = weights.abs().flatten(2).sum(-1) if weights.dim() > 2 else weights.abs()
    by_head = sizes.unflatten(1, (-1, topk))
    totals = by_head.sum(-1, keepdim=True).clamp_(min=torch.finfo(sizes.dtype).tiny)
    return (by_head / totals).flatten(1)


def _layer_sizes(watched: Watched) -> list[int]:
    """Return the number of sums of each kind that a layer has: usage, sampled, sums."""
    return [watched.side**2, (SAMPLED_ROWS + 1) * watched.is_sampled, NUM_SUMS]


def _spreading_multiplier(num_rows: int) -> int:
    """Return a factor f coprime to R, so that row * f mod R permutes rows and spreads neighbours.

    The sample consists of the rows that it maps below SAMPLED_ROWS.
    """
    factor = max(1, min(int(num_rows * (math.sqrt(5) - 1) / 2), 2**62 // num_rows))
    while math.gcd(factor, num_rows) != 1:
        factor -= 1
    return factor


def _layer_numbers(
    watched: Watched, counted: Tensor, sampled: Tensor, sums: Tensor
) -> dict[str, float]:
    """Return the metrics of a layer; none if it had no lookups."""
    reads, gates, top, entropy, gate, weight, *of_losses = sums.tolist()
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
    if not watched.softmax:
        numbers["weight_mean"] = weight / reads
    for name, count, total in zip(LOSSES, of_losses[::2], of_losses[1::2], strict=True):
        if count:
            numbers[name] = total / count
    return numbers | ({"gate_mean": gate / gates} if gates else {})


def _table_numbers(
    numbers: list[float], iterations: int, gradient_scale: float
) -> dict[str, float]:
    """Return the metrics of a table; none if no rank holds it."""
    sums: Mapping[str, float] = dict(zip(TABLE_SUMS, numbers, strict=False))
    received = numbers[len(TABLE_SUMS) :]
    if not sums["holders"]:
        return {}
    shown = {
        "grad_norm": math.sqrt(sums["gradient"]) * gradient_scale,
        "row_norm": math.sqrt(sums["row_squares"] / sums["rows"]),
        "sent_megabytes": sums["bytes"] / sums["holders"] / iterations / 1e6,
    }
    if sum(received):
        shown["shard_load"] = max(received) * sums["holders"] / sum(received)
    if sums["all_lookups"]:
        shown["trained_rows"] = sums["trained_rows"] / iterations
        shown["trained_lookups"] = 100 * sums["trained_lookups"] / sums["all_lookups"]
    if sums["passes"]:
        shown["lookup_ms"] = sums["lookup"] / sums["passes"]
        shown["exchange_ms"] = sums["exchange"] / sums["passes"]
    return shown


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _now(device: torch.device) -> Any:
    """Return the present moment: an event of the current stream, or the clock of the host."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _is_past(moment: Any) -> bool:
    return isinstance(moment, float) or moment.query()


def _milliseconds(begin: Any, end: Any) -> float:
    return (end - begin) * 1e3 if isinstance(begin, float) else begin.elapsed_time(end)
