"""Triton kernels of product_topk; megamem.reference.product_topk specifies them.

    product_topk   _half_topk_kernel   the best K sub-keys of each half, best first
                   _pair_kernel        the best K pairs of these

A score and its index travel as one int64, so that one comparison orders both:

    63          32 31        0
    | score, order | ~index |      larger score first, then smaller index; no two are equal

_half_topk_kernel owns BLOCK_T tokens of one head and half. Their queries stay on the
multiprocessor while the sub-keys pass by in blocks of 2 KP, KP being K or a little more. No score
tensor exists: a block's scores stay in registers, and only those above a threshold go to a short
buffer beside the best so far. Where a buffer could not take another whole block, all are merged
into the best, and the K-th best becomes the threshold. Few scores pass after the first blocks, so
merges become rare.

    slots of a token   | best KP, sorted | buffer 3 KP - 1 | count |

_merge is a function of its own (noinline): a loop in the body would keep Triton from fetching the
next block of sub-keys while this one is scored.

_pair_kernel needs K ln K sums, not K * K: the pair of ranks (a, b) can win only if a * b <= K.

The backward is the embedding bag's: a token's query gradient is a bag of the sub-keys it chose,
weighted by the gradients of their scores (megamem.ops.product_topk).
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TOPK = 64
MAX_BLOCK_C = 256
SORT_TILE = 2048
PAIR_TILE = 1024
OPTIONS = {"enable_fp_fusion": True}
_LOWEST = tl.constexpr(-(2**31))
_EMPTY = tl.constexpr(-(2**63))
_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def _to_order(b_score):
    """int32 that compares as the fp32 scores do; above _LOWEST, equal for -0 and 0, NaN highest."""
    b_bits = tl.where(b_score == b_score, (b_score + 0.0).to(tl.int32, bitcast=True), _INDEX)
    return b_bits ^ ((b_bits >> 31) & _INDEX)


@triton.jit
def _to_score(b_order):
    return (b_order ^ ((b_order >> 31) & _INDEX)).to(tl.float32, bitcast=True)


@triton.jit
def _pack(b_order, b_index):
    return (b_order.to(tl.int64) << 32) | (b_index ^ _INDEX).to(tl.int64)


@triton.jit(noinline=True)
def _merge(
    slots,
    num_left,
    H: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SORT_T: tl.constexpr,
):
    """Merge the buffers, whose counts stand in their last slots, into the best."""
    STRIDE: tl.constexpr = H * 4 * KP
    o_s = tl.arange(0, 4 * KP)
    o_k = tl.arange(0, KP)
    # what other threads appended must have arrived
    tl.debug_barrier()
    for i_t in range(0, BLOCK_T, SORT_T):
        o_u = i_t + tl.arange(0, SORT_T)
        m_u = o_u < num_left
        b_count = tl.load(slots + o_u * STRIDE + 4 * KP - 1, mask=m_u, other=0).to(tl.int32)
        o_all = slots + (o_u * STRIDE)[:, None] + o_s[None, :]
        m_full = m_u[:, None] & (o_s[None, :] < KP + b_count[:, None])
        b_best = tl.topk(tl.load(o_all, mask=m_full, other=_EMPTY), KP)
        tl.debug_barrier()
        tl.store(slots + (o_u * STRIDE)[:, None] + o_k[None, :], b_best, mask=m_u[:, None])
    tl.debug_barrier()


@triton.jit(do_not_specialize=["num_tokens"])
def _half_topk_kernel(
    query,  # [T, H, 2C]
    sub_keys,  # [2, H, N, C]
    slots,  # [2, T, H, 4KP]
    num_tokens,
    H: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SORT_T: tl.constexpr,
    UPCAST: tl.constexpr,
):
    i_h = tl.program_id(1).to(tl.int64)
    i_z = tl.program_id(2).to(tl.int64)
    i_t = tl.program_id(0).to(tl.int64) * BLOCK_T
    # one int64 base each; the offsets of a tile fit into int32, which saves registers
    slots += ((i_z * num_tokens + i_t) * H + i_h) * (4 * KP)
    query += (i_t * H + i_h) * (2 * C) + i_z * C
    sub_keys += (i_z * H + i_h) * N * C
    num_left = tl.minimum(num_tokens - i_t, BLOCK_T).to(tl.int32)
    BLOCK_N: tl.constexpr = 2 * KP
    STRIDE: tl.constexpr = H * 4 * KP
    o_t = tl.arange(0, BLOCK_T)
    o_n = tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, BLOCK_C)
    m_t = o_t < num_left
    o_slots = slots + (o_t * (H * 4 * KP))[:, None]
    o_query = query + (o_t * (H * 2 * C))[:, None] + o_c[None, :]
    # [BLOCK_C, BLOCK_N]
    o_keys = sub_keys + (o_n * C)[None, :] + o_c[:, None]

    b_empty = tl.full([BLOCK_T, KP], _EMPTY, tl.int64)
    tl.store(o_slots + tl.arange(0, KP)[None, :], b_empty, mask=m_t[:, None])
    if C <= BLOCK_C:
        b_query = tl.load(o_query, mask=m_t[:, None] & (o_c < C)[None, :], other=0.0)
        if UPCAST:
            b_query = b_query.to(tl.float32)
    b_low = tl.full([BLOCK_T], _LOWEST, tl.int32)
    b_used = tl.zeros([BLOCK_T], tl.int32)
    for i_n in tl.range(0, N, BLOCK_N, disable_licm=True):
        m_n = i_n + o_n < N
        b_scores = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        if C <= BLOCK_C:
            b_keys = tl.load(o_keys, mask=m_n[None, :] & (o_c < C)[:, None], other=0.0)
            if UPCAST:
                b_keys = b_keys.to(tl.float32)
            b_scores = tl.dot(b_query, b_keys, b_scores, input_precision="tf32x3")
        else:
            for i_c in range(0, C, BLOCK_C):
                m_c = i_c + o_c < C
                b_part = tl.load(o_query + i_c, mask=m_t[:, None] & m_c[None, :], other=0.0)
                b_keys = tl.load(o_keys + i_c, mask=m_n[None, :] & m_c[:, None], other=0.0)
                if UPCAST:
                    b_part, b_keys = b_part.to(tl.float32), b_keys.to(tl.float32)
                b_scores = tl.dot(b_part, b_keys, b_scores, input_precision="tf32x3")
        b_order = tl.where(m_n[None, :], _to_order(b_scores), _LOWEST)

        m_pass = (b_order > b_low[:, None]) & m_t[:, None]
        b_rank = tl.cumsum(m_pass.to(tl.int32), axis=1)
        b_packed = _pack(b_order, (i_n + o_n)[None, :])
        tl.store(o_slots + (KP - 1) + b_used[:, None] + b_rank, b_packed, mask=m_pass)
        b_used += tl.sum(m_pass.to(tl.int32), axis=1)
        # the next block may need 2 KP places, and one is the count's
        if (tl.max(b_used, axis=0) >= KP) | (i_n + BLOCK_N >= N):
            tl.store(slots + o_t * STRIDE + 4 * KP - 1, b_used.to(tl.int64), mask=m_t)
            _merge(slots, num_left, H, KP, BLOCK_T, SORT_T)
            b_last = tl.load(slots + o_t * STRIDE + K - 1, mask=m_t, other=_EMPTY)
            b_low = tl.maximum(b_low, (b_last >> 32).to(tl.int32))
            b_used = tl.zeros([BLOCK_T], tl.int32)
        o_keys += BLOCK_N * C


@triton.jit(do_not_specialize=["num_reads"])
def _pair_kernel(
    slots,  # [2, J, 4KP] with J = T * H reads
    ranks,  # [2, P]
    scores,  # [J, K]
    row_ids,  # [J, K]
    num_reads,
    num_pairs,
    N: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    o_j = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    o_p = tl.arange(0, BLOCK_P)
    m_p = o_p < num_pairs
    m_jp = (o_j < num_reads)[:, None] & m_p[None, :]
    b_left_rank = tl.load(ranks + o_p, mask=m_p, other=0)
    b_right_rank = tl.load(ranks + num_pairs + o_p, mask=m_p, other=0)
    o_left = slots + (o_j * (4 * KP))[:, None]
    o_right = slots + ((num_reads + o_j) * (4 * KP))[:, None]
    b_left = tl.load(o_left + b_left_rank[None, :], mask=m_jp, other=0)
    b_right = tl.load(o_right + b_right_rank[None, :], mask=m_jp, other=0)

    b_sum = _to_score((b_left >> 32).to(tl.int32)) + _to_score((b_right >> 32).to(tl.int32))
    b_i = (b_left & _INDEX).to(tl.int32) ^ _INDEX
    b_j = (b_right & _INDEX).to(tl.int32) ^ _INDEX
    b_pairs = tl.where(m_jp, _pack(_to_order(b_sum), b_i * N + b_j), _EMPTY)
    # [BLOCK_J, KP]
    b_best = tl.topk(b_pairs, KP)

    o_k = tl.arange(0, KP)
    m_jk = (o_j < num_reads)[:, None] & (o_k < K)[None, :]
    o_out = (o_j * K)[:, None] + o_k[None, :]
    tl.store(scores + o_out, _to_score((b_best >> 32).to(tl.int32)), mask=m_jk)
    tl.store(row_ids + o_out, (b_best & _INDEX) ^ _INDEX, mask=m_jk)


def product_topk(
    query_THQ: Tensor, sub_keys_2HNC: Tensor, topk: int, interpreted: bool = False
) -> tuple[Tensor, Tensor]:
    """The best `topk` of the N*N product keys for every token and head.

    Args:
        interpreted: multiply in fp32, as Triton's interpreter cannot multiply bf16, and in small
            tiles, as it takes its time.

    Returns:
        scores_THK: fp32, best first.
        row_ids_THK: int64.
    """
    (num_tokens, heads, _), device = query_THQ.shape, query_THQ.device
    _, _, num_keys, key_dim = sub_keys_2HNC.shape
    scores_THK = torch.empty(num_tokens, heads, topk, dtype=torch.float32, device=device)
    row_ids_THK = torch.empty(num_tokens, heads, topk, dtype=torch.int64, device=device)
    if num_tokens == 0:
        return scores_THK, row_ids_THK
    padded = max(8 if interpreted else 32, triton.next_power_of_2(topk))
    narrow = query_THQ.element_size() == 2
    block_t = 16 if interpreted else 64
    block_c = max(16, triton.next_power_of_2(key_dim))
    slots = torch.empty(2, num_tokens, heads, 4 * padded, dtype=torch.int64, device=device)
    _half_topk_kernel[(triton.cdiv(num_tokens, block_t), heads, 2)](
        query_THQ,
        sub_keys_2HNC,
        slots,
        num_tokens,
        H=heads,
        N=num_keys,
        C=key_dim,
        K=topk,
        KP=padded,
        BLOCK_T=block_t,
        BLOCK_C=min(block_c, MAX_BLOCK_C if narrow else 32),
        # what sorts 4 KP numbers each in registers
        SORT_T=min(block_t // 2, SORT_TILE // (4 * padded)),
        UPCAST=interpreted,
        num_warps=8,
        num_stages=2,
        **OPTIONS,
    )
    ranks_2P = _staircase(topk, device)
    num_pairs = ranks_2P.shape[1]
    block_p = max(padded, triton.next_power_of_2(num_pairs))
    block_j = PAIR_TILE // block_p
    num_reads = num_tokens * heads
    _pair_kernel[(triton.cdiv(num_reads, block_j),)](
        slots,
        ranks_2P,
        scores_THK,
        row_ids_THK,
        num_reads,
        num_pairs,
        N=num_keys,
        K=topk,
        KP=padded,
        BLOCK_J=block_j,
        BLOCK_P=block_p,
        num_warps=4,
        **OPTIONS,
    )
    return scores_THK, row_ids_THK


@lru_cache
def _staircase(topk: int, device: torch.device) -> Tensor:
    """The P pairs of ranks (a, b), counted from 0, with (a + 1) * (b + 1) <= topk."""
    pairs = [(a, b) for a in range(topk) for b in range(topk // (a + 1))]
    return torch.tensor(pairs, dtype=torch.int32, device=device).T.contiguous()
