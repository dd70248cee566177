"""Sends lookups to the ranks that hold their rows, over the axes of a grid.

    pieces            = plan_routing(row_ids_TL, ...)       one RoutingPlan per piece of the tokens
    rows_M, weights_M = yield from send_lookups(plan, ...)  ids are rows of this rank's shard
    bags_Gv           = embedding_bag(values_rv, ...)       sum the rows of this rank
    out_TV            = yield from send_home(plan, bags_Gv) (megamem.parallel.homeward)

A token has one bag, or a bag for each of Y virtual blocks over the R rows: an id g of Y R then
stands for row g % R, of block g // R, and the read-outs that come home are those of [T * Y] bags.

The functions with a `yield` are generators that yield whenever something is on its way, so that
their caller can do other work, such as another piece (megamem.parallel.pieces). One of two
collectives (`--memory-wire`) sends the lookups:

    alltoall    1. local rows: inside the node, to the rank of the row's shard
                2. node rows: to the node that holds the row
                3. node columns: to all nodes that hold columns of the row, once to a node
                4. local columns: to all ranks of the node that hold columns of the row
                First the numbers of lookups go the same way, for which the host waits once.
    allgather   1. across: to the rank at the same place of every node
                2. inside: to all ranks of the node
                Sizes are fixed, so the host never waits, and the exchange can be captured in a CUDA
                graph. Lookups of other ranks' rows get row -1, which reads nothing.

An axis of one rank has no hop. Where one rank holds all rows and columns, lookups, sums and their
gradients are passed on as they are: only the offsets of the bags are computed.

Routing inside the node first means that a lookup crosses to the nodes that share its row's columns
once each, from the rank that has the place of the row's shard. An axis where lookups are routed
makes the host wait for their number however the other axes send theirs, and gathering over an axis
of rows never sends fewer bytes than routing does, so a wire is that of all axes.
megamem.parallel.choices chooses it.

A padded all-to-all, with room for f times the mean number of lookups of a rank, would do without
that wait. It is left out by these numbers, for 8 row ranks in a node, 8192 tokens, 128 lookups and
rows of 2048 bf16 numbers, forward and backward:

                         alltoall    padded, f = 1.25    padded, f = 2    allgather
    KiB sent per token   57.3        57.6                58.6             66.5
    lookups that arrive  1 J         1.25 J              2 J              8 J

Of 8 shards the most popular takes 1.05 times the mean where the use of rows falls as Zipf 0.8, and
1.9 times at Zipf 1, so f = 2 would be needed. It would save the wait, an estimated 0.25 ms a layer,
and take 0.13 ms for lookups that are none: together 5 % of an exchange of 2.6 ms. But an exact
result needs a way out where a shard takes more than f: all ranks then have to agree to repeat the
exchange, and the host waits to learn whether they do, as it waits for numbers of lookups now. It
would win if the device alone dealt with overflow, in a fixed number of rounds.

Letters: T tokens on this rank, L lookups per token, J = T * L local lookups, M lookups received
here, W ranks of the group, G bags (of the tokens of all ranks), D hidden size, V row width, R rows
of the table, r on this rank, N pieces, O cores (weights of a lookup), Y blocks, E tokens of all
ranks.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from megamem.parallel.blocks import Blocks
from megamem.parallel.collectives import HostCopy
from megamem.parallel.hops import AllToAll, Gather, Hop, depart, move_blocks, reorder
from megamem.parallel.memory_group import (
    LOCAL_COLUMN,
    LOCAL_ROW,
    NODE_COLUMN,
    NODE_ROW,
    MemoryGroup,
)
from megamem.parallel.row_shard import RowShard, even_counts, id_dtype
from megamem.spec import Wire

NARROW_ROWS = 2**24
"""Ids of this many rows are sent to other nodes in 3 bytes."""


def count_dtype(lookups: int) -> torch.dtype:
    """Return the dtype in which alltoall sends the number of lookups of a token."""
    return torch.uint8 if lookups < 2**8 else torch.int32


@dataclass(frozen=True)
class LookupHop:
    """One hop of ids and weights."""

    hop: Hop
    narrow: bool
    """Whether ids are sent in 3 bytes."""
    after: tuple[list[int], list[int]] | None = None
    """Numbers of rows of blocks that arrived, and the order to bring them into."""
    modulo: int = 0
    """If not zero, ids modulo this number are sent."""


class SentBytes:
    """Bytes that a rank sends to others, forward and backward."""

    total = 0

    def add(self, hop: Hop, width: int, forward: int, backward: int) -> None:
        """Count a hop of rows of `width` numbers, with these bytes per number."""
        numbers = hop.sent_numbers(width)
        self.total += numbers[0] * forward + numbers[1] * backward


@dataclass
class ArrivedBlocks:
    """Where the bags of virtual blocks start, which allgather's receivers find in the ids."""

    offsets: Tensor | None = None
    """[G + 1], once the lookups have arrived."""

    def find(self, ids_EL: Tensor, num_rows: int, blocks: int) -> Tensor:
        """Note where the bags start, and return the rows of the ids.

        Args:
            ids_EL: ids of the tokens of all ranks, those of a token in the order of blocks.
            num_rows: R, the rows of each block.
            blocks: Y.
        """
        tokens, lookups = ids_EL.shape
        # the ids of a token are not in order, but those below the first of a block come first
        firsts_Y = torch.arange(blocks, dtype=ids_EL.dtype, device=ids_EL.device) * num_rows
        starts_EY = torch.searchsorted(ids_EL, firsts_Y.repeat(tokens, 1))
        token_E1 = torch.arange(tokens, device=ids_EL.device).unsqueeze(1)
        self.offsets = starts_EY.new_full((tokens * blocks + 1,), tokens * lookups)
        self.offsets[:-1] = (starts_EY + token_E1 * lookups).flatten()
        return ids_EL % num_rows


