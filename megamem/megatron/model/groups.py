"""Megatron's ranks -> the memory group that each is in."""

import functools
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megamem.config import MemoryConfig
from megamem.parallel.memory_group import MemoryGroup, form, partition


@dataclass(frozen=True)
class GroupShape:
    """W ranks, of which `column_ranks` neighbours share each row."""

    size: int
    column_ranks: int


def group_shape(memory: MemoryConfig) -> GroupShape:
    """The shape of every memory group of a run; the settings have their layout."""
    size = memory.memory_group_size
    assert size is not None and memory.memory_mode != "auto", "with_layout() first"
    columns = {"row": 1, "column": size, "2d": memory.memory_column_ranks or 1}
    return GroupShape(size, columns[memory.memory_mode])


def memory_group(
    memory: MemoryConfig, groups: ProcessGroupCollection, timeout: timedelta | None = None
) -> MemoryGroup:
    """The memory group of this rank; every rank of the world must call this the first time.

    Args:
        memory: with its layout.
        groups: of the model.
        timeout: of every collective; None is that of the backend.
    """
    shape = group_shape(memory)
    return _formed(
        dist.group.WORLD, shape, (groups.pp.rank(), groups.dp_cp.rank(), groups.tp.rank()), timeout
    )


@functools.cache
def _formed(
    world: ProcessGroup,
    shape: GroupShape,
    coordinates: tuple[int, int, int],
    timeout: timedelta | None,
) -> MemoryGroup:
    """Process groups are made once in a process, as communicators are dear."""
    everybody: list[tuple[int, int, int]] = [coordinates] * dist.get_world_size(world)
    dist.all_gather_object(everybody, coordinates, group=world)
    ranks = sorted(range(len(everybody)), key=lambda rank: everybody[rank])
    stages: dict[int, list[int]] = {}
    for rank in ranks:
        stages.setdefault(everybody[rank][0], []).append(rank)
    return form(
        partition(list(stages.values()), shape.size, shape.column_ranks),
        token_ranks=[tensor_rank for _, _, tensor_rank in everybody],
        timeout=timeout,
    )
