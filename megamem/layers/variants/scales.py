"""Moments of scores at the start of a training, from which initial gains follow.

Letters: A Tucker rank, O cores, N sub-keys per side, K those of the first stage, F rows read,
X draws, P pairs.
"""

from functools import lru_cache
from statistics import NormalDist, fmean

import torch

from megamem.ops import leading_directions

DRAWS = 64


@lru_cache
def mean_of_best(count: int, of: int) -> float:
    """Return the expected mean of the `count` largest of `of` normal numbers.

    Each is taken from its rank by Blom's formula, which is within one percent.
    """
    places = (1 - (rank - 0.375) / (of + 0.25) for rank in range(1, count + 1))
    return fmean(NormalDist().inv_cdf(place) for place in places)


@lru_cache
def score_moments(
    num_keys: int, topk: int, final_topk: int, ranks: int, cores: int
) -> tuple[float, float]:
    """Return the mean of the weights of lookups, and their variance divided by its square.

    They are those of a head whose scores of sub-keys are normal numbers, and whose cores are
    uniform on (0, 1), as at the start of a training; both to three digits, so that all ranks get
    the same.

    Args:
        num_keys: N.
        topk: K.
        final_topk: F.
        ranks: A.
        cores: O.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(DRAWS):
        scores_2NA = torch.randn(2, num_keys, ranks, generator=generator, dtype=torch.float64)
        cores_OAA = torch.rand(cores, ranks, ranks, generator=generator, dtype=torch.float64)
        core_1AA = cores_OAA.sum(0, keepdim=True)
        directions_2A = leading_directions(core_1AA, core_1AA.new_zeros(2, 1, ranks))[:, 0]
        leading_2N = torch.einsum("zna,za->zn", scores_2NA, directions_2A)
        row_KA, column_KA = (
            scores[leading.topk(topk).indices]
            for scores, leading in zip(scores_2NA, leading_2N, strict=True)
        )
        singles_OP = torch.einsum("ia,oab,jb->oij", row_KA, cores_OAA, column_KA).flatten(1)
        found.append(singles_OP[:, singles_OP.sum(0).topk(final_topk).indices])
    all_of = torch.cat(found).flatten()
    mean = float(all_of.mean())
    return _three_digits(mean), _three_digits(float(all_of.var()) / mean**2)


def _three_digits(number: float) -> float:
    return float(f"{number:.3g}")
