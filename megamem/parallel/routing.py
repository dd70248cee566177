"""Moves lookups to the ranks that hold their rows, and the bags back.

    plan      = plan_routing(row_ids_TL, ...)            who needs which rows from whom
    weights_M = dispatch(plan, weights_TL)               lookups travel to the row owners
    row_ids_M = arrive(plan)                             what arrived, as local rows
    bags_GV   = embedding_bag(values_rV, ...)            local work only
    out_TV    = combine(plan, bags_GV)                   partial bags travel home and are summed

Lookups travel from plan_routing to arrive; whoever has other work does it in between. Where an
owner must see what asks, too, the tokens travel with them: all_gather_tokens, and after arrive
tokens_of_bags.

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
    PendingCollectives,
    all_to_all,
    exchange,
    gather_padded,
    gather_weights,
    join_padded,
    reduce_scatter_bags,
    spread_tokens,
)
from megamem.parallel.row_shard import RowShard
from megamem.spec import Wire

# at 8 ranks a fixed size costs 33 KiB per token against 28.7 KiB, and no wait; beyond, it grows
# with the number of ranks (2048-wide bf16 rows, 128 lookups)
ALLGATHER_UP_TO = 8


@dataclass(frozen=True)
class RoutingPlan:
    """The integer facts of one exchange of lookups."""

    sent_M: Tensor
    """Row ids as they travel: of the whole table in the form allgather, of the owner's shard in
    the form alltoall."""
    shard: RowShard
    pending: PendingCollectives
    """Lookups under way."""
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
    pending = PendingCollectives()
    gathered = gather_padded(row_ids_TL, num_bags, group, fill=-1, pending=pending)
    return RoutingPlan(
        sent_M=gathered.flatten(),
        shard=shard,
        pending=pending,
        offsets=torch.arange(world_size * num_bags + 1, device=row_ids_TL.device) * lookups,
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
    pending = PendingCollectives()
    sent_M = exchange(local_J[order_J], send, recv, group, pending)
    return RoutingPlan(
        sent_M=sent_M,
        shard=shard,
        pending=pending,
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
    """Send each lookup's weight where plan_routing sends its row id -> weights_M."""
    if plan.wire == "allgather":
        size = plan.bag_counts[0]
        return gather_weights(weights_TL, size, plan.group, plan.pending).flatten()
    assert plan.order_J is not None and plan.send is not None and plan.recv is not None
    weights_J = weights_TL.flatten()[plan.order_J]
    return all_to_all(weights_J, plan.send, plan.recv, plan.group, plan.pending)


def all_gather_tokens(plan: RoutingPlan, x_TD: Tensor) -> Tensor:
    """Send every token to all owners; they arrive with the lookups. For tokens_of_bags."""
    return spread_tokens(x_TD, plan.bag_counts, plan.group, plan.pending)


def tokens_of_bags(plan: RoutingPlan, gathered: Tensor) -> Tensor:
    """What all_gather_tokens() sent, once it has arrived: the token of every bag -> x_GD."""
    return join_padded(gathered, plan.bag_counts)


def arrive(plan: RoutingPlan) -> Tensor:
    """Wait for the lookups -> row_ids_M, as rows of this rank's shard; -1 reads nothing."""
    plan.pending.wait()
    if plan.wire == "alltoall":
        return plan.sent_M.long()
    row_ids_M = plan.sent_M.long()
    local_M = row_ids_M - plan.shard.start
    here_M = (row_ids_M >= 0) & (local_M >= 0) & (local_M < plan.shard.num_local)
    return torch.where(here_M, local_M, -1)


def combine(plan: RoutingPlan, bags_GV: Tensor) -> Tensor:
    """Send every partial bag home and add up what the owners returned -> out_TV."""
    return reduce_scatter_bags(bags_GV, plan.bag_counts, plan.group)[: plan.num_tokens]
