"""Forms memory groups from Megatron's parallel groups."""

import functools
from datetime import timedelta

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megamem.megatron.arguments import ranks_of_node
from megamem.parallel.memory_group import MemoryGroup, form, partition
from megamem.parallel.replica_groups import nodes_of_ranks
from megamem.spec import Grid, MemorySpec


def memory_group(spec: MemorySpec, groups: ProcessGroupCollection, holds: bool) -> MemoryGroup:
    """The memory group of this rank. All ranks must make the first call, as it is collective.

    Args:
        spec: the spec of the run.
        groups: the process groups of the model.
        holds: whether there are memory layers on the pipeline stage of this rank, virtual stages
            included. All stages that have some hold the table of a shared pool.
    """
    return _formed(
        dist.group.WORLD,
        spec.layout.grid,
        (groups.pp.rank(), groups.dp_cp.rank(), groups.tp.rank()),
        spec.timeout,
        holds and spec.pool == "shared",
        ranks_of_node(),
    )


@functools.cache
def _formed(
    world: ProcessGroup,
    grid: Grid,
    coordinates: tuple[int, int, int],
    timeout: timedelta,
    shares: bool,
    node_size: int,
) -> MemoryGroup:
    """Form the groups once per process, because communicators are expensive."""
    own = coordinates, shares, node_size
    found = [own] * dist.get_world_size(world)
    dist.all_gather_object(found, own, group=world)
    ranks = sorted(range(len(found)), key=lambda rank: found[rank])
    stages: dict[int, list[int]] = {}
    sharing: dict[int, bool] = {}
    for rank in ranks:
        (stage, _, _), shares, _ = found[rank]
        stages.setdefault(stage, []).append(rank)
        sharing[stage] = shares
    joined = [index for index, stage in enumerate(stages) if sharing[stage]]
    return form(
        partition(list(stages.values()), grid, joined),
        token_ranks=[tensor_rank for (_, _, tensor_rank), _, _ in found],
        timeout=timeout,
        nodes=nodes_of_ranks([size for _, _, size in found]),
    )
