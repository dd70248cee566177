"""Backward of product_topk by a dense gradient of the scores: the form `dense`.

    _score_gradient_kernel   scores_XTN: what is added to the gradient of each score, most of it 0
    torch.bmm                gradient of the queries = scores_XTN @ sub-keys
                             gradient of the sub-keys = scores_XTN^T @ queries

A sub-key may occur in several of the K pairs of a read. The kernel adds their gradients in the
order of the pairs, in fp32, for each pair that has this sub-key; all of them then hold the same sum
and store it to the same place. Hence there is neither an atomic addition nor a sort, and repeated
runs agree bit for bit. Tokens are processed in pieces whose dense gradient is small, and the
gradient of the sub-keys is added up in fp32, piece after piece.

The other form, `bags`, gathers K rows per read and half twice, and sorts the 2 T H K lookups in
between; what it takes does not depend on N. Here the products take 8 T H N C FLOPs, and the dense
gradient is written once and read twice, both proportional to N. At T = 8192, H = 4, K = 32 and
C = 512 in bf16, `bags` gathers 4.3 GB, and has temporaries of 67 MB for ids, for sorted ids and
for half queries. For N = 1024 the products are 137 GFLOP, 0.2 ms of an H100, and 134 MB are
written and read twice; for N = 16384 both are 16 times as much. So megamem.ops.product_topk uses
this form up to MAX_KEYS sub-keys, and `bags` beyond, where the zeros would cost more than the
gathers.

Precision: the gradient of a score is rounded to the dtype of queries and sub-keys before it is
multiplied, as products of bf16 on tensor cores need. In bf16 each term has a relative error of at
most 2^-8, so that sums have at most 2^-8 times the sum of their terms' absolute values, to which
the rounding of the result adds up to 2^-8 of it. fp32 is not rounded. fp16 has too small a range
for gradients; megamem.ops.product_topk uses `bags` for it.

As zeros are multiplied too, a query or sub-key that is not finite makes the gradients of its whole
set so, as in the reference.

Letters: T tokens, H heads, Q = 2C query width, C sub-key width, N sub-keys per half, K top-k,
X = 2H sets of sub-keys (set 2h + z is half z of head h), KP is K rounded up to a power of two;
2 halves. Prefixes in kernels: i_ an index, o_ offsets, m_ a mask, b_ a block in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamem.kernels import choices
from megamem.kernels.embedding_bag import OPTIONS
from megamem.kernels.product_topk import multiply, sets_of

# the largest N for which this form is used: at 4096 it would take as long as `bags`
MAX_KEYS = 2048


@triton.jit
def _sub_key(b_row, i_half, N: tl.constexpr):
    """Return the sub-key of one half of rows i * N + j."""
    b_row = b_row.to(tl.int32)
    return tl.where(i_half == 0, b_row // N, b_row % N)


@triton.jit(do_not_specialize=["num_tokens"])
def _score_gradient_kernel(
    grads,  # [T, H, K]
    row_ids,  # [T, H, K]
    dense,  # [X, T, N]
    num_tokens,
    H: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_x = tl.program_id(1).to(tl.int64)
    o_k = tl.arange(0, KP)[None, :]
    m_t = (o_t < num_tokens)[:, None]
    m_k = m_t & (o_k < K)
    p_dense = dense + (i_x * num_tokens + o_t)[:, None] * N
    o_read = ((o_t * H + i_x // 2) * K)[:, None]

    o_n = tl.arange(0, BLOCK_N)[None, :]
    b_zero = tl.zeros([BLOCK_T, BLOCK_N], dense.dtype.element_ty)
    for i_n in range(0, N, BLOCK_N):
        tl.store(p_dense + i_n + o_n, b_zero, mask=m_t & (i_n + o_n < N))

    b_key = _sub_key(tl.load(row_ids + o_read + o_k, mask=m_k, other=0), i_x % 2, N)
    b_sum = tl.zeros([BLOCK_T, KP], tl.float32)
    for i_k in range(K):
        # [BLOCK_T, 1]
        b_other = _sub_key(tl.load(row_ids + o_read + i_k, mask=m_t, other=0), i_x % 2, N)
        b_grad = tl.load(grads + o_read + i_k, mask=m_t, other=0.0)
        b_sum += tl.where(b_key == b_other, b_grad, 0.0)
    # other threads have stored these zeros
    tl.debug_barrier()
    tl.store(p_dense + b_key, b_sum.to(dense.dtype.element_ty), mask=m_k)


def score_gradient(
    grad_THK: Tensor, row_ids_THK: Tensor, num_keys: int, dtype: torch.dtype
) -> Tensor:
    """Return [X, T, N], the gradient of the score of every sub-key, in `dtype`."""
    num_tokens, heads, topk = row_ids_THK.shape
    dense_XTN = torch.empty(2 * heads, num_tokens, num_keys, dtype=dtype, device=row_ids_THK.device)
    padded = triton.next_power_of_2(topk)
    chosen = choices.current().product_topk_backward
    block_t = max(1, chosen.tile // padded)
    _score_gradient_kernel[(triton.cdiv(num_tokens, block_t), 2 * heads)](
        grad_THK,
        row_ids_THK,
        dense_XTN,
        num_tokens,
        H=heads,
        N=num_keys,
        K=topk,
        KP=padded,
        BLOCK_T=block_t,
        BLOCK_N=min(triton.next_power_of_2(num_keys), chosen.zeros_tile // block_t),
        num_warps=chosen.num_warps,
        **OPTIONS,
    )
    return dense_XTN


def product_topk_backward(
    grad_THK: Tensor,
    row_ids_THK: Tensor,
    query_THQ: Tensor,
    sub_keys_2HNC: Tensor,
    want_query: bool = True,
    want_keys: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the queries and of the sub-keys, in their dtype.

    Args:
        grad_THK: gradients of the scores, fp32.
        row_ids_THK: row ids that product_topk returned.
        query_THQ: its queries, contiguous, in bf16 or fp32.
        sub_keys_2HNC: its sub-keys, in the same dtype.
        want_query: whether the queries need a gradient; None is returned otherwise.
        want_keys: the same for the sub-keys.
    """
    num_tokens, heads, _ = query_THQ.shape
    _, _, num_keys, key_dim = sub_keys_2HNC.shape
    sets_XNC = sets_of(sub_keys_2HNC)
    # every element is written below, unless there are no tokens
    grad_query_THQ = torch.empty_like(query_THQ) if want_query else None
    grad_XNC = torch.zeros_like(sets_XNC, dtype=torch.float32) if want_keys else None
    piece = tokens_of_a_piece(num_keys, heads, query_THQ.dtype)
    for start in range(0, num_tokens, piece):
        tokens = slice(start, start + piece)
        dense_XTN = score_gradient(grad_THK[tokens], row_ids_THK[tokens], num_keys, query_THQ.dtype)
        if grad_query_THQ is not None:
            out_XTC = _by_set(grad_query_THQ[tokens], heads, key_dim)
            if dense_XTN.is_cuda:
                torch.bmm(dense_XTN, sets_XNC, out=out_XTC)
            else:
                out_XTC.copy_(multiply(dense_XTN, sets_XNC))
        if grad_XNC is not None:
            query_XTC = _by_set(query_THQ[tokens], heads, key_dim)
            grad_XNC += multiply(dense_XTN.transpose(1, 2), query_XTC)
    if grad_XNC is None:
        return grad_query_THQ, None
    grad_2HNC = grad_XNC.to(sub_keys_2HNC.dtype).unflatten(0, (heads, 2)).transpose(0, 1)
    return grad_query_THQ, grad_2HNC.contiguous()


def _by_set(query_THQ: Tensor, heads: int, key_dim: int) -> Tensor:
    """Return [X, T, C], a view of queries by the set of sub-keys that they are compared with."""
    return query_THQ.view(len(query_THQ), 2 * heads, key_dim).transpose(0, 1)


def tokens_of_a_piece(num_keys: int, heads: int, dtype: torch.dtype) -> int:
    """Return the tokens whose dense gradient is formed at once, at least one."""
    dense_bytes = choices.current().product_topk_backward.dense_bytes
    return max(1, dense_bytes // (2 * heads * num_keys * dtype.itemsize))
