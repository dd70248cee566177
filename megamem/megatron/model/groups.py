"""Megatron's ranks -> the memory group that each is in."""

import functools
from datetime import timedelta

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megamem.parallel.memory_group import MemoryGroup, form, partition
from megamem.spec import MemorySpec


def memory_group(spec: MemorySpec, groups: ProcessGroupCollection) -> MemoryGroup:
    """The memory group of this rank; every rank of the world must call this the first time.

    Args:
        spec: of the run.
        groups: of the model.
    """
    return _formed(
        dist.group.WORLD,
        (spec.layout.group_size, spec.layout.column_ranks),
        (groups.pp.rank(), groups.dp_cp.rank(), groups.tp.rank()),
        spec.timeout,
    )


@functools.cache
def _formed(
    world: ProcessGroup,
    shape: tuple[int, int],
    coordinates: tuple[int, int, int],
    timeout: timedelta,
) -> MemoryGroup:
    """Process groups are made once in a process, as communicators are dear."""
    everybody: list[tuple[int, int, int]] = [coordinates] * dist.get_world_size(world)
    dist.all_gather_object(everybody, coordinates, group=world)
    ranks = sorted(range(len(everybody)), key=lambda rank: everybody[rank])
    stages: dict[int, list[int]] = {}
    for rank in ranks:
        stages.setdefault(everybody[rank][0], []).append(rank)
    return form(
        partition(list(stages.values()), *shape),
        token_ranks=[tensor_rank for _, _, tensor_rank in everybody],
        timeout=timeout,
    )
