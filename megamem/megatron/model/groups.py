"""Forms memory groups from Megatron's parallel groups."""

import functools
from datetime import timedelta

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megamem.parallel.memory_group import MemoryGroup, form, partition
from megamem.spec import MemorySpec


def memory_group(spec: MemorySpec, groups: ProcessGroupCollection) -> MemoryGroup:
    """The memory group of this rank. All ranks must make the first call, as it is collective.

    Args:
        spec: the spec of the run.
        groups: the process groups of the model.
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
    """Form the groups once per process, because communicators are expensive."""
    coordinates_of: list[tuple[int, int, int]] = [coordinates] * dist.get_world_size(world)
    dist.all_gather_object(coordinates_of, coordinates, group=world)
    ranks = sorted(range(len(coordinates_of)), key=lambda rank: coordinates_of[rank])
    stages: dict[int, list[int]] = {}
    for rank in ranks:
        stages.setdefault(coordinates_of[rank][0], []).append(rank)
    return form(
        partition(list(stages.values()), *shape),
        token_ranks=[tensor_rank for _, _, tensor_rank in coordinates_of],
        timeout=timeout,
    )
