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
                The host waits once, for the counts. M is the number of lookups received.
    allgather   sends every lookup to every rank. Sizes are fixed, so the host never waits, and the
                exchange can be captured in a CUDA graph. Lookups of other ranks' rows get row -1,
                which reads nothing.

Where one rank holds all rows, lookups, sums and their gradients are passed on as they are: the only
thing that is computed are the offsets of the bags.

The plan is a value, not the state of a module: dispatch and combine are pure functions of it.

Letters: T tokens on this rank, L lookups per token, J = T * L local lookups, M lookups received
here, W ranks of the group, G bags (the tokens of all ranks), D hidden size, V row width, r rows on
this rank.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megamem.parallel.collectives import (
    HostCopy,
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

COUNT_DTYPE = torch.int32
"""Dtype in which alltoall sends the number of lookups of a token."""


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
    """The collective that sends the lookups, if there are other ranks."""
    order_J: Tensor | None = None
    """alltoall: the permutation that sorts the local lookups by owner."""
    send: list[int] | None = None
    """alltoall: number of lookups sent to each rank."""
    recv: list[int] | None = None
    """alltoall: number of lookups received from each rank."""

    @property
    def all_present(self) -> bool:
        """Whether every received lookup reads a row of this rank, so that no row id is -1."""
        return self.group is None or self.wire == "alltoall"

    @property
    def equal_bags(self) -> bool:
        """Whether all bags have the same number of lookups."""
        return self.group is None or self.wire == "allgather"

    @property
    def expected(self) -> int:
        """About how many of the received lookups read a row of this rank."""
        if self.all_present:
            return len(self.sent_M)
        return len(self.sent_M) * self.shard.num_local // self.shard.num_rows


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
        row_ids_TL: row ids of the unsharded table, none negative; they are sent in their dtype.
        shard: the rows of this rank.
        group: the ranks that hold the other rows; None if there are none.
        token_counts: T of every rank of the group; the counts may differ, and may be 0.
        wire: the collective that sends the lookups.
    """
    if group is None:
        return _plan_alone(row_ids_TL, shard, wire)
    plan = _plan_allgather if wire == "allgather" else _plan_alltoall
    return plan(row_ids_TL, shard, group, token_counts)


def _plan_alone(row_ids_TL: Tensor, shard: RowShard, wire: Wire) -> RoutingPlan:
    (num_tokens, lookups), num_lookups = row_ids_TL.shape, row_ids_TL.numel()
    return RoutingPlan(
        sent_M=row_ids_TL.flatten(),
        shard=shard,
        pending=PendingCollectives(),
        offsets=torch.arange(0, num_lookups + 1, lookups, device=row_ids_TL.device),
        bag_counts=[num_tokens],
        num_tokens=num_tokens,
        group=None,
        wire=wire,
    )


def _plan_allgather(
    row_ids_TL: Tensor, shard: RowShard, group: ProcessGroup, token_counts: list[int]
) -> RoutingPlan:
    world_size, lookups = len(token_counts), row_ids_TL.shape[1]
    num_bags = max(token_counts)
    num_lookups = world_size * num_bags * lookups
    pending = PendingCollectives()
    gathered = gather_padded(row_ids_TL, num_bags, group, fill=-1, pending=pending)
    return RoutingPlan(
        sent_M=gathered.flatten(),
        shard=shard,
        pending=pending,
        offsets=torch.arange(0, num_lookups + 1, lookups, device=row_ids_TL.device),
        bag_counts=[num_bags] * world_size,
        num_tokens=len(row_ids_TL),
        group=group,
        wire="allgather",
    )


def _plan_alltoall(
    row_ids_TL: Tensor, shard: RowShard, group: ProcessGroup, token_counts: list[int]
) -> RoutingPlan:
    num_tokens, world_size, device = len(row_ids_TL), len(token_counts), row_ids_TL.device
    owners_TL = shard.owner(row_ids_TL)

    # 1. exchange how many lookups of each token an owner gets, which are the sizes of its bags
    tokens_T1 = torch.arange(num_tokens, device=device).unsqueeze(1)
    bags_J = (owners_TL * num_tokens + tokens_T1).flatten()
    sizes_WT = torch.zeros(world_size * num_tokens, dtype=COUNT_DTYPE, device=device)
    sizes_WT.scatter_add_(0, bags_J, sizes_WT.new_ones(()).expand_as(bags_J))
    sizes_G = exchange(sizes_WT, [num_tokens] * world_size, token_counts, group)
    offsets = torch.zeros(len(sizes_G) + 1, dtype=torch.int64, device=device)
    torch.cumsum(sizes_G, 0, out=offsets[1:])

    # 2. start to copy to the host how many lookups each rank gets from here and sends here
    send_W = sizes_WT.view(world_size, num_tokens).sum(1)
    ends_W = torch.stack([offsets[bag] for bag in accumulate(token_counts)])
    counts = HostCopy(torch.cat((send_W, ends_W)))

    # 3. sort by owner; stable, so that lookups stay in token order and bags are contiguous there.
    # Narrow keys take fewer passes of the sort
    key = torch.uint8 if world_size <= 2**8 else torch.int16
    owners_J = owners_TL.flatten()
    order_J = owners_J.to(key).argsort(stable=True)
    local_J = shard.local_on(owners_J, row_ids_TL.flatten()).to(row_ids_TL.dtype)
    local_J = local_J.index_select(0, order_J)

    # 4. send the row ids, as rows of the owner's shard
    numbers = counts.numbers()
    send, ends = numbers[:world_size], numbers[world_size:]
    recv = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    pending = PendingCollectives()
    return RoutingPlan(
        sent_M=exchange(local_J, send, recv, group, pending),
        shard=shard,
        pending=pending,
        offsets=offsets,
        bag_counts=token_counts,
        num_tokens=num_tokens,
        group=group,
        wire="alltoall",
        order_J=order_J,
        send=send,
        recv=recv,
    )


class _Permute(torch.autograd.Function):
    """Forward: gather by a permutation. Backward: gather by its inverse, where autograd's own
    would scatter, with a sort to make it repeatable."""

    @staticmethod
    def forward(ctx: Any, x_J: Tensor, order_J: Tensor) -> Tensor:
        if ctx.needs_input_grad[0]:
            # 4 bytes per lookup are kept for the backward
            places = torch.arange(len(order_J), dtype=torch.int32, device=order_J.device)
            ctx.save_for_backward(torch.empty_like(places).scatter_(0, order_J, places))
        return x_J.index_select(0, order_J)

    @staticmethod
    def backward(ctx: Any, grad_J: Tensor) -> tuple[Tensor, None]:
        (inverse_J,) = ctx.saved_tensors
        return grad_J.index_select(0, inverse_J), None


def dispatch(plan: RoutingPlan, weights_TL: Tensor) -> Tensor:
    """Start to send each lookup's weight where plan_routing sends its row id.

    Returns:
        weights_M, which may be read after receive().
    """
    if plan.group is None:
        return weights_TL.flatten()
    if plan.wire == "allgather":
        size = plan.bag_counts[0]
        return gather_weights(weights_TL, size, plan.group, plan.pending).flatten()
    assert plan.order_J is not None and plan.send is not None and plan.recv is not None
    weights_J = _Permute.apply(weights_TL.flatten(), plan.order_J)
    return all_to_all(weights_J, plan.send, plan.recv, plan.group, plan.pending)


def all_gather_tokens(plan: RoutingPlan, x_TD: Tensor) -> Tensor:
    """Start to send every token to all ranks of the group.

    Returns:
        [W, max(bag_counts), D] for tokens_of_bags(), which may be read after receive().
    """
    if plan.group is None:
        return x_TD.unsqueeze(0)
    return gather_bag_tokens(x_TD, plan.bag_counts, plan.group, plan.pending)


def tokens_of_bags(plan: RoutingPlan, gathered: Tensor) -> Tensor:
    """Return x_GD, the token of every bag, from the result of all_gather_tokens()."""
    return join_padded(gathered, plan.bag_counts)


def receive(plan: RoutingPlan) -> Tensor:
    """Wait for the lookups; return row_ids_M, rows of this rank's shard or -1 for none.

    They have the dtype in which they were sent.
    """
    plan.pending.wait()
    if plan.all_present:
        return plan.sent_M
    # padding, which is -1, and rows of ranks before this one get negative ids
    local_M = (plan.sent_M - plan.shard.start).clamp_(min=-1)
    return local_M.masked_fill_(local_M >= plan.shard.num_local, -1)


def combine(plan: RoutingPlan, bags_GV: Tensor) -> Tensor:
    """Send the partial bags to the ranks of their tokens; return out_TV, their sums."""
    if plan.group is None:
        return bags_GV
    return reduce_scatter_bags(bags_GV, plan.bag_counts, plan.num_tokens, plan.group)
