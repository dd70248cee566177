"""Two-stage top-k by Tucker-decomposed scores, forward and backward.

Letters: T tokens, H heads, N sub-keys per side, C key width of a side, A rank, O cores, K rows and
columns kept of each token and head, F pairs returned; 2 sides, rows and columns.
"""

from torch import Tensor

from megamem.reference.tucker_topk import leading_directions
from megamem.reference.tucker_topk import tucker_topk as reference

__all__ = ["leading_directions", "tucker_topk"]


def tucker_topk(
    query_T2AC: Tensor,
    keys_2HNAC: Tensor,
    cores_OHAA: Tensor,
    directions_2HA: Tensor,
    topk: int,
    final_topk: int,
    *,
    form: str | None = None,
    backward_form: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the best `final_topk` pairs of a row and a column for every token and head.

    megamem.reference.tucker_topk defines the result. Wherever scores are exact, the ids and their
    order are those of the reference, ties included. Repeated runs agree bit for bit, forward and
    backward.

    Args:
        query_T2AC: the row and the column query of each token, one for each rank; or one for all of
            them, with an axis of size 1. All heads share them.
        keys_2HNAC: the keys of rows and of columns.
        cores_OHAA: the cores of each head; their sum scores a pair.
        directions_2HA: u and t, the leading singular vectors of the summed core of each head; see
            leading_directions. They receive no gradient.
        topk: K, at most N.
        final_topk: F, at most K * K.
        form: takes precedence over the form that is selected or the default.
        backward_form: the same for the backward.

    Returns:
        weights_THFO: the score of each single core, in fp32 (fp64 for fp64 queries), in the order
            of the summed scores, best first.
        row_ids_THF: int64, id = i * N + j.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or if topk or final_topk is out of
            range.
    """
    _check_inputs(query_T2AC, keys_2HNAC, cores_OHAA, directions_2HA)
    _check_sizes(keys_2HNAC.shape[2], topk, final_topk)
    return reference(query_T2AC, keys_2HNAC, cores_OHAA, directions_2HA, topk, final_topk)


def _check_inputs(
    query_T2AC: Tensor, keys_2HNAC: Tensor, cores_OHAA: Tensor, directions_2HA: Tensor
) -> None:
    if query_T2AC.dim() != 4 or keys_2HNAC.dim() != 5 or len(keys_2HNAC) != 2:
        raise ValueError(
            f"queries have shape {tuple(query_T2AC.shape)} and keys {tuple(keys_2HNAC.shape)}, but "
            "they must be [tokens, 2, ranks or 1, width] and [2, heads, keys, ranks, width]."
        )
    named = {
        "queries": query_T2AC,
        "keys": keys_2HNAC,
        "cores": cores_OHAA,
        "directions": directions_2HA,
    }
    for name, x in named.items():
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {x.dtype}.")
    _, heads, _, rank, width = keys_2HNAC.shape
    if query_T2AC.shape[1:] not in ((2, rank, width), (2, 1, width)):
        raise ValueError(
            f"queries have shape {tuple(query_T2AC.shape)}, but keys of shape "
            f"{tuple(keys_2HNAC.shape)} need [tokens, 2, {rank} or 1, {width}]."
        )
    if cores_OHAA.dim() != 4 or cores_OHAA.shape[1:] != (heads, rank, rank) or not len(cores_OHAA):
        raise ValueError(
            f"cores have shape {tuple(cores_OHAA.shape)}, but keys of shape "
            f"{tuple(keys_2HNAC.shape)} need [cores, {heads}, {rank}, {rank}]."
        )
    if directions_2HA.shape != (2, heads, rank):
        raise ValueError(
            f"directions have shape {tuple(directions_2HA.shape)}, but keys of shape "
            f"{tuple(keys_2HNAC.shape)} need [2, {heads}, {rank}]."
        )
    if len(devices := {x.device for x in named.values()}) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"queries, keys, cores and directions are on {names}; use one device.")


def _check_sizes(num_keys: int, topk: int, final_topk: int) -> None:
    if not 1 <= topk <= num_keys:
        raise ValueError(
            f"topk is {topk}, but it must be between 1 and the {num_keys} keys per side."
        )
    if not 1 <= final_topk <= topk * topk:
        raise ValueError(
            f"final_topk is {final_topk}, but {topk} rows and {topk} columns have 1 to "
            f"{topk * topk} pairs."
        )
    if num_keys**2 >= 2**31:
        raise ValueError(
            f"there are {num_keys} keys per side, but row ids fit in 31 bits for at most 46340."
        )
