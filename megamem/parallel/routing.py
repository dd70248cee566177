"""Moves lookups to the ranks that hold their rows, and the bags back.

    plan      = plan_routing(row_ids_TL, ...)            who needs which rows from whom
    weights_M = dispatch(plan, weights_TL)               lookups travel to the row owners
    bags_GV   = embedding_bag(values_rV, ...)            local work only
    out_TV    = combine(plan, bags_GV)                   partial bags travel home and are summed

Two wire forms differ in how a lookup finds its owner:

    alltoall    counts first, then each lookup to its owner alone. M is what arrived; the device
                waits for the counts once.
    allgather   every lookup to every rank, at a fixed size; those of other owners get row -1,
                which reads nothing. No wait, so it can be captured in a CUDA graph.

The plan is a value, never state on a module: dispatch and combine are pure functions of it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megamem.parallel.collectives import (
    all_to_all,
    exchange,
    gather_padded,
    gather_weights,
    sum_bags_home,
)
from megamem.parallel.row_shard import RowShard

Wire = Literal["alltoall", "allgather"]

# at 8 ranks a fixed size costs 33 KiB per token against 28.7 KiB, and no wait; beyond, it grows
# with the number of ranks (2048-wide bf16 rows, 128 lookups)
ALLGATHER_UP_TO = 8


@dataclass(frozen=True)
class RoutingPlan:
    """The integer facts of one exchange of lookups."""

    row_ids_M: Tensor
    """Lookups that arrived here, as rows of this rank's shard; -1 reads nothing."""
    offsets: Tensor
    """[G + 1] where each bag's lookups start among the M."""
    bag_counts: list[int]
    """Bags of each source rank; their sum is G."""
    num_tokens: int
    """T, the tokens of this rank."""
    group: ProcessGroup | None
    wire: Wire
    order_J: Tensor | None = None
    """alltoall: permutation that groups the local lookups by owner."""
    send: list[int] | None = None
    recv: list[int] | None = None


def choose_wire(wanted: Literal["auto", "alltoall", "allgather"], world_size: int) -> Wire:
    """The wire form of a group of `world_size` ranks."""
    if wanted != "auto":
        return wanted
    return "allgather" if world_size <= ALLGATHER_UP_TO else "alltoall"


def plan_routing(
    row_ids_TL: Tensor,
    shard: RowShard,
    group: ProcessGroup | None,
    token_counts: list[int],
    wire: Wire,
) -> RoutingPlan:
    """Tell every owner which of its rows are wanted.

    Args:
        row_ids_TL: rows of the whole table.
        shard: this rank's rows.
        token_counts: T of every rank of the group; they may differ, and may be 0.
        wire: how lookups travel.
    """
    # local rows and, but for the largest tables, all rows fit in half the bytes
    id_dtype = torch.int32 if shard.num_rows < 2**31 else torch.int64
    if wire == "allgather":
        return _plan_allgather(row_ids_TL.to(id_dtype), shard, group, token_counts)
    return _plan_alltoall(row_ids_TL, shard, group, token_counts, id_dtype)


def _plan_allgather(
    row_ids_TL: Tensor, shard: RowShard, group: ProcessGroup | None, token_counts: list[int]
) -> RoutingPlan:
    world_size, lookups = len(token_counts), row_ids_TL.shape[1]
    num_bags = max(token_counts)
    row_ids_M = gather_padded(row_ids_TL, num_bags, group, fill=-1).flatten().long()
    local_M = row_ids_M - shard.start
    here_M = (row_ids_M >= 0) & (local_M >= 0) & (local_M < shard.num_local)
    return RoutingPlan(
        row_ids_M=torch.where(here_M, local_M, -1),
        offsets=torch.arange(world_size * num_bags + 1, device=local_M.device) * lookups,
        bag_counts=[num_bags] * world_size,
        num_tokens=len(row_ids_TL),
        group=group,
        wire="allgather",
    )


def _plan_alltoall(
    row_ids_TL: Tensor,
    shard: RowShard,
    group: ProcessGroup | None,
    token_counts: list[int],
    id_dtype: torch.dtype,
) -> RoutingPlan:
    (num_tokens, lookups), world_size = row_ids_TL.shape, len(token_counts)
    row_ids_J = row_ids_TL.flatten()
    owners_J = shard.owner(row_ids_J)
    tokens_J = torch.arange(len(row_ids_J), device=row_ids_J.device) // lookups
    # stable: lookups for one owner stay in token order, so that arriving bags are contiguous
    order_J = owners_J.argsort(stable=True)

    # 1. how many lookups of each token an owner gets; these are the sizes of its bags
    sizes_WT = torch.bincount(owners_J * num_tokens + tokens_J, minlength=world_size * num_tokens)
    sizes_G = exchange(sizes_WT, [num_tokens] * world_size, token_counts, group)
    send = [int(part.sum()) for part in sizes_WT.cpu().split([num_tokens] * world_size)]
    recv = [int(part.sum()) for part in sizes_G.cpu().split(token_counts)]

    # 2. which rows of its shard
    local_J = shard.local_on(owners_J, row_ids_J).to(id_dtype)
    row_ids_M = exchange(local_J[order_J], send, recv, group)
    return RoutingPlan(
        row_ids_M=row_ids_M.long(),
        offsets=torch.cat((sizes_G.new_zeros(1), sizes_G.cumsum(0))),
        bag_counts=token_counts,
        num_tokens=num_tokens,
        group=group,
        wire="alltoall",
        order_J=order_J,
        send=send,
        recv=recv,
    )


def dispatch(plan: RoutingPlan, weights_TL: Tensor) -> Tensor:
    """Send each lookup's weight where plan_routing sent its row id -> weights_M."""
    if plan.wire == "allgather":
        return gather_weights(weights_TL, plan.bag_counts[0], plan.group).flatten()
    assert plan.order_J is not None and plan.send is not None and plan.recv is not None
    return all_to_all(weights_TL.flatten()[plan.order_J], plan.send, plan.recv, plan.group)


def combine(plan: RoutingPlan, bags_GV: Tensor) -> Tensor:
    """Send every partial bag home and add up what the owners returned -> out_TV."""
    return sum_bags_home(bags_GV, plan.bag_counts, plan.group)[: plan.num_tokens]
