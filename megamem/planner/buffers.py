"""Bytes of memory layers' buffers: what is saved for backward, and the temporary peak of each step.

`megamem bench --memory` measures them.
"""

import math

from megamem.layers.variants import variant_of
from megamem.ops import forms
from megamem.ops.sizes import (
    chunks_and_room,
    column_block,
    padded_topk,
    tokens_of_a_piece,
    tucker_tokens,
    tucker_tokens_by_torch,
)
from megamem.parallel import exchange_cost
from megamem.parallel.exchange_cost import ROUTING_BYTES, home_work, live_share
from megamem.parallel.traffic import widest_slice
from megamem.planner.job import Job, Layout, layout_wire
from megamem.spec import MemorySpec

# int64 pairs of sub-keys, int32 rows of a table, int64 offsets of bags, fp32 weights
PAIR_BYTES, ROW_ID_BYTES, OFFSET_BYTES, WEIGHT_BYTES = 8, 4, 8, 4
# Tucker scores keep int32 places of pairs and int32 numbers of sub-keys
INDEX_BYTES = 4
# int64 places of lookups that are sorted by block
BLOCK_ORDER_BYTES = 8
# alltoall saves one int32 position per lookup of this rank, to return the gradient of its weight
ORDER_BYTES = 4
# a sorted lookup: int32 row, position (int64 by torch), int32 bag, fp32 weight; and its weight's
# gradient
SORTED_BYTES = {"torch": 4 + 8 + 4 + 4 + 4, "radix": 4 + 4 + 4 + 4 + 4}
# while lookups are sorted by the form radix: two of each, but one weight
SORTING_BYTES = 8 + 8 + 4 + 4 + 4
# an estimate for tucker_topk by torch: fp32 copies of the sub-keys, of their scores, of these along
# the directions, and of the scores of pairs
KEY_COPIES, SCORE_COPIES, SIDE_COPIES, PAIR_COPIES = 2, 3, 2, 7
# the scores of sub-keys that may be among the best are packed into int64
CANDIDATE_BYTES = 8
# per lookup in the backward pass of product_topk: ids, gradients and the ids of both sub-keys
RANKED_BYTES = 40
# per score of a kept sub-key in the backward pass of tucker_topk: its gradient, the id of its row,
# and both in the order of bags
RANKED_SCORE_BYTES = 24


def lookup_buffers(job: Job, layout: Layout) -> float:
    """Bytes that memory layers save for backward, plus the largest temporary peak."""
    kept_layers = max(kept_passes(job, stage) for stage in range(len(job.placement)))
    return kept_layers * kept_bytes(job, layout) + passing_bytes(job, layout)


