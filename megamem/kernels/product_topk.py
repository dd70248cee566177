"""Triton kernel of product_topk; megamem.reference.product_topk specifies the result.

    scores of all sub-keys    torch.bmm, on some tokens at a time, so that the scores stay small
    _two_looks_kernel         the best K sub-keys of each half, then the best K pairs of these

A program is one warp and computes one read: both halves of one head of one token. It passes over
the scores twice. The first pass keeps the maximum of each of 4 KP interleaved groups, where KP is K
rounded up to a power of two, at least 8. The K-th largest maximum is a threshold that at least K
scores reach, and rarely more than 2 KP. The second pass collects the scores that reach it, of which
a sort selects the best K. (Triton's interpreter has a high cost per program, so there a program
computes several reads.)

If more than 2 KP scores reach the threshold, many scores are equal or almost equal. Then bisection
finds the K-th best score itself, and of the scores equal to it those with the smallest indices are
collected. This takes up to 32 more passes, and is exact for every input.

A score and its index are packed into one int64, so that one comparison orders both, with larger
scores first, then smaller indices, and no two are equal:

    63          32 31        0
    | score, order | ~index |

The pairs need about K ln K sums instead of K * K, as the pair of ranks (a, b), counted from 1, can
only be among the best K if a * b <= K.

The backward uses the kernels of embedding_bag: the gradient of a query is a bag of the sub-keys
that were chosen for it, weighted by the gradients of their scores (megamem.ops.product_topk).

Letters: T tokens, H heads, Q = 2C query width, C sub-key width, N sub-keys per half, K top-k,
P pairs of ranks, X = 2H sets of sub-keys, KB = 2 KP candidates; 2 halves. Prefixes in kernels: i_
an index, o_ offsets, m_ a mask, b_ a block in registers.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from megamem.kernels import choices
from megamem.kernels.embedding_bag import OPTIONS

MAX_TOPK = 128
LOWEST = tl.constexpr(-(2**31))
EMPTY = tl.constexpr(-(2**63))
INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def to_order(b_score):
    """Return int32 in the order of fp32 scores: above LOWEST, equal for -0 and 0, NaN highest."""
    b_bits = tl.where(b_score == b_score, (b_score + 0.0).to(tl.int32, bitcast=True), INDEX)
    return b_bits ^ ((b_bits >> 31) & INDEX)


@triton.jit
def to_score(b_order):
    return (b_order ^ ((b_order >> 31) & INDEX)).to(tl.float32, bitcast=True)


@triton.jit
def pack(b_order, b_index):
    return (b_order.to(tl.int64) << 32) | (b_index ^ INDEX).to(tl.int64)


@triton.jit
def middle(b_low, b_high):
    """Return the mean rounded up, computed without the sum, which could overflow int32."""
    return (b_low >> 1) + (b_high >> 1) + ((b_low | b_high) & 1)


@triton.jit
def _load_order(scores, o_n, mask):
    """Return [halves, GROUPS] scores as ordered int32; LOWEST where the mask is False."""
    return tl.where(mask, to_order(tl.load(scores + o_n, mask=mask, other=0.0)), LOWEST)


@triton.jit(do_not_specialize=["num_tokens"])
def _two_looks_kernel(
    scores,  # [H, 2, T, N]
    ranks,  # [2, P]
    candidates,  # [T, H, 2, KB]
    best_scores,  # [T, H, K]
    row_ids,  # [T, H, K]
    num_tokens,
    num_pairs,
    H: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    KB: tl.constexpr,
    GROUPS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    READS: tl.constexpr,
):
    i_read = tl.program_id(0).to(tl.int64) * READS
    # halves of reads
    o_y = tl.arange(0, 2 * READS)
    b_read = i_read + o_y // 2
    b_set = b_read % H * 2 + o_y % 2
    m_y = (b_read < num_tokens * H)[:, None]
    o_g = tl.arange(0, GROUPS)[None, :]
    scores += ((b_set * num_tokens + b_read // H) * N)[:, None]
    o_candidates = candidates + ((i_read * 2 + o_y) * KB)[:, None]

    # the first pass: a threshold that the maxima of at least K groups reach
    b_max = tl.full([2 * READS, GROUPS], LOWEST, tl.int32)
    for i in range(0, N, UNROLL * GROUPS):
        for u in tl.static_range(UNROLL):
            o_n = i + u * GROUPS + o_g
            b_max = tl.maximum(b_max, _load_order(scores, o_n, m_y & (o_n < N)))
    b_low = tl.min(b_max, axis=1)
    b_high = tl.max(b_max, axis=1)
    b_top = b_high
    b_count = tl.full([2 * READS], GROUPS, tl.int32)
    i_step = 0
    while (tl.max(b_count, axis=0) > K + K // 8) & (i_step < 40):
        b_mid = middle(b_low, b_high)
        # scores are distributed more evenly than their bits; the mean of infinities is not used
        b_mean = to_order(0.5 * (to_score(b_low) + to_score(b_high)))
        b_mid = tl.where((i_step < 12) & (b_mean > b_low) & (b_mean <= b_high), b_mean, b_mid)
        b_reach = tl.sum((b_max >= b_mid[:, None]).to(tl.int32), axis=1)
        m_enough = b_reach >= K
        b_count = tl.where(m_enough, b_reach, b_count)
        b_high = tl.where(m_enough, b_high, tl.maximum(b_mid - 1, b_low))
        b_low = tl.where(m_enough, b_mid, b_low)
        i_step += 1

    # the second pass: collect the scores that reach the threshold
    b_used = tl.zeros([2 * READS], tl.int32)
    for i in range(0, N, UNROLL * GROUPS):
        b_orders = ()
        for u in tl.static_range(UNROLL):
            o_n = i + u * GROUPS + o_g
            b_orders += (_load_order(scores, o_n, m_y & (o_n < N)),)
        for u in tl.static_range(UNROLL):
            o_n = i + u * GROUPS + o_g
            m_reach = (b_orders[u] >= b_low[:, None]) & m_y & (o_n < N)
            b_place = b_used[:, None] + tl.cumsum(m_reach.to(tl.int32), axis=1) - 1
            b_packed = pack(b_orders[u], o_n)
            tl.store(o_candidates + b_place, b_packed, mask=m_reach & (b_place < KB))
            b_used += tl.sum(m_reach.to(tl.int32), axis=1)

    if tl.max(b_used, axis=0) > KB:
        # many scores are (almost) equal: find the K-th best, and of its equals take the first
        b_high = b_top
        for _ in range(32):
            b_mid = middle(b_low, b_high)
            b_reach = tl.zeros([2 * READS], tl.int32)
            for i in range(0, N, GROUPS):
                b_order = _load_order(scores, i + o_g, m_y & (i + o_g < N))
                b_reach += tl.sum((b_order >= b_mid[:, None]).to(tl.int32), axis=1)
            b_low = tl.where(b_reach >= K, b_mid, b_low)
            b_high = tl.where(b_reach >= K, b_high, tl.maximum(b_mid - 1, b_low))
        b_above = tl.zeros([2 * READS], tl.int32)
        for i in range(0, N, GROUPS):
            b_order = _load_order(scores, i + o_g, m_y & (i + o_g < N))
            b_above += tl.sum((b_order > b_low[:, None]).to(tl.int32), axis=1)
        b_equal = tl.zeros([2 * READS], tl.int32)
        b_used = tl.zeros([2 * READS], tl.int32)
        # the candidates that the second pass stored are overwritten
        tl.debug_barrier()
        for i in range(0, N, GROUPS):
            m_there = m_y & (i + o_g < N)
            b_order = _load_order(scores, i + o_g, m_there)
            m_equal = (b_order == b_low[:, None]) & m_there
            b_nth = b_equal[:, None] + tl.cumsum(m_equal.to(tl.int32), axis=1)
            m_keep = (b_order > b_low[:, None]) | (m_equal & (b_nth <= (K - b_above)[:, None]))
            b_place = b_used[:, None] + tl.cumsum(m_keep.to(tl.int32), axis=1) - 1
            tl.store(o_candidates + b_place, pack(b_order, i + o_g), mask=m_keep)
            b_used += tl.sum(m_keep.to(tl.int32), axis=1)
            b_equal += tl.sum(m_equal.to(tl.int32), axis=1)

    # other threads stored what is read here and below
    tl.debug_barrier()
    o_b = tl.arange(0, KB)[None, :]
    b_candidates = tl.load(o_candidates + o_b, mask=o_b < b_used[:, None], other=EMPTY)
    b_best = tl.topk(b_candidates, KP)
    tl.debug_barrier()
    tl.store(o_candidates + tl.arange(0, KP)[None, :], b_best, mask=m_y)
    tl.debug_barrier()

    o_r = i_read + tl.arange(0, READS)[:, None]
    o_p = tl.arange(0, BLOCK_P)[None, :]
    m_r, m_p = o_r < num_tokens * H, o_p < num_pairs
    o_left = candidates + o_r * (2 * KB) + tl.load(ranks + o_p, mask=m_p, other=0)
    o_right = candidates + o_r * (2 * KB) + KB + tl.load(ranks + num_pairs + o_p, mask=m_p, other=0)
    b_left = tl.load(o_left, mask=m_r & m_p, other=0)
    b_right = tl.load(o_right, mask=m_r & m_p, other=0)
    b_sum = to_score((b_left >> 32).to(tl.int32)) + to_score((b_right >> 32).to(tl.int32))
    b_i = (b_left & INDEX).to(tl.int32) ^ INDEX
    b_j = (b_right & INDEX).to(tl.int32) ^ INDEX
    b_pairs = tl.where(m_p, pack(to_order(b_sum), b_i * N + b_j), EMPTY)
    b_pairs = tl.topk(b_pairs, KP)

    o_k = tl.arange(0, KP)[None, :]
    m_k = m_r & (o_k < K)
    tl.store(best_scores + o_r * K + o_k, to_score((b_pairs >> 32).to(tl.int32)), mask=m_k)
    tl.store(row_ids + o_r * K + o_k, (b_pairs & INDEX) ^ INDEX, mask=m_k)


def product_topk(
    query_THQ: Tensor, sub_keys_2HNC: Tensor, topk: int, reads: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the best `topk` of the N*N product keys for every token and head.

    Args:
        query_THQ: queries; Q = 2C, left half first.
        sub_keys_2HNC: the left and the right sub-keys.
        topk: K, at most N and MAX_TOPK.
        reads: reads that one program computes, a power of two; by default 1, and more in Triton's
            interpreter.

    Returns:
        scores_THK: fp32, descending.
        row_ids_THK: int64, row = i * N + j.
    """
    (num_tokens, heads, _), device = query_THQ.shape, query_THQ.device
    num_keys, key_dim = sub_keys_2HNC.shape[2:]
    scores_THK = torch.empty(num_tokens, heads, topk, dtype=torch.float32, device=device)
    row_ids_THK = torch.empty(num_tokens, heads, topk, dtype=torch.int64, device=device)
    padded = padded_topk(topk)
    groups = 4 * padded
    tile = choices.current().product_topk.tile
    unroll = max(1, min(8, tile // groups, triton.cdiv(num_keys, groups)))
    ranks_2P = staircase(topk, device)
    num_pairs = ranks_2P.shape[1]
    block_p = max(padded, triton.next_power_of_2(num_pairs))
    if reads is None:
        several = min(16, max(1, 1024 // block_p), triton.next_power_of_2(num_tokens * heads))
        reads = several if knobs.runtime.interpret else 1
    sets_XNC = sets_of(sub_keys_2HNC)
    piece = tokens_of_a_piece(num_keys, heads)
    for start in range(0, num_tokens, piece):
        query = query_THQ[start : start + piece]
        count = len(query)
        query_XTC = query.reshape(count, 2 * heads, key_dim).transpose(0, 1)
        scores_XTN = multiply(query_XTC, sets_XNC.transpose(1, 2))
        candidates = torch.empty(count, heads, 2, 2 * padded, dtype=torch.int64, device=device)
        _two_looks_kernel[(triton.cdiv(count * heads, reads),)](
            scores_XTN,
            ranks_2P,
            candidates,
            scores_THK[start : start + piece],
            row_ids_THK[start : start + piece],
            count,
            num_pairs,
            H=heads,
            N=num_keys,
            K=topk,
            KP=padded,
            KB=2 * padded,
            GROUPS=groups,
            UNROLL=1 << (unroll.bit_length() - 1),
            BLOCK_P=block_p,
            READS=reads,
            num_warps=1,
            **OPTIONS,
        )
    return scores_THK, row_ids_THK


def padded_topk(topk: int) -> int:
    """Return KP, half of the number of candidates that are kept for each half."""
    return max(8, triton.next_power_of_2(topk))


def tokens_of_a_piece(num_keys: int, heads: int) -> int:
    """Return the tokens whose fp32 scores of both halves are formed at once, at least one."""
    return max(1, choices.current().product_topk.score_bytes // (8 * heads * num_keys))


def sets_of(sub_keys_2HNC: Tensor) -> Tensor:
    """Return [X, N, C]: set 2h + z is half z of head h, in the order of the queries of a token."""
    return sub_keys_2HNC.transpose(0, 1).flatten(0, 1)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return the batched product of two tensors of one dtype, in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


@lru_cache
def staircase(topk: int, device: torch.device) -> Tensor:
    """Return [2, P], the pairs of ranks (a, b) from 0 with (a + 1) * (b + 1) <= topk."""
    pairs = [(a, b) for a in range(topk) for b in range(topk // (a + 1))]
    return torch.tensor(pairs, dtype=torch.int32, device=device).T.contiguous()
