"""Sorts lookups by row, by the form of op `sort_lookups` that is selected (megamem.ops.forms).

    torch    all lookups; those that read no row come last
    radix    Triton kernels; lookups that read no row are left out

Letters: M lookups, O cores, r rows on this rank.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from megamem.kernels.sort_lookups import SortedLookups, sort_by_radix, sort_by_torch
from megamem.ops import forms


@dataclass(frozen=True)
class Known:
    """What the caller of an op knows of its lookups, which saves work."""

    may_skip: bool = True
    """Whether row ids may be negative; False saves passes over them."""

    equal_bags: bool = False
    """Whether all bags have the same number of lookups; True saves work where they are sorted."""

    expected: int | None = None
    """About how many lookups read a row. Where they are sorted, memory is taken for twice as many;
    more are possible, and slower."""


NOTHING = Known()


def sort_lookups(
    row_ids_M: Tensor,
    weights: Tensor,
    offsets: Tensor,
    num_rows: int,
    known: Known = NOTHING,
    *,
    form: str | None = None,
) -> SortedLookups:
    """Return the lookups sorted by row, and by position where rows are equal.

    megamem.reference.sort_lookups defines the result.

    Args:
        row_ids_M: row of the shard that each lookup reads, or a negative number for none.
        weights: [M] or [M, O], weight of each lookup, or of each of its cores.
        offsets: [G + 1], where the lookups of each bag start; the last entry is M.
        num_rows: r, the rows of the shard.
        known: what is known of the lookups.
        form: takes precedence over the form that is selected or the default. The form `radix` needs
            a GPU or Triton's interpreter.
    """
    if (form or forms.pick("sort_lookups")) == "torch":
        return sort_by_torch(row_ids_M, weights, offsets, num_rows, known.may_skip)
    if weights.dim() == 1:
        return sort_by_radix(row_ids_M, weights, offsets, num_rows, **vars(known))
    lookups = sort_by_radix(row_ids_M, weights[:, 0], offsets, num_rows, **vars(known))
    return replace(lookups, weights_M=weights[lookups.order_or_first()])
