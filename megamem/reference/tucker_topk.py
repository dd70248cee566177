"""Two-stage top-k by Tucker-decomposed scores: the specification of the op.

Letters: T tokens, H heads, N sub-keys per side, C key width of a side, A rank, O cores, K rows and
columns kept of each token and head, F pairs returned, P = K * K pairs, X leading axes of any
number; 2 sides, rows and columns.
"""

import torch
from torch import Tensor

from megamem.reference.product_topk import first_of_sorted

# numbers of the largest tensor that is formed at once, of the scores of some tokens
PIECE = 2**22


def tucker_topk(
    query_T2AC: Tensor,
    keys_2HNAC: Tensor,
    cores_OHAA: Tensor,
    directions_2HA: Tensor,
    topk: int,
    final_topk: int,
) -> tuple[Tensor, Tensor]:
    """Return the best `final_topk` pairs of a row and a column for every token and head.

    A key of rank a has the score S[i, a] = q_a . k[i, a], so each row i and each column j has A of
    them. The score of a pair is S_row[i]^T C S_col[j], where C is the sum of the cores C_c of the
    head. Of all N*N pairs, those of the best are approximated in two stages:

    1. With the directions (u, t), the leading singular vectors of C, keep the K rows with the
       largest u . S_row[i] and the K columns with the largest t . S_col[j]. Of equal ones, those
       with the smaller index are kept.
    2. Score all K*K pairs of these with C and return the F best, higher scores first, then the
       smaller id i * N + j.

    Unlike in product_topk, the score of a pair is no sum of the scores of its sides, so no pair can
    be left out because of the ranks of its sides. NaN is the highest score.

    Scores are formed and returned in fp32 (fp64 for fp64 queries), for some tokens at a time: the
    K*K scores of all tokens are never in memory together. The selection and the directions receive
    no gradient.

    Args:
        query_T2AC: the row and the column query of each token, one for each rank; or one for all of
            them, with an axis of size 1. All heads share them.
        keys_2HNAC: the keys of rows and of columns.
        cores_OHAA: C_c; a row's ranks first.
        directions_2HA: u and t.
        topk: K, at most N.
        final_topk: F, at most K * K.

    Returns:
        weights_THFO: S_row[i]^T C_c S_col[j] of each single core, in the order of their sums.
        row_ids_THF: int64, id = i * N + j.
    """
    compute = torch.promote_types(query_T2AC.dtype, torch.float32)
    query_T2AC, keys_2HNAC, cores_OHAA, directions_2HA = (
        x.to(compute) for x in (query_T2AC, keys_2HNAC, cores_OHAA, directions_2HA)
    )
    query_T2AC = query_T2AC.expand(-1, -1, keys_2HNAC.shape[3], -1)
    chunk = tokens_of_a_piece(keys_2HNAC, topk)
    starts = range(0, max(1, len(query_T2AC)), chunk)
    settings = (cores_OHAA, directions_2HA.detach(), topk, final_topk)
    parts = [
        _of_some_tokens(query_T2AC[start : start + chunk], keys_2HNAC, *settings)
        for start in starts
    ]
    weights, row_ids = zip(*parts, strict=True)
    return torch.cat(weights), torch.cat(row_ids)


