"""Triton kernels of product_topk that keep no tensor of scores: the form `fused`.

    _candidates_kernel   what may be among the best K sub-keys of each half
    _exact_kernel        the same for halves of reads where too many scores reach the threshold
    _pairs_kernel        the best K of each half, then the best K pairs of these

A program of _candidates_kernel computes the scores of BLOCK_T tokens, of one half of one head, with
BLOCK_N sub-keys at a time, and looks at them twice. The first look keeps the elementwise maximum of
the blocks in registers, which is the maximum of each of BLOCK_N groups of sub-keys. Bisection finds
a threshold that the maxima of at least K groups reach, and of at most K / 8 more; so at least K
scores reach it. The second look computes the scores again and stores those that reach it.

The first look is at FIRST sub-keys. Up to 2048 (a choice) these are all N, and little more than K
scores reach the threshold, for twice the FLOPs of one product. Beyond, they are a third, 3.5 K
scores reach it, and it takes 1.33 times the FLOPs.

An atomic addition counts the slots of the candidates. Which slot a candidate gets differs between
runs, but the set of candidates does not, and nothing below depends on their order.

Both looks call one function, so that they compute the same scores bit for bit. Where more scores
reach the threshold than there are slots, or fewer than K (which happens only if the two looks
differ), _exact_kernel bisects for an order that fits; if too many scores are equal to the K-th
best, it takes those with the smallest indices. A NaN reaches every threshold, and ranks highest. A
program that has nothing to do ends after it has read its counts, and no host waits for any.

A program of _pairs_kernel is one warp and completes one read. It bisects for the K best candidates
of each half, orders these K by counting for each how many are larger, and does the same for the
about K ln K sums of pairs that can be among the best. Candidates are packed with their indices
(megamem.kernels.product_topk), so no two are equal, and bisection always ends with exactly K.

fp32 inputs are multiplied in IEEE fp32, without tensor cores: three products of tf32 would lose
bits of inputs that fp32 scores are exact for, and make NaN of some infinities.

Letters: T tokens, H heads, Q = 2C query width, C sub-key width, N sub-keys per half, K top-k,
P pairs of ranks, X = 2H sets of sub-keys (set 2h + z is half z of head h), KB candidates, KP is K
rounded up to a power of two, Y lines, B entries of a line; 2 halves. Prefixes in kernels: i_ an
index, o_ offsets, m_ a mask, b_ a block in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from megamem.kernels import choices
from megamem.kernels.embedding_bag import OPTIONS
from megamem.kernels.product_topk import (
    EMPTY,
    INDEX,
    LOWEST,
    middle,
    pack,
    padded_topk,
    staircase,
    to_order,
    to_score,
)

MAX_TOPK = 64
MIN_BLOCK_N = 128
# for fp32, whose products have no tensor cores
FP32_TILE = 64 * 128
FP32_BLOCK_C = 16
FP32_NUM_STAGES = 2
FP32_EXACT_TILE = 16 * 128
# candidates that a half of a read may have, for each of the K (at least 16) that are wanted: where
# the first look is at all sub-keys, and where it is at N / FIRST_SHARE
FULL_LOOK_SLOTS = 2
FIRST_SHARE = 3
SLOTS = 8
# indices that a line of _rank is compared with at once
BLOCK_J = 8


@triton.jit
def _count(m):
    """Return how many entries of each line are True.

    The sum is one of numbers: LLVM packs the bits of an integer sum into words, in local memory.
    """
    return tl.sum(m.to(tl.float32), axis=1).to(tl.int32)


@triton.jit
def _scores(
    query,
    sub_keys,
    o_t,
    i_n,
    H: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return [BLOCK_T, BLOCK_N] scores of the sub-keys from i_n on; those beyond N are -inf.

    Args:
        query: [T, X, C] from the program's set on.
        sub_keys: [N, C] of this set.
        o_t: the tokens, each of which exists.
        i_n: first sub-key.
    """
    # beyond the last sub-key the last one is read again
    o_n = i_n + tl.arange(0, BLOCK_N)
    p_keys = sub_keys + tl.minimum(o_n, N - 1)[None, :] * C
    p_query = query + o_t[:, None] * (2 * H * C)
    b_scores = tl.zeros([o_t.shape[0], BLOCK_N], tl.float32)
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        if C % BLOCK_C == 0:
            b_query = tl.load(p_query + o_c[None, :])
            b_keys = tl.load(p_keys + o_c[:, None])
        else:
            b_query = tl.load(p_query + o_c[None, :], mask=(o_c < C)[None, :], other=0.0)
            b_keys = tl.load(p_keys + o_c[:, None], mask=(o_c < C)[:, None], other=0.0)
        b_scores = tl.dot(b_query, b_keys, b_scores, input_precision="ieee")
    if N % BLOCK_N != 0:
        b_scores = tl.where((o_n < N)[None, :], b_scores, float("-inf"))
    return b_scores