def kept_passes(job: Job, stage: int) -> int:
    """Forward passes of memory layers whose activations a pipeline stage holds at once, at most."""
    memories, stages = job.chunk_memories[stage], len(job.placement)
    virtual, microbatches = len(memories), job.cluster.microbatches
    if virtual == 1:
        # of as many microbatches as there are stages from it to the last
        return memories[0] * min(stages - stage, microbatches)
    # interleaved: each virtual stage takes as many microbatches as there are stages, in turn
    ahead = 2 * (stages - stage - 1) + (virtual - 1) * stages + 1
    passes = min(ahead, virtual * microbatches)
    return sum(memories[number // stages % virtual] for number in range(passes))


def kept_bytes(job: Job, layout: Layout) -> float:
    """Bytes that one memory layer saves for the backward pass of one microbatch.

    For each token these are the layer's input, its queries, its row ids and weights, and what the
    variant's output saves. For each lookup received from other ranks they are its row id and
    weights, and what the variant's read-out saves. Where the read-out needs the tokens themselves,
    or something made of them, what is received of it is saved, too.
    """
    spec, tokens, e = job.spec, job.microbatch_tokens, job.number_bytes
    variant = variant_of(spec)
    numbers = spec.hidden_size + variant.kept_widths * spec.read_width
    kept = tokens * numbers * e + _kept_by_scores(job)
    lookups, arrived = spec.lookups_per_token * tokens, arrived_lookups(job, layout)
    alone, made_of_tokens = layout.group_size == 1, bool(spec.pre_value_dim)
    # on a single rank the weights of lookups are those that the scores end in
    own_weights = bool(spec.tucker_rank) or not alone
    kept += arrived * (ROW_ID_BYTES + (spec.cores * WEIGHT_BYTES if own_weights else 0))
    kept += layout.group_size * tokens * spec.bags_per_token * OFFSET_BYTES
    kept += variant.kept_per_lookup(spec.cores) * arrived * WEIGHT_BYTES
    if variant.reads_tokens and (made_of_tokens or not alone):
        # on a single rank the tokens are the layer's input, which is counted already
        kept += layout.group_size * tokens * (spec.pre_value_dim or spec.value_dim) * e
    if layout.grid.routes(layout_wire(job, layout)):
        kept += lookups * ORDER_BYTES
    if spec.bags_per_token > 1:
        # the weights of a token's lookups before they are sorted by block, and their order
        kept += lookups * (BLOCK_ORDER_BYTES + spec.cores * WEIGHT_BYTES)
        if variant.reads_tokens:
            # where the lookups of each token start
            kept += layout.group_size * tokens * OFFSET_BYTES
    if spec.query_conv:
        # its input, with the tokens before those of the rank, and its output
        before = (spec.query_conv - 1) * job.cluster.micro_batch_size
        kept += (2 * tokens + before) * spec.hidden_size * e
    if spec.dropout:
        # what is dropped, a byte for each number
        kept += tokens * spec.hidden_size
    return kept


def _kept_by_scores(job: Job) -> float:
    """Bytes of queries, sub-keys, and of what says which rows the tokens read."""
    spec, tokens, e = job.spec, job.microbatch_tokens, job.number_bytes
    if not spec.tucker_rank:
        queries = spec.heads * spec.key_dim
        kept = tokens * queries * e
        if spec.qk_norm:
            # queries before and after the norm; the normalised sub-keys are shared by all tokens
            kept += (tokens + spec.num_keys) * queries * e
        return kept + spec.lookups_per_token * tokens * (PAIR_BYTES + WEIGHT_BYTES)
    queries = spec.key_dim * (spec.tucker_rank if spec.rank_queries else 1)
    # queries before and after the norm, normalised sub-keys, and the fp32 scales of both
    kept = (2 * tokens * queries + tucker_keys(spec)) * e
    kept += (tokens * queries + tucker_keys(spec)) / (spec.key_dim // 2) * WEIGHT_BYTES
    # of each head the pairs, and the kept rows and columns with their scores
    of_side = INDEX_BYTES + spec.tucker_rank * WEIGHT_BYTES
    return kept + spec.heads * tokens * (spec.final_topk * INDEX_BYTES + 2 * spec.topk * of_side)


def tucker_keys(spec: MemorySpec) -> int:
    """Numbers of all sub-keys of a layer with Tucker scores."""
    return spec.heads * spec.keys_per_side * spec.tucker_rank * spec.key_dim


def passing_bytes(job: Job, layout: Layout) -> float:
    """The largest number of bytes that is allocated and freed again within one step of a layer.

    In the forward pass these are the scores and candidates of the tokens that are scored at once,
    with a copy of the sub-keys; with alltoall the order of the lookups by owner; later the partial
    sums of all tokens that are read here, in the order of the first hop, as sent and as received,
    and their total in fp32. In the backward pass they are the gradients of read-out, gate and
    partial sums, and the lookups sorted by row. The tables of a pool are processed one after the
    other. Of N pieces, one is sorted at a time, and the sums of two are held.
    """
    spec, tokens, e = job.spec, job.microbatch_tokens, job.number_bytes
    wire, live = layout_wire(job, layout), live_share(spec.pieces)
    width = widest_slice(spec.value_dim, layout.column_ranks)
    home = home_work(layout.grid, wire)
    own = layout.column_ranks * tokens * width * spec.bags_per_token
    sums = live * home.largest * own * e
    # where nothing is summed, columns are joined
    total = live * max(1.0, home.largest_sum) * own * (4 + e)
    read_out = tokens * spec.read_width * e
    gradients = variant_of(spec).gradient_widths * read_out
    if variant_of(spec).projects and layout.group_size > 1:
        # the projection's input and gradient wait until the read-outs' gradients have left
        gradients += read_out + tokens * spec.hidden_size * e
    lookups = spec.lookups_per_token * tokens
    arrived = arrived_lookups(job, layout) / spec.pieces
    share = present_share(job, layout)
    ordered = sorted_bytes(arrived, width, weights=True, share=share)
    # the weights of further cores in the order of rows, and their gradients
    ordered += 2 * WEIGHT_BYTES * (spec.cores - 1) * arrived
    sent = 0.0
    if spec.skip and layout.group_size > 1:
        # ids and weights as they are sent, while the layers between are computed
        sent = lookups * (ROW_ID_BYTES + spec.cores * WEIGHT_BYTES)
    return sent + max(
        scored_bytes(job),
        ROUTING_BYTES * lookups if layout.grid.routes(wire) else 0.0,
        (2 + home.copies_first) * sums + total,
        gradients + sums + ordered,
        _scored_back_bytes(job),
    )


def _scored_back_bytes(job: Job) -> float:
    """Bytes held in the backward of scores, while the gradients of sub-keys are summed."""
    spec, tokens = job.spec, job.microbatch_tokens
    half = spec.key_dim // 2
    if not spec.tucker_rank:
        lookups = spec.lookups_per_token * tokens
        return RANKED_BYTES * lookups + sorted_bytes(2 * lookups, half, weights=False)
    scores = 2 * spec.heads * tokens * spec.topk * spec.tucker_rank
    # the gradients of the normalised sub-keys, and of the weights of lookups
    held: float = tucker_keys(spec) * job.number_bytes
    held += spec.lookups_per_token * tokens * spec.cores * WEIGHT_BYTES
    return held + RANKED_SCORE_BYTES * scores + sorted_bytes(scores, half, weights=False)


def scored_bytes(job: Job) -> float:
    """Bytes held while the best sub-keys are chosen: fp32 scores of one chunk of tokens, candidates
    and a copy of the sub-keys.

    This is the default form of product_topk. The form `fused` needs less: it has no scores and no
    copy of the sub-keys, and its candidates take at most 64 MB.
    """
    spec = job.spec
    if spec.tucker_rank:
        return _scored_by_tucker(job)
    token_scores = 2 * spec.heads * spec.num_keys * 4
    tokens = min(job.microbatch_tokens, tokens_of_a_piece(spec.num_keys, spec.heads))
    candidates = 2 * spec.heads * 2 * padded_topk(spec.topk)
    sub_keys = spec.heads * spec.num_keys * spec.key_dim * job.number_bytes
    return tokens * (token_scores + candidates * CANDIDATE_BYTES) + sub_keys


def _scored_by_tucker(job: Job) -> float:
    """The same for tucker_topk: of its form `triton` the fp32 scores of one chunk of tokens and the
    candidates of both stages; of its form `torch` also those of all pairs, sorted."""
    spec, e = job.spec, job.number_bytes
    side = spec.keys_per_side
    token_scores = 2 * spec.heads * side * spec.tucker_rank * 4
    queries = spec.key_dim * spec.tucker_rank
    if forms.pick("tucker_topk") == "triton":
        tokens = min(job.microbatch_tokens, tucker_tokens(side, spec.heads, spec.tucker_rank))
        candidates = 2 * 2 * padded_topk(spec.topk) + 2 * padded_topk(spec.final_topk)
        held = token_scores + spec.heads * candidates * CANDIDATE_BYTES + queries * e
        return tokens * held + tucker_keys(spec) * e
    pairs = spec.heads * spec.topk**2
    tokens = min(
        job.microbatch_tokens,
        tucker_tokens_by_torch(side, spec.heads, spec.tucker_rank, spec.topk),
    )
    sides = SCORE_COPIES * token_scores + SIDE_COPIES * 2 * spec.heads * side * 4
    copies = (job.microbatch_tokens * queries + KEY_COPIES * tucker_keys(spec)) * 4
    return copies + tokens * max(sides, PAIR_COPIES * pairs * 4)


def arrived_lookups(job: Job, layout: Layout) -> float:
    """Lookups for which one rank allocates memory, per microbatch of one layer.

    At fixed sizes (allgather) these include the lookups of rows that other ranks hold.
    """
    return exchange_cost.received_lookups(layout.grid, layout_wire(job, layout), job.exchange)


def present_share(job: Job, layout: Layout) -> float | None:
    """Share of the arrived lookups that read a row of this rank; None if all of them do."""
    if layout.group_size == 1 or layout_wire(job, layout) != "allgather":
        return None
    return 1 / layout.row_ranks


def sorted_bytes(lookups: float, width: int, *, weights: bool, share: float | None = None) -> float:
    """Bytes of lookups sorted by row, while gradients of rows are summed.

    They depend on the form of op `sort_lookups`: `radix` leaves absent lookups out, though there
    is memory for all of them until that is done.

    Args:
        lookups: how many lookups are sorted.
        width: numbers per row.
        weights: whether the gradients of the lookups' weights are summed, too.
        share: share of the lookups that read a row, if not all do.
    """
    form = forms.pick("sort_lookups")
    counted = share is not None and form == "radix"
    expected = int(lookups * (share or 1))
    chunks, room = chunks_and_room(int(lookups), counted, expected)
    # a chunk may begin and end in the middle of a row
    partials = chunks * 2 * width * 4
    blocks = math.ceil(width / column_block(width)) if weights else 0
    held = lookups * SORTED_BYTES[form] + 4 * blocks * room + partials
    return max(held, lookups * SORTING_BYTES) if form == "radix" else held