def tokens_of_a_piece(keys_2HNAC: Tensor, topk: int) -> int:
    """Return the tokens whose scores are formed at once, at least one."""
    _, heads, num_keys, rank, _ = keys_2HNAC.shape
    return max(1, PIECE // (heads * max(2 * num_keys * rank, topk * topk)))


def _of_some_tokens(
    query_T2AC: Tensor,
    keys_2HNAC: Tensor,
    cores_OHAA: Tensor,
    directions_2HA: Tensor,
    topk: int,
    final_topk: int,
) -> tuple[Tensor, Tensor]:
    kept_2THK, scores_2THKA = kept_sides(query_T2AC, keys_2HNAC, directions_2HA, topk)
    pairs_THF = best_pairs(scores_2THKA, cores_OHAA, final_topk)
    row_ids_THF = ids_of_pairs(kept_2THK, pairs_THF, keys_2HNAC.shape[2])
    return weights_of_pairs(scores_2THKA, cores_OHAA, pairs_THF), row_ids_THF


def kept_sides(
    query_T2AC: Tensor, keys_2HNAC: Tensor, directions_2HA: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """Return the K rows and columns of the first stage in the order of their indices.

    With this order, pairs of places among them are in the order of their ids.

    Returns:
        kept_2THK: their indices.
        scores_2THKA: S_row and S_col of these.
    """
    scores_2THNA = torch.einsum("tzac,zhnac->zthna", query_T2AC, keys_2HNAC)
    with torch.no_grad():
        sides_2THN = torch.einsum("zthna,zha->zthn", scores_2THNA, directions_2HA)
        kept_2THK = first_places(sides_2THN, topk).sort(dim=-1).values
    return kept_2THK, scores_2THNA.gather(3, _of_ranks(kept_2THK, keys_2HNAC.shape[3]))


@torch.no_grad()
def best_pairs(scores_2THKA: Tensor, cores_OHAA: Tensor, final_topk: int) -> Tensor:
    """Return pairs_THF, i * K + j for the best pairs of the kept row i and the kept column j."""
    row_THKA, column_THKA = scores_2THKA
    left_THKA = torch.einsum("thia,hab->thib", row_THKA, cores_OHAA.sum(0))
    pairs_THP = torch.einsum("thib,thjb->thij", left_THKA, column_THKA).flatten(-2)
    return first_places(pairs_THP, final_topk)


def first_places(scores_XN: Tensor, topk: int) -> Tensor:
    """Return the places of the first `topk` of a stable descending sort; NaN is the highest score.

    A score in fp32 and its place are one int64, of which no two are equal, so that a top-k has a
    defined order. The host waits for nothing, unlike in first_of_sorted().
    """
    if scores_XN.dtype != torch.float32:
        return first_of_sorted(scores_XN, topk)[1]
    largest = 2**31 - 1
    # adding zero makes -0 equal to 0
    bits_XN = (scores_XN + 0.0).view(torch.int32).masked_fill(scores_XN.isnan(), largest)
    order_XN = bits_XN ^ ((bits_XN >> 31) & largest)
    places_N = torch.arange(scores_XN.shape[-1], device=scores_XN.device)
    packed_XN = (order_XN.long() << 32) | (largest - places_N)
    return largest - (packed_XN.topk(topk, dim=-1).values & largest)


def ids_of_pairs(kept_2THK: Tensor, pairs_THF: Tensor, num_keys: int) -> Tensor:
    """Return row_ids_THF of pairs of kept rows and columns."""
    rows_THK, columns_THK = kept_2THK
    topk = rows_THK.shape[-1]
    row_ids_THF = rows_THK.gather(-1, pairs_THF // topk) * num_keys
    return row_ids_THF + columns_THK.gather(-1, pairs_THF % topk)


def weights_of_pairs(scores_2THKA: Tensor, cores_OHAA: Tensor, pairs_THF: Tensor) -> Tensor:
    """Return weights_THFO, the score of each single core for pairs of kept rows and columns."""
    (row_THKA, column_THKA), (topk, rank) = scores_2THKA, scores_2THKA.shape[-2:]
    row_THFA = row_THKA.gather(2, _of_ranks(pairs_THF // topk, rank))
    column_THFA = column_THKA.gather(2, _of_ranks(pairs_THF % topk, rank))
    left_OTHFA = torch.einsum("thfa,ohab->othfb", row_THFA, cores_OHAA)
    return torch.einsum("othfb,thfb->thfo", left_OTHFA, column_THFA)


def _of_ranks(index: Tensor, rank: int) -> Tensor:
    """Return the index with a last axis of all ranks, as gather takes it."""
    return index.unsqueeze(-1).expand(*index.shape, rank)


def leading_directions(core_HAA: Tensor, previous_2HA: Tensor) -> Tensor:
    """Return (u, t), the leading left and right singular vectors of the core of each head.

    Both (u, t) and (-u, -t) are such vectors, but they keep different rows and columns: those of
    which both sides are large and positive, or those where both are negative. So that the choice
    lasts, the sign that is nearer to the previous directions is taken, in the sum of absolute
    differences, or where these are zero, the sign with which the sum of u and t is not negative.

    Everything is computed in fp64, for rank 2 in closed form: t has the angle
    atan2(2 (ab + cd), a^2 + c^2 - b^2 - d^2) / 2 for the core [[a, b], [c, d]]. A core of zeros has
    the first unit vectors, and one that is not finite keeps its previous directions.

    Args:
        core_HAA: the sum of the cores of each head.
        previous_2HA: the directions until now; zero for heads that have none yet.

    Returns:
        directions_2HA: in the dtype of previous_2HA, without gradient.
    """
    with torch.no_grad():
        finite_H = core_HAA.isfinite().flatten(1).all(1)
        # of one scale, so that no square leaves the range of fp64
        largest_H11 = core_HAA.double().abs().amax((1, 2), keepdim=True)
        usable_H11 = (finite_H & (largest_H11.flatten() > 0)).view(-1, 1, 1)
        scaled_HAA = core_HAA.double() / largest_H11.where(usable_H11, 1.0)
        scaled_HAA = scaled_HAA.where(usable_H11, _first_entry(scaled_HAA))
        found_2HA = _rank_two(scaled_HAA) if core_HAA.shape[-1] == 2 else _by_svd(scaled_HAA)
        old_2HA = previous_2HA.double()
        distance_H = (found_2HA - old_2HA).abs().sum((0, 2))
        distance_of_other_H = (found_2HA + old_2HA).abs().sum((0, 2))
        is_first_H = (old_2HA == 0).all(2).all(0)
        flip_H = torch.where(
            is_first_H, found_2HA.sum((0, 2)) < 0, distance_of_other_H < distance_H
        )
        found_2HA = torch.where(flip_H.unsqueeze(-1), -found_2HA, found_2HA)
        found_2HA = torch.where(finite_H.unsqueeze(-1), found_2HA, old_2HA)
        return found_2HA.to(previous_2HA.dtype)


def _first_entry(core_HAA: Tensor) -> Tensor:
    """Return cores whose first entry is 1 and all others 0."""
    unit_HAA = torch.zeros_like(core_HAA)
    # an assignment would copy the number from the host
    unit_HAA[:, 0, 0].fill_(1)
    return unit_HAA


def _by_svd(core_HAA: Tensor) -> Tensor:
    left_HAA, _, right_HAA = torch.linalg.svd(core_HAA)
    return torch.stack((left_HAA[:, :, 0], right_HAA[:, 0]))


def _rank_two(core_HAA: Tensor) -> Tensor:
    (a, b), (c, d) = (row.unbind(-1) for row in core_HAA.unbind(-2))
    theta_H = torch.atan2(2 * (a * b + c * d), a * a + c * c - b * b - d * d) / 2
    t_HA = torch.stack((theta_H.cos(), theta_H.sin()), dim=-1)
    u_HA = torch.einsum("hab,hb->ha", core_HAA, t_HA)
    return torch.stack((u_HA / u_HA.norm(dim=-1, keepdim=True), t_HA))
