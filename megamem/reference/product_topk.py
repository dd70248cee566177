"""Exact product-key top-k: the specification of the op, whose kernel returns the same ids.

Letters: T tokens, H heads, Q = 2C query width, C sub-key width, N sub-keys per half, K top-k,
P pairs of ranks, X leading axes of any number, E lines with equal scores; 2 halves.
"""

import torch
from torch import Tensor


def product_topk(query_THQ: Tensor, sub_keys_2HNC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the best `topk` of the N*N product keys for every token and head.

    The score of a product key (i, j) is q_left . left_i + q_right . right_j, so each of the best K
    pairs consists of one of the best K left and one of the best K right sub-keys (Lample et al.
    2019, section 3.1). With both halves sorted (higher score first, then smaller index), the score
    of the pair of ranks (a, b), counted from 1, is at most that of each of the a*b pairs (a', b')
    with a' <= a and b' <= b. Hence only pairs with a*b <= K can be among the best K, which are
    about K ln K instead of K*K.

    Among these, higher sums win, and of equal sums the smaller row id. Where sums are exact, the
    result is that of an exhaustive search, ids included. Where rounding makes different sums equal,
    the scores are still those of an exhaustive search.

    Scores are formed and returned in fp32 (fp64 for fp64 queries).

    Args:
        query_THQ: queries; Q = 2C, left half first.
        sub_keys_2HNC: the left and the right sub-keys.
        topk: K, at most N.

    Returns:
        scores_THK: descending.
        row_ids_THK: int64, row = i * N + j.
    """
    num_keys = sub_keys_2HNC.shape[2]
    compute = torch.promote_types(query_THQ.dtype, torch.float32)
    halves_2THC = torch.stack(query_THQ.to(compute).chunk(2, dim=-1))
    scores_2THN = torch.einsum("zthc,zhnc->zthn", halves_2THC, sub_keys_2HNC.to(compute))
    (left_THK, right_THK), (i_THK, j_THK) = first_of_sorted(scores_2THN, topk)

    rank_left_P, rank_right_P = staircase(topk, query_THQ.device)
    sums_THP = left_THK[..., rank_left_P] + right_THK[..., rank_right_P]
    rows_THP = i_THK[..., rank_left_P] * num_keys + j_THK[..., rank_right_P]

    # sorted by row id first, so that of equal sums the smaller row id wins
    rows_THP, by_row_THP = rows_THP.sort(dim=-1)
    scores_THK, by_score_THK = first_of_sorted(sums_THP.gather(-1, by_row_THP), topk)
    return scores_THK, rows_THP.gather(-1, by_score_THK)


def first_of_sorted(scores_XN: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return values and indices of the first `topk` of a stable descending sort of the last axis.

    NaN is the highest score, and equal to itself. torch.topk is many times faster than a sort, but
    does not define the order of equal scores. It is therefore used for the lines of which no two of
    the best topk + 1 scores are equal, and the other lines are sorted.
    """
    lines_XN = scores_XN.detach()
    best, index = lines_XN.topk(min(topk + 1, scores_XN.shape[-1]), dim=-1)
    equal_XK = (best[..., 1:] == best[..., :-1]) | best[..., 1:].isnan()
    tied_X = equal_XK.any(-1)
    sorted_EN = lines_XN[tied_X].argsort(dim=-1, descending=True, stable=True)
    index_XK = index[..., :topk].index_put((tied_X,), sorted_EN[..., :topk])
    return scores_XN.gather(-1, index_XK), index_XK


def staircase(topk: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return the P pairs of ranks (a, b), counted from 0, with (a + 1) * (b + 1) <= topk.

    >>> [ranks.tolist() for ranks in staircase(3)]
    [[0, 0, 0, 1, 2], [0, 1, 2, 0, 0]]
    """
    pairs = [(a, b) for a in range(topk) for b in range(topk // (a + 1))]
    left, right = torch.tensor(pairs, device=device).unbind(-1)
    return left, right
