"""Compares the flags of all ranks at start, and shares what one rank has read with all."""

import argparse
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megamem.config import MemoryConfig, flag
from megamem.spec import MemorySpec

FLAGS, VERDICT = "megamem/flags/{}", "megamem/flags/verdict"
"""Keys in the store of torch.distributed."""
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
        found = describe([json.loads(text) for text in store.multi_get(keys)])
    store.set(VERDICT, json.dumps(found))
    return found


def _settings(spec: MemorySpec, args: argparse.Namespace) -> dict[str, Any]:
    """Name of each field -> its value; the layout is the one that this rank has resolved."""
    layout = spec.layout
    return MemoryConfig.from_args(args).to_dict() | {
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


def describe(by_rank: list[dict[str, Any]]) -> list[str]:
    """A sentence for each setting that is not the same for all ranks.

    Args:
        by_rank: the settings of each rank, in the order of ranks.
    """
    found = []
    for name in by_rank[0]:
        values: dict[str, list[int]] = {}
        for rank, settings in enumerate(by_rank):
            values.setdefault(_shown(settings[name]), []).append(rank)
        if len(values) > 1:
            shown = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in values.items())
            found.append(f"{flag(name)} differs: {shown}; start every rank with the same flags.")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "its default" if value is None else str(value)


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    few = ", ".join(map(str, ranks[:4]))
    return f"ranks {few}" + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
