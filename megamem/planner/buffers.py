"""Bytes of memory layers that come and go: what backward needs, and the passing peak of each step.

`megamem bench --memory` measures them. Letters as in traffic.py; T tokens of a microbatch, M
lookups that arrive at a rank, H heads, Q query width, D hidden size.
"""

import math

from megamem.layers.variants import variant_of
from megamem.ops.sizes import chunk_length, column_block, padded_topk, tokens_of_a_piece
from megamem.parallel.traffic import widest_slice
from megamem.planner.job import Job, Layout, layout_wire

# int64 row ids, fp32 weights
ROW_ID_BYTES, WEIGHT_BYTES = 8, 4
# what the form alltoall keeps of a lookup to bring its weight's gradient back: an int64 place
ORDER_BYTES = 8
# a sorted lookup: int32 row, int64 place, int32 bag, fp32 weight; and the gradient of its weight
SORTED_BYTES = 4 + 8 + 4 + 4 + 4
# what a score of a sub-key becomes that may be among the best: int64
CANDIDATE_BYTES = 8
# pairs of sub-keys while they are ranked: their ids, their gradients, sub-keys of both halves
RANKED_BYTES = 40


def lookup_buffers(job: Job, layout: Layout) -> float:
    """Bytes that memory layers keep for backward, and the largest passing peak beside them."""
    stages = job.cluster.pipeline_model_parallel_size
    # a stage holds as many microbatches as there are stages from it to the last
    kept_layers = max(
        count * min(stages - stage, job.cluster.microbatches)
        for stage, count in enumerate(job.stage_memories)
    )
    return kept_layers * kept_bytes(job, layout) + passing_bytes(job, layout)


def kept_bytes(job: Job, layout: Layout) -> float:
    """Of one memory layer and microbatch, from its forward to its backward.

    A token: the layer's input, its queries, its rows and their weights, and what the variant's
    output keeps. And the lookups that arrived here, with what the variant's read-out keeps of each,
    and the tokens that they are for where it looks at them.
    """
    spec, tokens, e = job.spec, job.microbatch_tokens, job.number_bytes
    queries = spec.heads * spec.key_dim
    variant = variant_of(spec)
    numbers = spec.hidden_size + queries
    numbers += variant.kept_widths * spec.value_dim
    kept = tokens * numbers * e
    if spec.qk_norm:
        # queries before and after, and as many sub-keys as all tokens share
        kept += (tokens + spec.num_keys) * queries * e
    lookups = spec.lookups_per_token * tokens
    kept += lookups * (ROW_ID_BYTES + WEIGHT_BYTES)
    alone = layout.group_size == 1
    kept += arrived_lookups(job, layout) * (ROW_ID_BYTES + (0 if alone else WEIGHT_BYTES))
    kept += layout.group_size * tokens * ROW_ID_BYTES
    kept += variant.kept_per_lookup * arrived_lookups(job, layout) * WEIGHT_BYTES
    if variant.reads_tokens and not alone:
        # alone, they are the layer's input itself
        kept += layout.group_size * tokens * spec.value_dim * e
    if layout.row_ranks > 1 and layout_wire(job, layout) == "alltoall":
        kept += lookups * layout.column_ranks * ORDER_BYTES
    return kept


def passing_bytes(job: Job, layout: Layout) -> float:
    """The largest of: sub-keys being scored, sums on their way home, gradients going into rows.

    Forward, the scores and candidates of as many tokens as are scored at once beside a copy of the
    sub-keys, then the partial sums of all tokens that are read here, as sent and as arrived, and
    their total in fp32. Backward, the gradients of read-out and gate, those of the partial sums,
    and the lookups sorted by row; several tables of a pool take their turns.
    """
    spec, tokens, e = job.spec, job.microbatch_tokens, job.number_bytes
    width = widest_slice(spec.value_dim, layout.column_ranks)
    sums = layout.group_size * tokens * width * e
    total = layout.column_ranks * tokens * width * (4 + e)
    read_out = tokens * spec.value_dim * e
    gradients = variant_of(spec).gradient_widths * read_out
    lookups = spec.lookups_per_token * tokens
    half = spec.key_dim // 2
    return max(
        scored_bytes(job),
        2 * sums + total,
        gradients + sums + sorted_bytes(arrived_lookups(job, layout), width, weights=True),
        RANKED_BYTES * lookups + sorted_bytes(2 * lookups, half, weights=False),
    )


def scored_bytes(job: Job) -> float:
    """While the best sub-keys are chosen: fp32 scores of a few tokens at a time, and candidates."""
    spec = job.spec
    a_token = 2 * spec.heads * spec.num_keys * 4
    tokens = min(job.microbatch_tokens, tokens_of_a_piece(spec.num_keys, spec.heads))
    candidates = 2 * spec.heads * 2 * padded_topk(spec.topk)
    sub_keys = spec.heads * spec.num_keys * spec.key_dim * job.number_bytes
    return tokens * (a_token + candidates * CANDIDATE_BYTES) + sub_keys


def arrived_lookups(job: Job, layout: Layout) -> float:
    """M: at a fixed size a place is kept for lookups that went elsewhere."""
    fixed = layout_wire(job, layout) == "allgather"
    senders = layout.group_size if fixed else layout.column_ranks
    return job.spec.lookups_per_token * job.microbatch_tokens * senders


def sorted_bytes(lookups: float, width: int, *, weights: bool) -> float:
    """Of lookups sorted by row, while gradients of this width are summed.

    Args:
        lookups: M.
        width: of a row.
        weights: the gradients of the lookups' weights are summed, too.
    """
    # each chunk may end in the middle of two rows
    partials = math.ceil(lookups / chunk_length(int(lookups))) * 2 * width * 4
    blocks = math.ceil(width / column_block(width)) if weights else 0
    return lookups * (SORTED_BYTES + 4 * blocks) + partials
