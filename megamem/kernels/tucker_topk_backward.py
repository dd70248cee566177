"""Triton kernel of tucker_topk's backward: from the gradients of pairs to those of their sides.

A program computes one read, a head of a token. The weight of a pair is a^T C_c b with the scores a
of its row and b of its column, so a gradient g_c gives g_c C_c b to a, g_c C_c^T a to b and
g_c a b^T to the core. The gradients of all pairs of a row are summed by comparing the rows of
BLOCK_F pairs with all K, so nothing is added by atomics. Those of the cores are summed over the
pairs of a read; torch sums these over tokens. Every sum has a fixed order.

Letters: T tokens, H heads, A rank, O cores, K rows and columns kept of each read, F pairs; KP is K
rounded up to a power of two, at least 8, and CP is O * A * A rounded up; 2 sides. Prefixes in
kernels: i_ an index, o_ offsets, m_ a mask, b_ a block in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamem.kernels.embedding_bag import OPTIONS
from megamem.kernels.product_topk import padded_topk

# gradients of pairs that are compared with all rows at once
TILE = 2048


@triton.jit(do_not_specialize=["num_reads"])
def _pair_gradient_kernel(
    grads,  # [T, H, F, O]
    pairs,  # [T, H, F]
    sides,  # [2, T, H, A, K]
    cores,  # [O, H, A, A]
    side_grads,  # [2, T, H, A, K]
    core_grads,  # [T, H, O, A, A]
    num_reads,
    H: tl.constexpr,
    A: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    KP: tl.constexpr,
    F: tl.constexpr,
    CP: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    i_read = tl.program_id(0).to(tl.int64)
    i_column = num_reads + i_read
    grads += i_read * (F * O)
    pairs += i_read * F
    cores += i_read % H * (A * A)
    o_k = tl.arange(0, KP)
    for z in tl.static_range(2):
        other = sides + (i_read if z == 1 else i_column) * (A * K)
        out = side_grads + (i_column if z == 1 else i_read) * (A * K)
        for a in tl.static_range(A):
            b_sum = tl.zeros([KP], tl.float32)
            for i in range(0, F, BLOCK_F):
                o_f = i + tl.arange(0, BLOCK_F)
                m_f = o_f < F
                b_pair = tl.load(pairs + o_f, mask=m_f, other=0)
                b_here = b_pair % K if z == 1 else b_pair // K
                b_there = b_pair // K if z == 1 else b_pair % K
                b_grad = tl.zeros([BLOCK_F], tl.float32)
                for b in tl.static_range(A):
                    b_core = tl.zeros([BLOCK_F], tl.float32)
                    for o in tl.static_range(O):
                        o_core = o * H * A * A + (b * A + a if z == 1 else a * A + b)
                        b_given = tl.load(grads + o_f * O + o, mask=m_f, other=0.0)
                        b_core += b_given * tl.load(cores + o_core)
                    b_grad += b_core * tl.load(other + b * K + b_there, mask=m_f, other=0.0)
                m_same = (b_here[None, :] == o_k[:, None]) & m_f[None, :]
                b_sum += tl.sum(tl.where(m_same, b_grad[None, :], 0.0), axis=1)
            # for the check of the compiled kernel, which cannot tell these addresses apart
            tl.debug_barrier()
            tl.store(out + a * K + o_k, b_sum, mask=o_k < K)

    o_c = tl.arange(0, CP)
    b_cores = tl.zeros([CP], tl.float32)
    row, column = sides + i_read * (A * K), sides + i_column * (A * K)
    for i in range(0, F, BLOCK_F):
        o_f = i + tl.arange(0, BLOCK_F)
        m_f = o_f < F
        b_pair = tl.load(pairs + o_f, mask=m_f, other=0)
        for a in tl.static_range(A):
            b_row = tl.load(row + a * K + b_pair // K, mask=m_f, other=0.0)
            for b in tl.static_range(A):
                b_column = tl.load(column + b * K + b_pair % K, mask=m_f, other=0.0)
                for o in tl.static_range(O):
                    b_given = tl.load(grads + o_f * O + o, mask=m_f, other=0.0)
                    i_sum = tl.sum(b_given * b_row * b_column, axis=0)
                    b_cores += tl.where(o_c == (o * A + a) * A + b, i_sum, 0.0)
    tl.store(core_grads + i_read * (O * A * A) + o_c, b_cores, mask=o_c < O * A * A)


def tucker_topk_backward(
    grad_THFO: Tensor, pairs_THF: Tensor, sides_2THAK: Tensor, cores_OHAA: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the scores of the kept rows and columns, and of the cores.

    Args:
        grad_THFO: of the weights, contiguous.
        pairs_THF: int32, the places i * K + j of the pairs among the kept rows and columns.
        sides_2THAK: fp32, the scores of the kept rows and columns, contiguous.
        cores_OHAA: fp32, contiguous.

    Returns:
        grad_2THAK: fp32.
        grad_OHAA: fp32.
    """
    num_tokens, heads, final_topk, num_cores = grad_THFO.shape
    rank, topk = sides_2THAK.shape[3:]
    padded = padded_topk(topk)
    grad_2THAK = torch.empty_like(sides_2THAK)
    grads_THOAA = torch.empty(
        num_tokens, heads, num_cores, rank, rank, dtype=torch.float32, device=grad_THFO.device
    )
    if num_tokens:
        _pair_gradient_kernel[(num_tokens * heads,)](
            grad_THFO,
            pairs_THF,
            sides_2THAK,
            cores_OHAA,
            grad_2THAK,
            grads_THOAA,
            num_tokens * heads,
            H=heads,
            A=rank,
            O=num_cores,
            K=topk,
            KP=padded,
            F=final_topk,
            CP=triton.next_power_of_2(num_cores * rank * rank),
            BLOCK_F=min(triton.next_power_of_2(final_topk), max(1, TILE // padded)),
            num_warps=1 if final_topk * padded <= TILE else 4,
            **OPTIONS,
        )
    return grad_2THAK, grads_THOAA.sum(0).movedim(1, 0).contiguous()
