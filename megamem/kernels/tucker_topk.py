"""Triton kernels of tucker_topk; megamem.reference.tucker_topk specifies the result.

    scores of all sub-keys    torch.bmm, on some tokens at a time, so that the scores stay small
    _best_sides_kernel             the best K rows and columns by their scores along u and t
    _best_pairs_kernel             the best F of the K * K pairs of these

Both stages choose as kernels.product_topk does, which explains the method: the maxima of
interleaved groups give a threshold that at least as many scores reach as are wanted, and rarely
more than there is room for; a second pass collects these, and a sort orders them. Where too many
reach it, bisection finds the last score that is wanted, and of its equals takes the first.

A program of _best_sides_kernel is one warp and computes both sides of one read, a head of a token.
(In Triton's interpreter, which has a high cost per program, it computes several reads.) It stores
the rows and columns that it keeps in the order of their indices, so that the place i * K + j of a
pair of these grows with its id, and breaks ties.

A program of _best_pairs_kernel computes one read. The scores of its pairs are formed in registers,
a tile of BLOCK_I rows and all columns at a time, anew in each pass, as they take A multiplications
each and K * K of them would be the largest tensor of the layer. A tile adds to the maximum of
BLOCK_I * KP groups. The columns of each tile are rotated by BLOCK_I more, as otherwise a column
with large scores would have all of its pairs in the same BLOCK_I groups: with normal scores, at
(K, F) from (32, 32) to (128, 768), at most 0.5 % of reads then need bisection, but up to 95 %
without rotation.

Multiplications and additions are not fused: each pass must compute the same bits.

Letters: T tokens, H heads, N sub-keys per side, C key width of a side, A rank, O cores, K rows and
columns kept of each read, F pairs returned, X = 2A sets of M = H * N keys; KP and FP are K and F
rounded up to a power of two, at least 8; KB = 2 KP and FB = 2 FP candidates; 2 sides. Prefixes in
kernels: i_ an index, o_ offsets, m_ a mask, b_ a block in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from megamem.kernels import choices
from megamem.kernels.product_topk import (
    EMPTY,
    INDEX,
    LOWEST,
    middle,
    multiply,
    pack,
    padded_topk,
    to_order,
    to_score,
)

MAX_TOPK = 128
MAX_FINAL_TOPK = 1024
# a score has the same bits in each pass
OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _guess(b_low, b_high, i_step):
    """Return the next order to try: the mean of the scores at first, as bits are spread unevenly.

    The mean of infinities is not used.
    """
    b_mean = to_order(0.5 * (to_score(b_low) + to_score(b_high)))
    m_mean = (i_step < 12) & (b_mean > b_low) & (b_mean <= b_high)
    return tl.where(m_mean, b_mean, middle(b_low, b_high))


@triton.jit
def _side_order(scores, directions, o_n, mask, step, A: tl.constexpr):
    """Return [sides, GROUPS] scores along u or t as ordered int32; LOWEST where not in the mask."""
    b_side = tl.load(scores + o_n, mask=mask, other=0.0) * tl.load(directions)
    for a in tl.static_range(1, A):
        b_score = tl.load(scores + a * step + o_n, mask=mask, other=0.0)
        b_side += b_score * tl.load(directions + a)
    return tl.where(mask, to_order(b_side), LOWEST)


@triton.jit(do_not_specialize=["num_tokens"])
def _best_sides_kernel(
    scores,  # [2, A, T, H, N]
    directions,  # [2, H, A]
    candidates,  # [T, H, 2, KB]
    kept,  # [2, T, H, K]
    sides,  # [2, T, H, A, K]
    num_tokens,
    H: tl.constexpr,
    N: tl.constexpr,
    A: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    KB: tl.constexpr,
    GROUPS: tl.constexpr,
    READS: tl.constexpr,
):
    i_read = tl.program_id(0).to(tl.int64) * READS
    num_reads = num_tokens.to(tl.int64) * H
    o_y = tl.arange(0, 2 * READS)
    b_read = (i_read + o_y // 2)[:, None]
    b_z = (o_y % 2)[:, None]
    m_y = b_read < num_reads
    # a side that is not there reads the last that is
    b_read = tl.minimum(b_read, num_reads - 1)
    o_g = tl.arange(0, GROUPS)[None, :]
    step = num_reads * N
    scores += (b_z * (A * num_reads) + b_read) * N
    directions += (b_z * H + b_read % H) * A
    o_candidates = candidates + ((i_read * 2 + o_y) * KB)[:, None]

    # the first pass: a threshold that the maxima of at least K groups reach
    b_max = tl.full([2 * READS, GROUPS], LOWEST, tl.int32)
    for i in range(0, N, GROUPS):
        m_n = m_y & (i + o_g < N)
        b_max = tl.maximum(b_max, _side_order(scores, directions, i + o_g, m_n, step, A))
    b_low = tl.min(b_max, axis=1)
    b_high = tl.max(b_max, axis=1)
    b_top = b_high
    b_count = tl.full([2 * READS], GROUPS, tl.int32)
    i_step = 0
    while (tl.max(b_count, axis=0) > K + K // 8) & (i_step < 40):
        b_mid = _guess(b_low, b_high, i_step)
        b_reach = tl.sum((b_max >= b_mid[:, None]).to(tl.int32), axis=1)
        m_enough = b_reach >= K
        b_count = tl.where(m_enough, b_reach, b_count)
        b_high = tl.where(m_enough, b_high, tl.maximum(b_mid - 1, b_low))
        b_low = tl.where(m_enough, b_mid, b_low)
        i_step += 1

    # the second pass: collect the scores that reach the threshold
    b_used = tl.zeros([2 * READS], tl.int32)
    for i in range(0, N, GROUPS):
        m_n = m_y & (i + o_g < N)
        b_order = _side_order(scores, directions, i + o_g, m_n, step, A)
        m_reach = (b_order >= b_low[:, None]) & m_n
        b_place = b_used[:, None] + tl.cumsum(m_reach.to(tl.int32), axis=1) - 1
        tl.store(o_candidates + b_place, pack(b_order, i + o_g), mask=m_reach & (b_place < KB))
        b_used += tl.sum(m_reach.to(tl.int32), axis=1)

    if tl.max(b_used, axis=0) > KB:
        # many scores are (almost) equal: find the K-th best, and of its equals take the first
        b_high = b_top
        for _ in range(32):
            b_mid = middle(b_low, b_high)
            b_reach = tl.zeros([2 * READS], tl.int32)
            for i in range(0, N, GROUPS):
                m_n = m_y & (i + o_g < N)
                b_order = _side_order(scores, directions, i + o_g, m_n, step, A)
                b_reach += tl.sum((b_order >= b_mid[:, None]).to(tl.int32), axis=1)
            b_low = tl.where(b_reach >= K, b_mid, b_low)
            b_high = tl.where(b_reach >= K, b_high, tl.maximum(b_mid - 1, b_low))
        b_above = tl.zeros([2 * READS], tl.int32)
        for i in range(0, N, GROUPS):
            m_n = m_y & (i + o_g < N)
            b_order = _side_order(scores, directions, i + o_g, m_n, step, A)
            b_above += tl.sum((b_order > b_low[:, None]).to(tl.int32), axis=1)
        b_equal = tl.zeros([2 * READS], tl.int32)
        b_used = tl.zeros([2 * READS], tl.int32)
        # the candidates that the second pass stored are overwritten
        tl.debug_barrier()
        for i in range(0, N, GROUPS):
            m_n = m_y & (i + o_g < N)
            b_order = _side_order(scores, directions, i + o_g, m_n, step, A)
            m_equal = (b_order == b_low[:, None]) & m_n
            b_nth = b_equal[:, None] + tl.cumsum(m_equal.to(tl.int32), axis=1)
            m_keep = (b_order > b_low[:, None]) | (m_equal & (b_nth <= (K - b_above)[:, None]))
            b_place = b_used[:, None] + tl.cumsum(m_keep.to(tl.int32), axis=1) - 1
            tl.store(o_candidates + b_place, pack(b_order, i + o_g), mask=m_keep)
            b_used += tl.sum(m_keep.to(tl.int32), axis=1)
            b_equal += tl.sum(m_equal.to(tl.int32), axis=1)

    # other threads stored what is read here
    tl.debug_barrier()
    o_b = tl.arange(0, KB)[None, :]
    b_candidates = tl.load(o_candidates + o_b, mask=o_b < b_used[:, None], other=EMPTY)
    b_best = tl.topk(b_candidates, KP)
    o_k = tl.arange(0, KP)[None, :]
    b_index = tl.where(o_k < K, (b_best & INDEX).to(tl.int32) ^ INDEX, INDEX)
    b_index = tl.sort(b_index)
    m_k = m_y & (o_k < K)
    b_line = b_z * num_reads + b_read
    tl.store(kept + b_line * K + o_k, b_index, mask=m_k)
    for a in tl.static_range(A):
        b_score = tl.load(scores + a * step + b_index, mask=m_k, other=0.0)
        tl.store(sides + (b_line * A + a) * K + o_k, b_score, mask=m_k)


@triton.jit
def _pair_order(
    row,
    column,
    core,
    i_block,
    rotation,
    A: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Return [BLOCK_I * KP] scores of a tile of pairs as ordered int32, and i * K + j of each.

    Both are LOWEST and -1 where there is no pair. The columns are rotated by a number of places.
    """
    o_i = i_block + tl.arange(0, BLOCK_I)
    o_j = (tl.arange(0, KP) + rotation) % KP
    b_sum = tl.zeros([BLOCK_I, KP], tl.float32)
    for b in tl.static_range(A):
        b_left = tl.load(row + o_i, mask=o_i < K, other=0.0) * tl.load(core + b)
        for a in tl.static_range(1, A):
            b_row = tl.load(row + a * K + o_i, mask=o_i < K, other=0.0)
            b_left += b_row * tl.load(core + a * A + b)
        b_column = tl.load(column + b * K + o_j, mask=o_j < K, other=0.0)
        b_sum += b_left[:, None] * b_column[None, :]
    m_pair = (o_i < K)[:, None] & (o_j < K)[None, :]
    b_pair = tl.where(m_pair, o_i[:, None] * K + o_j[None, :], -1)
    b_order = tl.where(m_pair, to_order(b_sum), LOWEST)
    return tl.reshape(b_order, [BLOCK_I * KP]), tl.reshape(b_pair, [BLOCK_I * KP])


