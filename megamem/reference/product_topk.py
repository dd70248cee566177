"""Exact product-key top-k, as arithmetic. The Triton twin agrees with this file id for id."""

import torch
from torch import Tensor


def product_topk(query_THQ: Tensor, sub_keys_2HNC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the best `topk` of the N*N product keys for every token and head.

    A product key (i, j) scores q_left . left_i + q_right . right_j, so every winner pairs a top-k
    left half with a top-k right half. With both halves sorted (higher score first, then smaller
    index), the pair of ranks (a, b), counted from 1, is matched or beaten by the a*b pairs above
    and left of it: only pairs with a*b <= K can win, K ln K of them instead of K*K.

    Among these, higher sums win, and the smaller row id wins a tie. Where sums are exact this is
    the top-k of an exhaustive search, id for id; where rounding makes different sums equal, the
    scores still are.

    Scores are formed and returned in fp32 (fp64 for fp64 queries).

    Args:
        query_THQ: queries; Q = 2C, left half first.
        sub_keys_2HNC: the left and the right sub-keys.
        topk: K, at most N.

    Returns:
        scores_THK: best first.
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

    # in the order of row ids, so that of equal sums the smaller row id comes first
    rows_THP, by_row_THP = rows_THP.sort(dim=-1)
    scores_THK, by_score_THK = first_of_sorted(sums_THP.gather(-1, by_row_THP), topk)
    return scores_THK, rows_THP.gather(-1, by_score_THK)


def first_of_sorted(scores_XN: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The first `topk` of a stable descending sort of the last dimension: values and indices.

    torch.topk, many times as fast, leaves open which of two equal scores comes first, or comes at
    all. So it decides where no two of the first topk + 1 are equal; the other lines are sorted. NaN
    is the highest score, and equal to itself.
    """
    lines_XN = scores_XN.detach()
    best_XM, index_XM = lines_XN.topk(min(topk + 1, scores_XN.shape[-1]), dim=-1)
    equal_XK = (best_XM[..., 1:] == best_XM[..., :-1]) | best_XM[..., 1:].isnan()
    tied_X = equal_XK.any(-1)
    sorted_EN = lines_XN[tied_X].argsort(dim=-1, descending=True, stable=True)
    index_XK = index_XM[..., :topk].index_put((tied_X,), sorted_EN[..., :topk])
    return scores_XN.gather(-1, index_XK), index_XK


def staircase(topk: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The P pairs of ranks (a, b), counted from 0, with (a + 1) * (b + 1) <= topk, a first.

    >>> [ranks.tolist() for ranks in staircase(3)]
    [[0, 0, 0, 1, 2], [0, 1, 2, 0, 0]]
    """
    pairs = [(a, b) for a in range(topk) for b in range(topk // (a + 1))]
    left, right = torch.tensor(pairs, device=device).unbind(-1)
    return left, right
