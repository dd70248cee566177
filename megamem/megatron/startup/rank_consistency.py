"""Compares the flags of all ranks at start, and shares what one rank has read with all."""

import argparse
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megamem.config import MemoryConfig, flag
from megamem.megatron.arguments import ranks_of_node
from megamem.spec import Grid, MemorySpec

FLAGS, VERDICT = "megamem/flags/{}", "megamem/flags/verdict"
"""Keys in the store of torch.distributed."""
NODE_RANKS = "ranks of a node"
"""Key of a rank's LOCAL_WORLD_SIZE among its settings."""
GRACE = timedelta(seconds=10)
"""How much longer the other ranks wait, as the first may have begun to wait later than they."""


def differing_flags(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence for each flag that is not the same on all ranks; all ranks return the same list.

    Ranks with different flags could wait for each other forever, or exchange rows of tables with
    different shapes. Each rank puts its flags into the store and the first compares them. This is
    not a collective, because ranks without --memory-layers do not take part. These are found
    because they put nothing into the store within --distributed-timeout-minutes.
    """
    if not dist.is_initialized():
        return []
    patience = spec.timeout
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    store.set(FLAGS.format(rank), json.dumps(_settings(spec, args)))
    if rank != 0:
        try:
            store.wait([VERDICT], patience + min(patience, GRACE))
        except RuntimeError:
            return [silent([0], patience)]
        return json.loads(store.get(VERDICT))
    keys = [FLAGS.format(other) for other in range(dist.get_world_size())]
    try:
        store.wait(keys, patience)
    except RuntimeError:  # a subclass of RuntimeError that depends on the kind of store
        found = [silent([n for n, key in enumerate(keys) if not store.check([key])], patience)]
    else:
        by_rank = [json.loads(text) for text in store.multi_get(keys)]
        found = node_problems(by_rank) or describe(by_rank)
    store.set(VERDICT, json.dumps(found))
    return found


def _settings(spec: MemorySpec, args: argparse.Namespace) -> dict[str, Any]:
    """Name of each field -> its value; the layout is the one that this rank has resolved."""
    layout = spec.layout
    return MemoryConfig.from_args(args).to_dict() | {
        NODE_RANKS: ranks_of_node(),
        "memory_mode": layout.mode,
        "memory_group_size": layout.group_size,
        "memory_column_ranks": layout.column_ranks,
        "memory_grid": str(layout.grid),
    }


def silent(ranks: list[int], patience: timedelta) -> str:
    """The sentence about ranks that did not report their flags in time."""
    minutes = f"{patience.total_seconds() / 60:g}"
    return (
        f"--memory-layers is given on this rank, but {_ranks(ranks)} did not report memory flags "
        f"within --distributed-timeout-minutes {minutes}; start every rank with the same flags."
    )


def broadcast_from_rank0(look: Callable[[], Any]) -> Any:
    """The result of look() on rank 0, on all ranks; collective.

    Only one rank then reads from the file system.
    """
    found = [look() if dist.get_rank() == 0 else None]
    device = torch.device("cpu" if dist.get_backend() == "gloo" else "cuda")
    dist.broadcast_object_list(found, src=0, device=device)
    return found[0]


def node_problems(by_rank: list[dict[str, Any]]) -> list[str]:
    """A sentence if a memory group spans nodes that do not have the same number of ranks.

    Args:
        by_rank: the settings of each rank, in the order of ranks.
    """
    grids = [Grid.parse(settings["memory_grid"]) for settings in by_rank]
    by_size = _ranks_by_value([settings.pop(NODE_RANKS) for settings in by_rank])
    if len(by_size) == 1 or all(grid.nodes == 1 for grid in grids):
        return []
    shown = ", ".join(f"{size} on the node of {who}" for size, who in by_size.items())
    return [
        f"Nodes have different numbers of ranks: {shown}. A memory group of several nodes needs "
        "nodes of one size: start as many ranks on each, or use a grid that does not depend on "
        f"nodes, such as --memory-grid {Grid(local_rows=grids[0].size)}."
    ]


def describe(by_rank: list[dict[str, Any]]) -> list[str]:
    """A sentence for each setting that is not the same for all ranks.

    Args:
        by_rank: the settings of each rank, in the order of ranks.
    """
    found = []
    for name in by_rank[0]:
        by_value = _ranks_by_value([_shown(settings[name]) for settings in by_rank])
        if len(by_value) > 1:
            shown = ", ".join(f"{value} on {who}" for value, who in by_value.items())
            found.append(f"{flag(name)} differs: {shown}; start every rank with the same flags.")
    return found


def _ranks_by_value(values: list[Any]) -> dict[Any, str]:
    """Each value that ranks have -> words for the ranks that have it."""
    found: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(value, []).append(rank)
    return {value: _ranks(ranks) for value, ranks in found.items()}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "its default" if value is None else str(value)


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    few = ", ".join(map(str, ranks[:4]))
    return f"ranks {few}" + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
