"""What all ranks must know alike before anything is allocated: flags, and what one of them read."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megamem.config import MemoryConfig, flag


def differing_flags(memory: MemoryConfig | None) -> list[str]:
    """A sentence for every flag that ranks disagree about, the same list on every rank.

    Each rank must call this: ranks that disagree would otherwise wait for each other forever, or
    mix up tables of different shapes.
    """
    if not dist.is_initialized():
        return []
    everybody: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everybody, (memory or MemoryConfig()).to_dict())
    return describe(everybody)


def told_by_first(look: Callable[[], Any]) -> Any:
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