@triton.jit
def _raise(b_max, b_low, K: tl.constexpr):
    """Return a threshold that at least K maxima of each line reach, and few more, as an order.

    Args:
        b_max: [BLOCK_T, BLOCK_N] maxima of groups.
        b_low: [BLOCK_T] orders that at least K of them reach.
    """
    b_high = to_order(tl.max(b_max, axis=1))
    b_count = _count(b_max >= to_score(b_low)[:, None])
    i_step = 0
    while (tl.max(tl.where(b_low < b_high, b_count, 0), axis=0) > K + K // 8) & (i_step < 40):
        b_mid = middle(b_low, b_high)
        # scores are distributed more evenly than their bits; the mean of infinities is not used
        b_mean = to_order(0.5 * (to_score(b_low) + to_score(b_high)))
        b_mid = tl.where((i_step < 12) & (b_mean > b_low) & (b_mean <= b_high), b_mean, b_mid)
        b_reach = _count(b_max >= to_score(b_mid)[:, None])
        m_enough = b_reach >= K
        b_count = tl.where(m_enough, b_reach, b_count)
        b_high = tl.where(m_enough, b_high, tl.maximum(b_mid - 1, b_low))
        b_low = tl.where(m_enough, b_mid, b_low)
        i_step += 1
    return b_low


@triton.jit
def _columns(b):
    """Return [BLOCK_N / 2, BLOCK_T, 2], both halves of a block's columns."""
    return tl.permute(tl.reshape(b, [b.shape[0], 2, b.shape[1] // 2]), [2, 0, 1])


@triton.jit
def _append(slots, counts, m_reach, b_scores, o_read, o_n, KB: tl.constexpr):
    """Store the scores of a block [columns, BLOCK_T] where m_reach is True, with their indices."""
    m_reach = tl.reshape(m_reach, [o_read.shape[0]])
    b_bits = tl.reshape(b_scores, [o_read.shape[0]]).to(tl.int32, bitcast=True)
    b_slot = tl.atomic_add(counts + o_read, 1, mask=m_reach, sem="relaxed")
    b_slot = tl.where(m_reach, b_slot, KB)
    tl.store(slots + o_read * KB + b_slot, pack(b_bits, o_n), mask=b_slot < KB)


@triton.jit(do_not_specialize=["num_tokens"])
def _candidates_kernel(
    query,  # [T, X, C]
    sub_keys,  # [2, H, N, C]
    slots,  # [T, X, KB] bits of a score, and its index
    counts,  # [T, X], zero
    num_tokens,
    H: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    KB: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_x = tl.program_id(1).to(tl.int64)
    m_t = (o_t < num_tokens)[:, None]
    o_t = tl.minimum(o_t, num_tokens - 1)
    query += i_x * C
    sub_keys += (i_x % 2 * H + i_x // 2) * (N * C)

    b_max = tl.full([BLOCK_T, BLOCK_N], float("-inf"), tl.float32)
    for i_n in range(0, FIRST, BLOCK_N):
        b_scores = _scores(query, sub_keys, o_t, i_n, H, N, C, BLOCK_N, BLOCK_C)
        b_max = tl.maximum(b_max, b_scores)
    b_low = _raise(b_max, to_order(tl.min(b_max, axis=1)), K)

    b_reach = to_score(b_low)[:, None]
    # of an element of a block that is turned and in one dimension; so turned, the candidates that a
    # thread stores are of one token
    o_e = tl.arange(0, BLOCK_N // 2 * BLOCK_T)
    o_read = (tl.program_id(0) * BLOCK_T + o_e % BLOCK_T) * (2 * H) + tl.program_id(1)
    for i_n in range(0, N, BLOCK_N):
        b_scores = _scores(query, sub_keys, o_t, i_n, H, N, C, BLOCK_N, BLOCK_C)
        # a NaN is a candidate
        m_reach = m_t & ~(b_scores < b_reach)
        if N % BLOCK_N != 0:
            m_reach &= (i_n + tl.arange(0, BLOCK_N) < N)[None, :]
        # one half of the sub-keys after the other takes fewer registers
        m_first, m_second = tl.split(_columns(m_reach))
        b_first, b_second = tl.split(_columns(b_scores))
        o_n = i_n + o_e // BLOCK_T
        _append(slots, counts, m_first, b_first, o_read, o_n, KB)
        _append(slots, counts, m_second, b_second, o_read, o_n + BLOCK_N // 2, KB)


@triton.jit(do_not_specialize=["num_tokens"])
def _exact_kernel(
    query,  # [T, X, C]
    sub_keys,  # [2, H, N, C]
    slots,  # [T, X, KB]
    counts,  # [T, X]
    num_tokens,
    H: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    KB: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_x = tl.program_id(1).to(tl.int64)
    m_t = o_t < num_tokens
    o_read = o_t * (2 * H) + i_x
    o_t = tl.minimum(o_t, num_tokens - 1)
    query += i_x * C
    sub_keys += (i_x % 2 * H + i_x // 2) * (N * C)

    b_count = tl.load(counts + o_read, mask=m_t, other=K)
    m_redo = (b_count > KB) | (b_count < K)
    if tl.max(m_redo.to(tl.int32), axis=0) > 0:
        o_b = tl.arange(0, BLOCK_N)[None, :]
        # an order that at least K scores reach, and KB at most, or the K-th best where that is not
        # possible as too many are equal to it
        b_low = tl.full([BLOCK_T], INDEX, tl.int32)
        b_high = tl.full([BLOCK_T], LOWEST, tl.int32)
        for i_n in range(0, N, BLOCK_N):
            b_scores = _scores(query, sub_keys, o_t, i_n, H, N, C, BLOCK_N, BLOCK_C)
            b_order = to_order(b_scores)
            m_n = i_n + o_b < N
            b_low = tl.minimum(b_low, tl.min(tl.where(m_n, b_order, INDEX), axis=1))
            b_high = tl.maximum(b_high, tl.max(tl.where(m_n, b_order, LOWEST), axis=1))
        b_count = tl.where(m_redo, N, 0)
        i_step = 0
        while tl.max(tl.where(b_low < b_high, b_count, 0), axis=0) > KB:
            b_mid = middle(b_low, b_high)
            b_mean = to_order(0.5 * (to_score(b_low) + to_score(b_high)))
            b_mid = tl.where((i_step < 12) & (b_mean > b_low) & (b_mean <= b_high), b_mean, b_mid)
            b_reach = tl.zeros([BLOCK_T], tl.int32)
            for i_n in range(0, N, BLOCK_N):
                b_scores = _scores(query, sub_keys, o_t, i_n, H, N, C, BLOCK_N, BLOCK_C)
                m_reach = (to_order(b_scores) >= b_mid[:, None]) & (i_n + o_b < N)
                b_reach += _count(m_reach)
            m_enough = b_reach >= K
            b_count = tl.where(m_enough, tl.minimum(b_count, b_reach), b_count)
            b_high = tl.where(m_enough, b_high, tl.maximum(b_mid - 1, b_low))
            b_low = tl.where(m_enough, b_mid, b_low)
            i_step += 1
        b_above = tl.zeros([BLOCK_T], tl.int32)
        for i_n in range(0, N, BLOCK_N):
            b_scores = _scores(query, sub_keys, o_t, i_n, H, N, C, BLOCK_N, BLOCK_C)
            m_above = (to_order(b_scores) > b_low[:, None]) & (i_n + o_b < N)
            b_above += _count(m_above)
        b_equal = tl.zeros([BLOCK_T], tl.int32)
        b_used = tl.zeros([BLOCK_T], tl.int32)
        for i_n in range(0, N, BLOCK_N):
            b_scores = _scores(query, sub_keys, o_t, i_n, H, N, C, BLOCK_N, BLOCK_C)
            b_order = to_order(b_scores)
            m_n = i_n + o_b < N
            m_equal = (b_order == b_low[:, None]) & m_n
            b_nth = b_equal[:, None] + tl.cumsum(m_equal.to(tl.int32), axis=1)
            m_keep = ((b_order > b_low[:, None]) & m_n) | (
                m_equal & (b_nth <= (KB - b_above)[:, None])
            )
            m_keep &= m_redo[:, None]
            b_place = b_used[:, None] + tl.cumsum(m_keep.to(tl.int32), axis=1) - 1
            b_place = tl.where(m_keep, b_place, KB)
            b_packed = pack(b_scores.to(tl.int32, bitcast=True), i_n + o_b)
            tl.store((slots + o_read * KB)[:, None] + b_place, b_packed, mask=b_place < KB)
            b_used += _count(m_keep)
            b_equal += _count(m_equal)
        # other threads have loaded these counts
        tl.debug_barrier()
        tl.store(counts + o_read, b_used, mask=m_redo)


@triton.jit
def _store_best(b_packed, scratch, K: tl.constexpr):
    """Store the K largest entries of each line, in any order.

    Args:
        b_packed: [Y, B] packed scores, all different, and EMPTY; a line has at least K that are
            not EMPTY, or none.
        scratch: [Y, 1], where each line's are stored.
    """
    m_there = b_packed != EMPTY
    b_order = (b_packed >> 32).to(tl.int32)
    b_low = tl.min(tl.where(m_there, b_order, INDEX), axis=1)
    b_high = tl.max(b_order, axis=1)
    b_count = _count(m_there)
    i_step = 0
    while tl.max(tl.where(b_low < b_high, b_count, 0), axis=0) > K:
        b_mid = middle(b_low, b_high)
        # scores are distributed more evenly than their bits; the mean of infinities is not used
        b_mean = to_order(0.5 * (to_score(b_low) + to_score(b_high)))
        b_mid = tl.where((i_step < 12) & (b_mean > b_low) & (b_mean <= b_high), b_mean, b_mid)
        b_reach = _count(b_order >= b_mid[:, None])
        m_enough = b_reach >= K
        b_count = tl.where(m_enough, b_reach, b_count)
        b_high = tl.where(m_enough, b_high, tl.maximum(b_mid - 1, b_low))
        b_low = tl.where(m_enough, b_mid, b_low)
        i_step += 1
    # of scores that are equal to the K-th best, those with the smallest indices
    b_low = b_low.to(tl.int64) << 32
    b_high = b_low | INDEX
    while tl.max(b_count, axis=0) > K:
        b_mid = middle(b_low, b_high)
        b_reach = _count(b_packed >= b_mid[:, None])
        m_enough = b_reach >= K
        b_count = tl.where(m_enough, b_reach, b_count)
        b_high = tl.where(m_enough, b_high, b_mid - 1)
        b_low = tl.where(m_enough, b_mid, b_low)
    m_keep = m_there & (b_packed >= b_low[:, None])
    b_place = tl.cumsum(m_keep.to(tl.int32), axis=1) - 1
    tl.store(scratch + b_place, b_packed, mask=m_keep)


@triton.jit
def _rank(b_packed, scratch, K: tl.constexpr, BLOCK_J: tl.constexpr):
    """Return [Y, KP], how many of the K stored entries of its line are larger than each entry."""
    b_larger = tl.zeros([b_packed.shape[0], b_packed.shape[1], BLOCK_J], tl.float32)
    for i_j in range(0, K, BLOCK_J):
        o_j = i_j + tl.arange(0, BLOCK_J)[None, None, :]
        b_other = tl.load(scratch[:, :, None] + o_j, mask=o_j < K, other=EMPTY)
        b_larger += (b_other > b_packed[:, :, None]).to(tl.float32)
    return tl.sum(b_larger, axis=2).to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens"])
def _pairs_kernel(
    slots,  # [T, X, KB]
    counts,  # [T, X]
    ranks,  # [2, P]
    scratch,  # [T, X, 2, KP]
    best_scores,  # [T, H, K]
    row_ids,  # [T, H, K]
    num_tokens,
    num_pairs,
    H: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    KB: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_J: tl.constexpr,
    READS: tl.constexpr,
):
    i_read = tl.program_id(0).to(tl.int64) * READS
    # halves of reads
    o_y = i_read * 2 + tl.arange(0, 2 * READS)[:, None]
    m_y = o_y < num_tokens * (2 * H)
    o_b = tl.arange(0, KB)[None, :]
    o_k = tl.arange(0, KP)[None, :]
    b_count = tl.load(counts + o_y, mask=m_y, other=0)
    b_slot = tl.load(slots + o_y * KB + o_b, mask=o_b < b_count, other=0)
    b_order = to_order((b_slot >> 32).to(tl.int32).to(tl.float32, bitcast=True))
    b_packed = pack(b_order, (b_slot & INDEX).to(tl.int32) ^ INDEX)
    p_best = scratch + o_y * (2 * KP)
    _store_best(tl.where(o_b < b_count, b_packed, EMPTY), p_best, K)
    # other threads stored what is read here and below
    tl.debug_barrier()
    b_best = tl.load(p_best + o_k, mask=m_y & (o_k < K), other=EMPTY)
    b_rank = _rank(b_best, p_best, K, BLOCK_J)
    tl.store(p_best + KP + b_rank, b_best, mask=b_best != EMPTY)
    tl.debug_barrier()

    o_r = i_read + tl.arange(0, READS)[:, None]
    m_r = o_r < num_tokens * H
    o_p = tl.arange(0, BLOCK_P)[None, :]
    m_p = m_r & (o_p < num_pairs)
    p_ranks = ranks + tl.minimum(o_p, num_pairs - 1)
    # the left half's best are in order behind its candidates, then the same of the right half
    p_left = scratch + o_r * (4 * KP)
    b_left = tl.load(p_left + KP + tl.load(p_ranks), mask=m_p, other=0)
    b_right = tl.load(p_left + 3 * KP + tl.load(p_ranks + num_pairs), mask=m_p, other=0)
    b_sum = to_score((b_left >> 32).to(tl.int32)) + to_score((b_right >> 32).to(tl.int32))
    b_i = (b_left & INDEX).to(tl.int32) ^ INDEX
    b_j = (b_right & INDEX).to(tl.int32) ^ INDEX
    b_pairs = tl.where(m_p, pack(to_order(b_sum), b_i * N + b_j), EMPTY)
    _store_best(b_pairs, p_left, K)
    tl.debug_barrier()
    b_pair = tl.load(p_left + o_k, mask=m_r & (o_k < K), other=EMPTY)
    o_out = o_r * K + _rank(b_pair, p_left, K, BLOCK_J)
    tl.store(best_scores + o_out, to_score((b_pair >> 32).to(tl.int32)), mask=b_pair != EMPTY)
    tl.store(row_ids + o_out, (b_pair & INDEX) ^ INDEX, mask=b_pair != EMPTY)


def product_topk(
    query_THQ: Tensor, sub_keys_2HNC: Tensor, topk: int, reads: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the best `topk` of the N*N product keys for every token and head.

    Args:
        query_THQ: queries, contiguous; Q = 2C, left half first.
        sub_keys_2HNC: the left and the right sub-keys, contiguous and of the same dtype.
        topk: K, at most N and MAX_TOPK, as more do not fit into registers.
        reads: reads that a program of _pairs_kernel computes, a power of two; by default 1, and
            more in Triton's interpreter.

    Returns:
        scores_THK: fp32, descending.
        row_ids_THK: int64, row = i * N + j.
    """
    (num_tokens, heads, _), device = query_THQ.shape, query_THQ.device
    num_keys, key_dim = sub_keys_2HNC.shape[2:]
    scores_THK = torch.empty(num_tokens, heads, topk, dtype=torch.float32, device=device)
    row_ids_THK = torch.empty(num_tokens, heads, topk, dtype=torch.int64, device=device)
    padded, num_slots = padded_topk(topk), slots_of_a_half(num_keys, topk)
    if knobs.runtime.interpret:
        # Triton's interpreter cannot multiply bf16; scores in fp32 are the same
        query_THQ, sub_keys_2HNC = query_THQ.float(), sub_keys_2HNC.float()
    chosen = choices.current().product_topk
    fp32 = query_THQ.dtype == torch.float32
    block_n = max(MIN_BLOCK_N, 4 * padded)
    sizes = {"H": heads, "N": num_keys, "K": topk, "KB": num_slots}
    widths = {
        "C": key_dim,
        "BLOCK_N": block_n,
        "BLOCK_C": min(
            FP32_BLOCK_C if fp32 else chosen.fused_block_c,
            max(16, triton.next_power_of_2(key_dim)),
        ),
        "num_stages": FP32_NUM_STAGES if fp32 else chosen.fused_stages,
        "num_warps": chosen.fused_warps,
    }
    block_t = min(chosen.fused_block_t, (FP32_TILE if fp32 else chosen.fused_tile) // block_n)
    exact_block_t = (FP32_EXACT_TILE if fp32 else chosen.fused_exact_tile) // block_n
    ranks_2P = staircase(topk, device)
    num_pairs = ranks_2P.shape[1]
    block_p = max(padded, triton.next_power_of_2(num_pairs))
    if reads is None:
        several = min(16, max(1, 1024 // block_p), triton.next_power_of_2(num_tokens * heads))
        reads = several if knobs.runtime.interpret else 1
    piece = tokens_of_a_piece(num_keys, heads, topk)
    for start in range(0, num_tokens, piece):
        query = query_THQ[start : start + piece]
        count = len(query)
        slots = torch.empty(count, 2 * heads, num_slots, dtype=torch.int64, device=device)
        counts = torch.zeros(count, 2 * heads, dtype=torch.int32, device=device)
        scratch = torch.empty(count, 2 * heads, 2, padded, dtype=torch.int64, device=device)
        _candidates_kernel[(triton.cdiv(count, block_t), 2 * heads)](
            query,
            sub_keys_2HNC,
            slots,
            counts,
            count,
            FIRST=keys_of_first_look(num_keys, block_n),
            BLOCK_T=block_t,
            **sizes,
            **widths,
            **OPTIONS,
        )
        _exact_kernel[(triton.cdiv(count, exact_block_t), 2 * heads)](
            query,
            sub_keys_2HNC,
            slots,
            counts,
            count,
            BLOCK_T=exact_block_t,
            **sizes,
            **widths,
            **OPTIONS,
        )
        _pairs_kernel[(triton.cdiv(count * heads, reads),)](
            slots,
            counts,
            ranks_2P,
            scratch,
            scores_THK[start : start + piece],
            row_ids_THK[start : start + piece],
            count,
            num_pairs,
            KP=padded,
            BLOCK_P=block_p,
            BLOCK_J=min(BLOCK_J, padded),
            READS=reads,
            num_warps=1,
            **sizes,
            **OPTIONS,
        )
    return scores_THK, row_ids_THK


def _looks_at_all(num_keys: int) -> bool:
    return num_keys <= choices.current().product_topk.fused_full_look


def slots_of_a_half(num_keys: int, topk: int) -> int:
    """Return KB, how many candidates each half of a read may have, a power of two."""
    slots = FULL_LOOK_SLOTS if _looks_at_all(num_keys) else SLOTS
    return slots * max(16, padded_topk(topk))


def keys_of_first_look(num_keys: int, block_n: int) -> int:
    """Return how many sub-keys set the threshold, a multiple of the block."""
    share = 1 if _looks_at_all(num_keys) else FIRST_SHARE
    return triton.cdiv(triton.cdiv(num_keys, share), block_n) * block_n


def tokens_of_a_piece(num_keys: int, heads: int, topk: int) -> int:
    """Return the tokens whose candidates of both halves take fused_bytes, at least a block."""
    chosen = choices.current().product_topk
    tokens = chosen.fused_bytes // (16 * heads * slots_of_a_half(num_keys, topk))
    return max(1, tokens // chosen.fused_block_t) * chosen.fused_block_t