@dataclass(frozen=True)
class RoutingPlan:
    """The exchange of one piece of the lookups: what is sent where, and the bags that arrive."""

    ids: Tensor
    """Row ids to send: [t, L] of t tokens, or, with alltoall, flat and sorted by owner."""
    hops: Sequence[LookupHop]
    shard: RowShard
    """The rows of this rank."""
    tokens: Blocks
    """Whose tokens the received lookups are of."""
    blocks: int
    """Y, bags per token."""
    sizes_G: Tensor | None
    """alltoall: number of lookups of each bag."""
    lookups: int
    """L, lookups per token."""
    routed: bool
    """Whether every lookup was sent to the owner of its row alone."""
    sent: SentBytes
    """Counts the bytes of all pieces."""
    arrived: ArrivedBlocks
    """allgather, with several blocks: where the bags start."""

    @property
    def bags(self) -> Blocks:
        """Whose the received bags are; those of a token follow each other."""
        return self.tokens.times(self.blocks)

    @property
    def all_present(self) -> bool:
        """Whether every received lookup reads a row of this rank, so that no row id is -1."""
        return self.routed or self.shard.world_size == 1

    @property
    def equal_bags(self) -> bool:
        """Whether all bags have the same number of lookups."""
        return self.sizes_G is None and self.blocks == 1

    def offsets(self) -> Tensor:
        """Return [G + 1], where the lookups of each bag start; the last entry is M.

        With several blocks, allgather has to have brought the lookups before.
        """
        if self.equal_bags:
            end = self.bags.total * self.lookups
            return torch.arange(0, end + 1, self.lookups, device=self.ids.device)
        if self.sizes_G is None:
            assert self.arrived.offsets is not None
            return self.arrived.offsets
        offsets = torch.zeros(len(self.sizes_G) + 1, dtype=torch.int64, device=self.ids.device)
        torch.cumsum(self.sizes_G, 0, out=offsets[1:])
        return offsets

    def expected(self, received: int) -> int:
        """Return about how many of the received lookups read a row of this rank."""
        if self.all_present:
            return received
        return received * self.shard.num_local // self.shard.num_rows


