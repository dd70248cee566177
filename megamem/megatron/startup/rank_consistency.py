"""What all ranks must know alike before anything is allocated: flags, and what one of them read."""

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
"""Keys in the store that the ranks met at."""
GRACE = timedelta(seconds=10)


def differing_flags(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence for every flag that ranks disagree about, the same list on every rank.

    Ranks that disagree would otherwise wait for each other forever, or mix up tables of different
    shapes. The first rank compares what each put into the store. It is no collective, as ranks
    without --memory-layers do not come here; these are found by their silence.

    It waits for the other ranks as long as their collectives would.
    """
    if not dist.is_initialized():
        return []
    patience = spec.timeout
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    store.set(FLAGS.format(rank), json.dumps(_settings(spec, args)))
    if rank != 0:
        try:
            # the first may have begun to wait a little later
            store.wait([VERDICT], patience + min(patience, GRACE))
        except RuntimeError:
            return [silent([0], patience)]
        return json.loads(store.get(VERDICT))
    keys = [FLAGS.format(other) for other in range(dist.get_world_size())]
    try:
        store.wait(keys, patience)
    except RuntimeError:  # each kind of store has a time-out of its own below this
        found = [silent([n for n, key in enumerate(keys) if not store.check([key])], patience)]
    else:
        found = describe([json.loads(text) for text in store.multi_get(keys)])
    store.set(VERDICT, json.dumps(found))
    return found


def _settings(spec: MemorySpec, args: argparse.Namespace) -> dict[str, Any]:
    """Name of a flag -> its value; of the layout, what it came to on this rank."""
    layout = spec.layout
    return MemoryConfig.from_args(args).to_dict() | {
        "memory_mode": layout.mode,
        "memory_group_size": layout.group_size,
        "memory_column_ranks": layout.column_ranks,
    }


def silent(ranks: list[int], patience: timedelta) -> str:
    """What is known of ranks that did not say how they were started."""
    minutes = f"{patience.total_seconds() / 60:g}"
    return (
        f"--memory-layers is given here, but {_ranks(ranks)} did not say so within "
        f"--distributed-timeout-minutes {minutes}; start every rank with the same flags."
    )


def broadcast_from_rank0(look: Callable[[], Any]) -> Any:
    """look() of rank 0, on every rank: one reads a file system, so that a thousand do not.

    Each rank must call this.
    """
    found = [look() if dist.get_rank() == 0 else None]
    device = torch.device("cpu" if dist.get_backend() == "gloo" else "cuda")
    dist.broadcast_object_list(found, src=0, device=device)
    return found[0]


def describe(everybody: list[dict[str, Any]]) -> list[str]:
    """A sentence for every setting that is not the same in all of these, given by rank."""
    found = []
    for name in everybody[0]:
        values: dict[str, list[int]] = {}
        for rank, settings in enumerate(everybody):
            values.setdefault(_shown(settings[name]), []).append(rank)
        if len(values) > 1:
            told = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in values.items())
            found.append(f"{flag(name)} differs: {told}; start every rank with the same flags.")
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
