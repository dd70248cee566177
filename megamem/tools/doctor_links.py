"""Measures the links between the ranks of a run, and names the layout of a table that suits them.

Two collectives that carry lookups and read-outs are timed on each link:

    inside a node    among the ranks of each node, on all nodes at the same time
    between nodes    among the ranks with the same place on their nodes, for all places at the same
                     time, as in a training step: all ranks of a node share its network adapters

The layout is that of `--memory-mode auto` for these rates. Of the two collectives the slower one
counts, as the planner has one rate for a link.
"""

import argparse
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megamem.config import MemoryConfig
from megamem.layers.variants import VARIANTS
from megamem.parallel.choices import choose_layout
from megamem.parallel.exchange_cost import Exchange
from megamem.parallel.replica_groups import nodes_of_ranks
from megamem.spec import Layout
from megamem.tools.doctor_collectives import MIB, WRONG, measured_rate
from megamem.tools.doctor_finding import Finding

LINK_COLLECTIVES = ("all-gather", "all-to-all")
INSIDE, ACROSS = "inside a node", "between nodes"


@dataclass(frozen=True)
class TableSize:
    """What of a table its layout depends on; by default the tables of "Memory Layers at Scale"."""

    width: int = 2048
    """V, the width of a row."""
    lookups: int = 128
    """Lookups of a token."""
    number_bytes: int = 2
    """Bytes of a number of a row."""
    wire: Any = "auto"
    """The value of --memory-wire."""
    group_size: int | None = None
    """The ranks that share a table; None, or a number that does not divide them, for all."""
    cuts_rows: bool = True
    """Whether ranks may hold a part of the columns."""


@dataclass(frozen=True)
class Rates:
    """Bytes per second that a rank sends; None where there is nothing to measure."""

    inside: float | None
    across: float | None


def table_size(args: argparse.Namespace) -> TableSize:
    """The size of the tables of a run, from its arguments, which Megatron need not have checked."""
    config, usual = MemoryConfig.from_args(args), TableSize()
    variant = VARIANTS[config.memory_variant]
    topk = config.memory_final_topk or config.memory_topk or variant.topk
    return TableSize(
        width=config.memory_value_dim or args.hidden_size or usual.width,
        lookups=(config.memory_heads or variant.heads) * topk,
        number_bytes=2 if args.bf16 or args.fp16 else 4,
        wire=config.memory_wire,
        group_size=config.memory_group_size,
        cuts_rows=variant.cuts_rows,
    )


def node_lists(sizes: Sequence[int | None], hosts: Sequence[str]) -> list[list[int]]:
    """Return the ranks of each node.

    Args:
        sizes: for each rank LOCAL_WORLD_SIZE, the ranks on its node; None where it is not set.
        hosts: the host of each rank, by which nodes are told apart where it is not set.
    """
    known = [size for size in sizes if size is not None]
    nodes: Sequence[int | str] = nodes_of_ranks(known) if len(known) == len(sizes) else hosts
    found: dict[int | str, list[int]] = {}
    for rank, node in enumerate(nodes):
        found.setdefault(node, []).append(rank)
    return list(found.values())


def links_check(device: torch.device, size: int, patience: int, table: TableSize) -> list[Finding]:
    """Measure both links, and name the layout that suits. All ranks must call this.

    Args:
        device: this rank's.
        size: bytes per rank and collective.
        patience: seconds to wait for other ranks.
        table: the table whose layout is chosen.
    """
    own = os.environ.get("LOCAL_WORLD_SIZE")
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, (int(own) if own else None, platform.node()))
    nodes = node_lists([size for size, _ in everybody], [host for _, host in everybody])
    counts = sorted({len(ranks) for ranks in nodes})
    if len(counts) > 1:
        text = (
            f"not measured, as nodes have {' and '.join(map(str, counts))} ranks; start equally "
            "many on each node"
        )
        return [Finding("links", text, "note")]
    places = [list(ranks) for ranks in zip(*nodes, strict=True)]
    findings: list[Finding] = []
    rates: list[float | None] = []
    for where, groups in ((INSIDE, nodes), (ACROSS, places)):
        found, rate = _measure(where, groups, device, size, timedelta(seconds=patience))
        findings += found
        rates.append(rate)
    if any(finding.status == "problem" for finding in findings):
        return findings
    return [*findings, advice(Rates(*rates), len(nodes), counts[0], table)]


def _measure(
    where: str, groups: list[list[int]], device: torch.device, size: int, timeout: timedelta
) -> tuple[list[Finding], float | None]:
    """The findings for one link, and the rate of the slower collective."""
    ranks = len(groups[0])
    if ranks == 1:
        why = "each node has one rank" if where == INSIDE else "all ranks are on one node"
        return [Finding(where, f"not measured, as {why}", "note")], None
    own: ProcessGroup | None = None
    for members in groups:
        # without a time-out of its own, a group would wait longer for a rank than the world does
        group: Any = dist.new_group(members, timeout)
        own = group if dist.get_rank() in members else own
    findings, slowest = [], None
    for name in LINK_COLLECTIVES:
        rate = measured_rate(name, device, size, own)
        what = f"{name} {where}"
        if rate is None:
            findings.append(Finding(what, WRONG, "problem"))
            continue
        slowest = min(slowest or rate, rate)
        text = f"each rank sends {rate / 1e9:.3g} GB/s; {size / MIB:.0f} MiB per rank"
        if len(groups) > 1:
            text += f", {len(groups)} groups of {ranks} ranks at once"
        findings.append(Finding(what, text))
    return findings, slowest


def suitable_layout(rates: Rates, nodes: int, ranks_per_node: int, table: TableSize) -> Layout:
    """Return the layout that `--memory-mode auto` chooses at these rates."""
    world = nodes * ranks_per_node
    wanted = table.group_size or world
    size = wanted if world % wanted == 0 else world
    if not table.cuts_rows:
        return Layout("row", size)
    # a link that is missing carries nothing
    inside = rates.inside or rates.across or 1.0
    exchange = Exchange(
        width=table.width,
        lookups=table.lookups,
        number_bytes=table.number_bytes,
        link=inside,
        network=rates.across or inside,
    )
    return choose_layout(exchange, size, ranks_per_node=ranks_per_node, wire=table.wire)


def plan_flags(rates: Rates) -> str:
    """The flags of `megamem plan` that stand for these rates."""
    named = (("--link-gbytes", rates.inside), ("--network-gbytes", rates.across))
    return " ".join(f"{name} {rate / 1e9:.3g}" for name, rate in named if rate is not None)


def advice(rates: Rates, nodes: int, ranks_per_node: int, table: TableSize) -> Finding:
    """The layout that suits these rates, as one line with its flags."""
    layout = suitable_layout(rates, nodes, ranks_per_node, table)
    measured = [
        f"{rate / 1e9:.3g} GB/s {where}"
        for rate, where in ((rates.inside, INSIDE), (rates.across, ACROSS))
        if rate is not None
    ]
    text = (
        f"{layout.flags} suits {' and '.join(measured)}, for a table with rows of {table.width} "
        f"numbers of {table.number_bytes} bytes and {table.lookups} lookups per token, over "
        f"{layout.group_size} ranks. megamem plan takes these rates as {plan_flags(rates)}."
    )
    return Finding("layout", text, is_line=True)