@dataclass(frozen=True)
class Routing:
    """The plans of all pieces of the lookups of one pass."""

    plans: list[RoutingPlan]
    tokens: list[int]
    """Number of tokens of this rank in each piece."""
    order_J: Tensor | None
    """alltoall: the permutation that sorts the local lookups by piece and owner."""
    sent: SentBytes
    """The bytes of lookups, numbers of lookups and sums."""

    def cut(self, weights_TL: Tensor) -> Sequence[Tensor]:
        """Return the weights of the lookups of each piece, in the order of its ids.

        Args:
            weights_TL: a weight of each lookup, or [T, L, O], O of them.
        """
        if self.order_J is None:
            return cut(weights_TL, self.tokens)
        lookups = weights_TL.shape[1]
        weights_J = _Permute.apply(weights_TL.flatten(0, 1), self.order_J)
        return cut(weights_J, [tokens * lookups for tokens in self.tokens])


def cut(x: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    """Split rows; x itself if there is one part."""
    return [x] if len(counts) == 1 else x.split(list(counts))


def plan_routing(
    row_ids_TL: Tensor,
    shard: RowShard,
    group: MemoryGroup,
    token_counts: Sequence[int],
    wire: Wire,
    pieces: int = 1,
    blocks: int = 1,
) -> Routing:
    """Return the plans of an exchange. The host waits once if lookups are routed.

    Args:
        row_ids_TL: row ids of the unsharded table, none negative; with Y blocks, ids below Y R,
            those of each token in the order of their blocks.
        shard: the rows of this rank.
        group: the ranks that share the table.
        token_counts: T of every member of the group; the counts may differ, and may be 0.
        wire: the collective that sends the lookups.
        pieces: N, the number of pieces of the tokens; the piece of a token depends on its place
            among those of its rank.
        blocks: Y, the virtual blocks over the rows, each with a bag of every token.
    """
    grid = group.grid
    by_piece = list(zip(*(even_counts(count, pieces) for count in token_counts), strict=True))
    starts = [Blocks(grid, tokens, (group.member,)) for tokens in by_piece]
    plan = _plan_alltoall if grid.routes(wire) else _plan_allgather
    return plan(row_ids_TL, shard, group, starts, blocks)


def _plan_allgather(
    row_ids_TL: Tensor, shard: RowShard, group: MemoryGroup, starts: list[Blocks], blocks: int
) -> Routing:
    own, sent = [start.total for start in starts], SentBytes()
    plans = []
    for ids, start in zip(cut(row_ids_TL, own), starts, strict=True):
        gathers, tokens = gather_hops(group, start)
        narrow = blocks * shard.num_rows <= NARROW_ROWS
        hops = [LookupHop(hop, narrow and hop.group is group.across) for hop in gathers]
        plans.append(
            RoutingPlan(
                ids, hops, shard, tokens, blocks, None, ids.shape[1], False, sent, ArrivedBlocks()
            )
        )
    return Routing(plans, own, None, sent)


@lru_cache(maxsize=256)
def gather_hops(group: MemoryGroup, start: Blocks) -> tuple[list[Hop], Blocks]:
    """Return the hops that bring the rows of all members to all, and the blocks in their order."""
    grid = group.grid
    hops: list[Hop] = []
    nodes = start.along(NODE_COLUMN).along(NODE_ROW)
    if group.across is not None:
        hops.append(Gather(group.across, nodes.counts))
    bags = nodes.along(LOCAL_COLUMN).along(LOCAL_ROW)
    if group.inside is not None:
        hops.append(Gather(group.inside, _sums(bags.counts, grid.nodes)))
    return hops, bags


def _plan_alltoall(
    row_ids_TL: Tensor, shard: RowShard, group: MemoryGroup, starts: list[Blocks], blocks: int
) -> Routing:
    grid, device, lookups = group.grid, row_ids_TL.device, row_ids_TL.shape[1]
    node_rows, classes = grid.node_rows, grid.row_ranks
    own, sent = [start.total for start in starts], SentBytes()
    num_tokens, num_bags = sum(own), sum(own) * blocks
    rows_TL = row_ids_TL
    if blocks > 1:
        # the table, and so its row ids, may be narrower than the ids of all blocks
        rows_TL = (row_ids_TL % shard.num_rows).to(id_dtype(shard.num_rows))
    owners_TL = shard.owner(rows_TL)
    # local rows first, as the first hop is inside the node
    class_TL = owners_TL % grid.local_rows * node_rows + owners_TL // grid.local_rows

    # 1. send how many lookups of each bag are of each shard of rows: the sizes of the bags
    tokens_T1 = torch.arange(num_tokens, device=device).unsqueeze(1)
    sizes = torch.zeros(classes * num_bags, dtype=torch.int32, device=device)
    bags_TL = (class_TL * num_bags).add_(tokens_T1 * blocks)
    if blocks > 1:
        bags_TL += row_ids_TL // shard.num_rows
    bags_J = bags_TL.flatten()
    sizes.scatter_add_(0, bags_J, sizes.new_ones(()).expand_as(bags_J))
    del bags_TL, bags_J
    bags = [start.times(blocks) for start in starts]
    counts = _Counts(sizes.to(count_dtype(lookups)), group, bags, sent)
    host = HostCopy(counts.sums)

    # 2. sort by piece and owner; stable, so that lookups stay in token order and bags are
    # contiguous there. Narrow keys take fewer passes of the sort
    if len(own) > 1:
        piece_T1 = torch.cat(
            [tokens_T1.new_full((count, 1), piece) for piece, count in enumerate(own)]
        )
        class_TL += piece_T1 * classes
    keys = classes * len(own)
    dtype = torch.uint8 if keys <= 2**8 else torch.int16 if keys <= 2**15 else torch.int32
    key_J = class_TL.flatten().to(dtype)
    del class_TL
    order_J = key_J.argsort(stable=True)
    step = -(-shard.num_rows // classes)
    local_TL = shard.local_on(owners_TL, rows_TL)
    if node_rows > 1 and grid.local_rows > 1:
        # the rank that passes them on finds the node by its rows
        local_TL += owners_TL // grid.local_rows * step
    local_J = local_TL.flatten().to(rows_TL.dtype).index_select(0, order_J)
    del owners_TL, rows_TL, key_J, local_TL

    # 3. the hops of every piece
    stages = counts.stages(host.numbers())
    ids = cut(local_J, [tokens * lookups for tokens in own])
    plans = []
    for piece in range(len(starts)):
        hops = _routed_hops(group, [stage[piece] for stage in stages], step)
        tokens = replace(starts[piece], members=counts.members)
        sizes_G = counts.sizes_of(piece)
        plans.append(
            RoutingPlan(
                ids[piece],
                hops,
                shard,
                tokens,
                blocks,
                sizes_G,
                lookups,
                True,
                sent,
                ArrivedBlocks(),
            )
        )
    return Routing(plans, own, order_J, sent)


class _Counts:
    """Sends the numbers of lookups of each bag along the hops that the lookups will take.

    sums     how many lookups there are in each block, of each piece, at each stage of the way, all
             in one tensor
    members  whose the bags are that arrive
    """

    def __init__(
        self, sizes: Tensor, group: MemoryGroup, starts: list[Blocks], sent: SentBytes
    ) -> None:
        """Send the sizes.

        Args:
            sizes: the number of lookups of each shard of rows and bag: local row, node row, bag.
            group: the ranks that share the table.
            starts: this rank's bags of each piece.
            sent: counts the bytes.
        """
        grid, itemsize = group.grid, sizes.element_size()
        rows, node_rows = grid.local_rows, grid.node_rows
        self._splits = [start.tokens for start in starts]
        self._sums: list[Tensor] = []
        tokens = tuple(sum(counts) for counts in zip(*self._splits, strict=True))
        me = Blocks(grid, tokens, starts[0].members)

        def moved(hop: Hop) -> Tensor:
            sent.add(hop, 1, itemsize, 0)
            return hop.send(sizes)()

        # blocks: local row of the shard, node row of the shard
        here = replace(me, members=me.members * grid.row_ranks)
        self._note(sizes, here)
        if group.local_rows is not None:
            # blocks: local row of the source, node row of the shard
            here = replace(me, members=me.members * node_rows).along(LOCAL_ROW)
            own, counts = me.total * node_rows, _sums(here.counts, node_rows)
            sizes = moved(AllToAll(group.local_rows, [own] * rows, counts))
            self._note(sizes, here)
        if group.node_rows is not None:
            sizes = move_blocks(sizes, here.counts, _by_node(rows, node_rows))
            # blocks: node row of the source, local row of the source
            own, here = (
                here.total // node_rows,
                me.along(LOCAL_ROW).along(NODE_ROW),
            )
            hop = AllToAll(group.node_rows, [own] * node_rows, _sums(here.counts, rows))
            sizes = moved(hop)
            self._note(sizes, here)
        for axis, axis_group in (
            (NODE_COLUMN, group.node_columns),
            (LOCAL_COLUMN, group.local_columns),
        ):
            if axis_group is not None:
                size = len(here.members)
                here = here.along(axis)
                sizes = moved(Gather(axis_group, _sums(here.counts, size)))
                self._note(sizes, here)
        self.members = here.members
        self._sizes = sizes
        self.sums = torch.cat(self._sums)

    def _note(self, sizes: Tensor, here: Blocks) -> None:
        lengths = [counts[member] for member in here.members for counts in self._splits]
        self._sums.append(_block_sums(sizes, lengths))

    def stages(self, numbers: list[int]) -> list[list[list[int]]]:
        """Return the sums by stage, piece and block."""
        pieces, ends = len(self._splits), accumulate((len(sums) for sums in self._sums), initial=0)
        return [
            [numbers[start + piece : end : pieces] for piece in range(pieces)]
            for start, end in pairwise(ends)
        ]

    def sizes_of(self, piece: int) -> Tensor:
        """Return the size of each bag of a piece."""
        pieces = len(self._splits)
        if pieces == 1:
            return self._sizes
        lengths = [counts[member] for member in self.members for counts in self._splits]
        return torch.cat(self._sizes.split(lengths)[piece::pieces])


def _block_sums(x: Tensor, lengths: list[int]) -> Tensor:
    """Return the sum of each block of consecutive numbers."""
    if len(set(lengths)) == 1:
        return x.view(len(lengths), lengths[0]).sum(1)
    ends = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(x, 0, out=ends[1:])
    return torch.stack([ends[end] for end in accumulate(lengths, initial=0)]).diff()


def _routed_hops(group: MemoryGroup, stages: list[list[int]], step: int) -> list[LookupHop]:
    """Return the hops of a piece from the numbers of lookups of _Counts, stage by stage."""
    grid, hops, left = group.grid, [], iter(stages)
    node_rows, rows = grid.node_rows, grid.local_rows
    narrow, numbers = step <= NARROW_ROWS, next(left)
    if group.local_rows is not None:
        by_rank, arrived = _sums(numbers, node_rows), next(left)
        # the lookups of every source come by node, and leave by node for all sources
        order = _by_node(rows, node_rows)
        hop = AllToAll(group.local_rows, by_rank, _sums(arrived, node_rows))
        hops.append(LookupHop(hop, False, (arrived, order) if node_rows > 1 else None))
        numbers = [arrived[block] for block in order]
    if group.node_rows is not None:
        arrived = next(left)
        hop = AllToAll(group.node_rows, _sums(numbers, rows), _sums(arrived, rows))
        hops.append(LookupHop(hop, narrow, modulo=step if rows > 1 else 0))
        numbers = arrived
    if group.node_columns is not None:
        size, numbers = len(numbers), next(left)
        hops.append(LookupHop(Gather(group.node_columns, _sums(numbers, size)), narrow))
    if group.local_columns is not None:
        size, numbers = len(numbers), next(left)
        hops.append(LookupHop(Gather(group.local_columns, _sums(numbers, size)), False))
    return hops


def _by_node(rows: int, node_rows: int) -> list[int]:
    """Return the order that makes blocks of (local row, node row) ones of (node row, local row)."""
    return [row * node_rows + node for node in range(node_rows) for row in range(rows)]


def _sums(numbers: list[int], size: int) -> list[int]:
    return [sum(numbers[at : at + size]) for at in range(0, len(numbers), size)]


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


def send_lookups(
    plan: RoutingPlan, weights: Tensor, wire: torch.dtype | None = None
) -> Generator[None, None, tuple[Tensor, Tensor]]:
    """Send the lookups of a piece to the owners of their rows; yield while they are on the way.

    Args:
        plan: the plan of the piece.
        weights: the weights of its lookups, from Routing.cut().
        wire: dtype in which weights are sent, if not their own.

    Returns:
        row_ids_M: rows of this rank's shard or -1 for none.
        weights_M: the weight of each lookup; [M, O], if it has O of them.
    """
    ids, width = plan.ids, plan.lookups if plan.ids.dim() > 1 else 1
    cores = weights.shape[ids.dim()] if weights.dim() > ids.dim() else 1
    for step in plan.hops:
        dtype = ids.dtype
        if step.modulo:
            ids = ids % step.modulo
        finish_ids = step.hop.send(_narrow(ids) if step.narrow else ids)
        transfer = depart(weights, step.hop, wire)
        forward = (3 if step.narrow else ids.element_size()) + cores * transfer.wire.itemsize
        plan.sent.add(step.hop, width, forward, cores * weights.element_size())
        yield
        ids, weights = finish_ids(), transfer.arrive()
        if step.narrow:
            ids = _widen(ids, dtype)
        if step.after is not None:
            ids, weights = move_blocks(ids, *step.after), reorder(weights, *step.after)
    weights_M = weights.flatten(0, ids.dim() - 1)
    if plan.blocks > 1 and not plan.routed:
        ids = plan.arrived.find(ids, plan.shard.num_rows, plan.blocks)
    ids = ids.flatten()
    if plan.all_present:
        return ids, weights_M
    # rows of ranks before this one get negative ids
    local_M = (ids - plan.shard.start).clamp_(min=-1)
    return local_M.masked_fill_(local_M >= plan.shard.num_local, -1), weights_M


def send_tokens(
    plan: RoutingPlan, group: MemoryGroup, x: Tensor, sent: SentBytes
) -> Generator[None, None, Tensor]:
    """Send the tokens of a piece to all ranks of the group; yield while they are on the way.

    Args:
        plan: the plan of the piece.
        group: the ranks that share the table.
        x: the tokens of this rank.
        sent: counts the bytes.

    Returns:
        x_ED, the tokens of all ranks, in the order of their bags.
    """
    start = replace(plan.tokens, members=(group.member,))
    hops, blocks = gather_hops(group, start)
    for hop in hops:
        transfer = depart(x, hop)
        sent.add(hop, x.shape[1], x.element_size(), x.element_size())
        yield
        x = transfer.arrive()
    return reorder(x, blocks.counts, blocks.order_like(plan.tokens))


def _narrow(ids: Tensor) -> Tensor:
    """Return the 3 low bytes of every id, [..., 3]."""
    return ids.unsqueeze(-1).view(torch.uint8)[..., :3].contiguous()


def _widen(low: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the ids of these bytes."""
    wide = low.new_zeros(*low.shape[:-1], dtype.itemsize)
    wide[..., :3] = low
    return wide.view(dtype).squeeze(-1)
