"""Sends lookups to the ranks that hold their rows, and the partial bags back.

    plan      = plan_routing(row_ids_TL, ...)     start to send row ids to the owners of the rows
    weights_M = dispatch(plan, weights_TL)        start to send the weights likewise
    row_ids_M = receive(plan)                     wait for both; ids are rows of this rank's shard
    bags_GV   = embedding_bag(values_rV, ...)     sum the rows of this rank; nothing is sent
    out_TV    = combine(plan, bags_GV)            return partial bags to the ranks of the tokens

Other work can overlap with the exchange between plan_routing and receive. Where the owners of rows
need the tokens as well, all_gather_tokens sends them; after receive, tokens_of_bags returns them.

One of two collectives (`--memory-wire`) sends the lookups:

    alltoall    sends each lookup to the owner of its row alone, after the counts were exchanged.
                The host waits for the counts. M is the number of lookups received.
    allgather   sends every lookup to every rank. Sizes are fixed, so the host never waits, and the
                exchange can be captured in a CUDA graph. Lookups of other ranks' rows get row -1,
                which reads nothing.

The plan is a value, not the state of a module: dispatch and combine are pure functions of it.

Letters: T tokens on this rank, L lookups per token, J = T * L local lookups, M lookups received
here, W ranks of the group, G bags (the tokens of all ranks), D hidden size, V row width, r rows on
this rank.
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
    gather_bag_tokens,
    gather_padded,
    gather_weights,
    join_padded,
    reduce_scatter_bags,
)
from megamem.parallel.row_shard import RowShard
from megamem.spec import Wire

# At 8 ranks, with bf16 rows of width 2048 and 128 lookups, a rank sends 33 KiB per token with
# allgather and 28.7 KiB with alltoall, which also waits for the counts. The cost of allgather grows
# with the number of ranks.
ALLGATHER_UP_TO = 8


@dataclass(frozen=True)
class RoutingPlan:
    """One exchange of lookups: what is sent where, and the bags on the receiving ranks."""

    sent_M: Tensor
    """Row ids as sent: rows of the owner's shard with alltoall, of the unsharded table with
    allgather. They may be read after receive() has waited for them."""
    shard: RowShard
    """The rows of this rank."""
    pending: PendingCollectives
    """The collectives that receive() waits for."""
    offsets: Tensor
    """[G + 1], where the lookups of each bag start; the last entry is M."""
    bag_counts: list[int]
    """Number of bags of each source rank; their sum is G."""
    num_tokens: int
    """T, the number of tokens of this rank."""
    group: ProcessGroup | None
    """The ranks that hold the other rows."""
    wire: Wire
    """The collective that sends the lookups."""
    order_J: Tensor | None = None
    """alltoall: the permutation that sorts the local lookups by owner."""
    send: list[int] | None = None
    """alltoall: number of lookups sent to each rank."""
    recv: list[int] | None = None
    """alltoall: number of lookups received from each rank."""


def choose_wire(wanted: Literal["auto", "alltoall", "allgather"], world_size: int) -> Wire:
    """Return the collective for `world_size` ranks; auto is allgather up to 8 ranks."""
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
    """Start to send row ids to the owners of the rows, and return the plan of the exchange.

    Args:
        row_ids_TL: row ids of the unsharded table.
        shard: the rows of this rank.
        group: the ranks that hold the other rows.
        token_counts: T of every rank of the group; the counts may differ, and may be 0.
        wire: the collective that sends the lookups.
    """
    # int32 ids, which all but the largest tables allow, halve the bytes sent
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
    # stable, so that the lookups for one owner stay in token order and bags are contiguous there
    order_J = owners_J.argsort(stable=True)

    # 1. exchange how many lookups of each token an owner gets, which are the sizes of its bags
    sizes_WT = torch.bincount(owners_J * num_tokens + tokens_J, minlength=world_size * num_tokens)
    sizes_G = exchange(sizes_WT, [num_tokens] * world_size, token_counts, group)
    send = [int(part.sum()) for part in sizes_WT.cpu().split([num_tokens] * world_size)]
    recv = [int(part.sum()) for part in sizes_G.cpu().split(token_counts)]

    # 2. send the row ids, as rows of the owner's shard
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
    """Start to send each lookup's weight where plan_routing sends its row id.

    Returns:
        weights_M, which may be read after receive().
    """
    if plan.wire == "allgather":
        size = plan.bag_counts[0]
        return gather_weights(weights_TL, size, plan.group, plan.pending).flatten()
    assert plan.order_J is not None and plan.send is not None and plan.recv is not None
    weights_J = weights_TL.flatten()[plan.order_J]
    return all_to_all(weights_J, plan.send, plan.recv, plan.group, plan.pending)


def all_gather_tokens(plan: RoutingPlan, x_TD: Tensor) -> Tensor:
    """Start to send every token to all ranks of the group.

    Returns:
        [W, max(bag_counts), D] for tokens_of_bags(), which may be read after receive().
    """
    return gather_bag_tokens(x_TD, plan.bag_counts, plan.group, plan.pending)


def tokens_of_bags(plan: RoutingPlan, gathered: Tensor) -> Tensor:
    """Return x_GD, the token of every bag, from the result of all_gather_tokens()."""
    return join_padded(gathered, plan.bag_counts)


def receive(plan: RoutingPlan) -> Tensor:
    """Wait for the lookups; return row_ids_M, int64 rows of this rank's shard or -1 for none."""
    plan.pending.wait()
    if plan.wire == "alltoall":
        return plan.sent_M.long()
    row_ids_M = plan.sent_M.long()
    local_M = row_ids_M - plan.shard.start
    here_M = (row_ids_M >= 0) & (local_M >= 0) & (local_M < plan.shard.num_local)
    return torch.where(here_M, local_M, -1)


def combine(plan: RoutingPlan, bags_GV: Tensor) -> Tensor:
    """Send the partial bags to the ranks of their tokens; return out_TV, their sums."""
    return reduce_scatter_bags(bags_GV, plan.bag_counts, plan.group)[: plan.num_tokens]