@triton.jit(do_not_specialize=["num_reads"])
def _best_pairs_kernel(
    kept,  # [2, T, H, K]
    sides,  # [2, T, H, A, K]
    core,  # [H, A, A], the sum of the cores
    cores,  # [O, H, A, A]
    candidates,  # [T, H, FB]
    pairs,  # [T, H, F]
    weights,  # [T, H, F, O]
    row_ids,  # [T, H, F]
    num_reads,
    H: tl.constexpr,
    N: tl.constexpr,
    A: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    KP: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    FB: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    i_read = tl.program_id(0).to(tl.int64)
    i_column = num_reads + i_read
    row, column = sides + i_read * (A * K), sides + i_column * (A * K)
    core += i_read % H * (A * A)
    candidates += i_read * FB

    # the first pass: a threshold that the maxima of at least F groups reach
    b_max = tl.full([BLOCK_I * KP], LOWEST, tl.int32)
    for i in range(0, K, BLOCK_I):
        b_order, _ = _pair_order(row, column, core, i, i, A, K, KP, BLOCK_I)
        b_max = tl.maximum(b_max, b_order)
    i_low = tl.min(b_max, axis=0)
    i_high = tl.max(b_max, axis=0)
    i_top = i_high
    i_count = BLOCK_I * KP
    i_step = 0
    while (i_count > F + F // 8) & (i_step < 40):
        i_mid = _guess(i_low, i_high, i_step)
        i_reach = tl.sum((b_max >= i_mid).to(tl.int32), axis=0)
        is_enough = i_reach >= F
        i_count = tl.where(is_enough, i_reach, i_count)
        i_high = tl.where(is_enough, i_high, tl.maximum(i_mid - 1, i_low))
        i_low = tl.where(is_enough, i_mid, i_low)
        i_step += 1

    # the second pass: collect the pairs whose scores reach the threshold
    i_used = 0
    for i in range(0, K, BLOCK_I):
        b_order, b_pair = _pair_order(row, column, core, i, 0, A, K, KP, BLOCK_I)
        m_reach = (b_order >= i_low) & (b_pair >= 0)
        b_place = i_used + tl.cumsum(m_reach.to(tl.int32), axis=0) - 1
        # no two have one place; the barriers let a check of the compiled kernel see that
        tl.debug_barrier()
        tl.store(candidates + b_place, pack(b_order, b_pair), mask=m_reach & (b_place < FB))
        i_used += tl.sum(m_reach.to(tl.int32), axis=0)

    if i_used > FB:
        # many scores are (almost) equal: find the F-th best, and of its equals take the first
        i_high = i_top
        for _ in range(32):
            i_mid = middle(i_low, i_high)
            i_reach = 0
            for i in range(0, K, BLOCK_I):
                b_order, b_pair = _pair_order(row, column, core, i, 0, A, K, KP, BLOCK_I)
                i_reach += tl.sum(((b_order >= i_mid) & (b_pair >= 0)).to(tl.int32), axis=0)
            i_low = tl.where(i_reach >= F, i_mid, i_low)
            i_high = tl.where(i_reach >= F, i_high, tl.maximum(i_mid - 1, i_low))
        i_above = 0
        for i in range(0, K, BLOCK_I):
            b_order, b_pair = _pair_order(row, column, core, i, 0, A, K, KP, BLOCK_I)
            i_above += tl.sum((b_order > i_low).to(tl.int32), axis=0)
        i_equal = 0
        i_used = 0
        # the barriers also come before the candidates of the second pass are overwritten
        for i in range(0, K, BLOCK_I):
            b_order, b_pair = _pair_order(row, column, core, i, 0, A, K, KP, BLOCK_I)
            m_equal = (b_order == i_low) & (b_pair >= 0)
            b_nth = i_equal + tl.cumsum(m_equal.to(tl.int32), axis=0)
            m_keep = (b_order > i_low) | (m_equal & (b_nth <= F - i_above))
            b_place = i_used + tl.cumsum(m_keep.to(tl.int32), axis=0) - 1
            tl.debug_barrier()
            tl.store(candidates + b_place, pack(b_order, b_pair), mask=m_keep)
            i_used += tl.sum(m_keep.to(tl.int32), axis=0)
            i_equal += tl.sum(m_equal.to(tl.int32), axis=0)

    # other threads stored what is read here
    tl.debug_barrier()
    o_b = tl.arange(0, FB)
    b_candidates = tl.load(candidates + o_b, mask=o_b < i_used, other=EMPTY)
    b_pair = (tl.topk(b_candidates, FP) & INDEX).to(tl.int32) ^ INDEX
    o_f = tl.arange(0, FP)
    m_f = o_f < F
    b_i, b_j = b_pair // K, b_pair % K
    o_out = i_read * F + o_f
    tl.store(pairs + o_out, b_pair, mask=m_f)
    b_row_id = tl.load(kept + i_read * K + b_i, mask=m_f, other=0).to(tl.int64) * N
    b_row_id += tl.load(kept + i_column * K + b_j, mask=m_f, other=0)
    tl.store(row_ids + o_out, b_row_id, mask=m_f)
    for o in tl.static_range(O):
        one = cores + (o * H + i_read % H) * (A * A)
        b_weight = tl.zeros([FP], tl.float32)
        for b in tl.static_range(A):
            b_left = tl.load(row + b_i, mask=m_f, other=0.0) * tl.load(one + b)
            for a in tl.static_range(1, A):
                b_row = tl.load(row + a * K + b_i, mask=m_f, other=0.0)
                b_left += b_row * tl.load(one + a * A + b)
            b_weight += b_left * tl.load(column + b * K + b_j, mask=m_f, other=0.0)
        tl.debug_barrier()
        tl.store(weights + o_out * O + o, b_weight, mask=m_f)


def tucker_topk(
    query_T2AC: Tensor,
    keys_2HNAC: Tensor,
    cores_OHAA: Tensor,
    directions_2HA: Tensor,
    topk: int,
    final_topk: int,
    reads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the best `final_topk` pairs for every token and head, and what the backward needs.

    Args:
        query_T2AC: the queries, one for each rank, or one for all of them.
        keys_2HNAC: the keys of rows and of columns, of the same dtype.
        cores_OHAA: fp32.
        directions_2HA: fp32.
        topk: K, at most N and MAX_TOPK.
        final_topk: F, at most K * K and MAX_FINAL_TOPK.
        reads: reads that a program of _best_sides_kernel computes, a power of two; by default 1,
            and more in Triton's interpreter.

    Returns:
        weights_THFO: fp32.
        row_ids_THF: int64, id = i * N + j.
        pairs_THF: int32, the places i * K + j of the pairs among the kept rows and columns.
        kept_2THK: int32, the kept rows and columns, in the order of their indices.
        sides_2THAK: fp32, the scores of these.
    """
    (_, heads, num_keys, rank, _), device = keys_2HNAC.shape, query_T2AC.device
    num_tokens, num_cores = len(query_T2AC), len(cores_OHAA)
    counts = (num_tokens, heads)
    weights_THFO = torch.empty(*counts, final_topk, num_cores, device=device)
    row_ids_THF = torch.empty(*counts, final_topk, dtype=torch.int64, device=device)
    pairs_THF = torch.empty(*counts, final_topk, dtype=torch.int32, device=device)
    kept_2THK = torch.empty(2, *counts, topk, dtype=torch.int32, device=device)
    sides_2THAK = torch.empty(2, *counts, rank, topk, device=device)
    padded, padded_final = padded_topk(topk), padded_topk(final_topk)
    if reads is None:
        several = min(16, triton.next_power_of_2(max(1, num_tokens * heads)))
        reads = several if knobs.runtime.interpret else 1
    block_i = min(padded, max(1, 4 * padded_final // padded))
    tile = block_i * padded
    # a set is the keys of one rank of one side, for all heads
    sets_XCM = keys_2HNAC.permute(0, 3, 4, 1, 2).flatten(3).flatten(0, 1)
    core_HAA, cores_OHAA = cores_OHAA.sum(0), cores_OHAA.contiguous()
    directions_2HA = directions_2HA.contiguous()
    sizes = {"H": heads, "N": num_keys, "A": rank, "K": topk, "KP": padded}
    piece = tokens_of_a_piece(num_keys, heads, rank)
    for start in range(0, num_tokens, piece):
        query = query_T2AC[start : start + piece].expand(-1, -1, rank, -1)
        here, count = slice(start, start + len(query)), len(query)
        query_XTC = query.permute(1, 2, 0, 3).flatten(0, 1)
        scores_XTM = multiply(query_XTC, sets_XCM)
        # of one piece, so that both sides of it are beside each other
        kept = torch.empty(2, count, heads, topk, dtype=torch.int32, device=device)
        sides = torch.empty(2, count, heads, rank, topk, device=device)
        candidates = torch.empty(count, heads, 2, 2 * padded, dtype=torch.int64, device=device)
        _best_sides_kernel[(triton.cdiv(count * heads, reads),)](
            scores_XTM,
            directions_2HA,
            candidates,
            kept,
            sides,
            count,
            KB=2 * padded,
            GROUPS=4 * padded,
            READS=reads,
            num_warps=1,
            **sizes,
            **OPTIONS,
        )
        candidates = torch.empty(count, heads, 2 * padded_final, dtype=torch.int64, device=device)
        _best_pairs_kernel[(count * heads,)](
            kept,
            sides,
            core_HAA,
            cores_OHAA,
            candidates,
            pairs_THF[here],
            weights_THFO[here],
            row_ids_THF[here],
            count * heads,
            O=num_cores,
            F=final_topk,
            FP=padded_final,
            FB=2 * padded_final,
            BLOCK_I=block_i,
            num_warps=max(1, min(4, tile // 512)),
            **sizes,
            **OPTIONS,
        )
        kept_2THK[:, here], sides_2THAK[:, here] = kept, sides
    return weights_THFO, row_ids_THF, pairs_THF, kept_2THK, sides_2THAK


def tokens_of_a_piece(num_keys: int, heads: int, rank: int) -> int:
    """Return the tokens whose fp32 scores of both sides are formed at once, at least one."""
    return max(1, score_bytes() // (8 * heads * num_keys * rank))


def score_bytes() -> int:
    """Return the bytes of the scores of the tokens that are scored at once."""
    return choices.current().product_topk.score_bytes
