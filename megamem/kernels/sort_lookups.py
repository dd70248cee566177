"""Lookups sorted by row: by torch's radix sort, or by Triton kernels that drop absent lookups.

    sort_by_torch    sorts all M lookups with torch; lookups that read no row come last
    sort_by_radix    _count_kernel      lookups of each digit in the part of each program
                     torch.cumsum       where the lookups of each digit and program go
                     _scatter_kernel    moves them there; one of each for every digit of the row

The radix sort begins with the lowest digit, and each pass keeps the order of lookups with equal
digits, so lookups of one row stay in the order of their positions. A row of a shard of r rows has
log2(r) bits, which are divided into as few digits as possible: two for a million rows. Keys and
positions take 4 bytes each.

The first pass drops the lookups that read no row. Their number is only known on the device: later
kernels read it from memory, and every program works on an equal part of the lookups that are left,
so the work follows the lookups that are present while no grid depends on them.

Within a tile, lookups are ordered by one number that contains the digit and the place in the tile.
The lookups of one digit then lie side by side and are stored to consecutive addresses. The last
pass reads the bag and the weight of each lookup by its position.

Letters: M lookups, P programs. Prefixes in kernels: i_ an index, o_ offsets, m_ a mask, b_ a block
in registers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamem.kernels import choices
from megamem.kernels.embedding_bag import OPTIONS

MAX_LOOKUPS = 2**31 - 2**20
"""So many that the ends of tiles and chunks, which may lie beyond the last, have 4 bytes, too."""


@dataclass(frozen=True)
class SortedLookups:
    """The lookups of a batch, sorted by row; lookups that read no row come last or are left out."""

    rows_M: Tensor
    """Row that each lookup reads, ascending; num_rows for none."""
    order_M: Tensor
    """Index of each lookup before it was sorted."""
    bags_M: Tensor
    """Bag of each lookup."""
    weights_M: Tensor
    """Weight of each lookup; [M, O] where each has a weight for each of O cores."""
    num_rows: int
    """r, the rows of the shard."""
    count: Tensor | None = None
    """[1] int32, how many lookups read a row: entries after them are undefined. None: there are
    M entries, those of no row included."""
    expected: int | None = None
    """About how many lookups read a row, where there is a count. None: up to all of them."""

    def rows_or_none(self) -> Tensor:
        """Return rows_M with num_rows, which is no row, in the entries that are undefined."""
        if self.count is None:
            return self.rows_M
        return torch.where(self._defined(self.count), self.rows_M, self.num_rows)

    def order_or_first(self) -> Tensor:
        """Return order_M with 0 in the entries that are undefined."""
        if self.count is None:
            return self.order_M
        return torch.where(self._defined(self.count), self.order_M, 0)

    def _defined(self, count: Tensor) -> Tensor:
        entries = torch.arange(len(self.rows_M), dtype=torch.int32, device=self.rows_M.device)
        return entries < count


def digits_of(num_rows: int, radix: int) -> tuple[int, int]:
    """Return the number of digits of a row, and the bits of a digit.

    Args:
        num_rows: r, the rows of the shard.
        radix: the most values of a digit, a power of two.
    """
    bits = max(1, (num_rows - 1).bit_length())
    num_digits = triton.cdiv(bits, radix.bit_length() - 1)
    return num_digits, triton.cdiv(bits, num_digits)


def sort_by_torch(
    row_ids_M: Tensor, weights_M: Tensor, offsets: Tensor, num_rows: int, may_skip: bool = True
) -> SortedLookups:
    """Sort lookups by row, and lookups of one row by their position; absent lookups come last.

    torch's radix sort makes one pass per 8 bits of the key: two for a table of less than 2**15
    rows, four for a larger one. If row ids may not be negative, they are sorted as they are.
    """
    key = torch.int16 if num_rows <= torch.iinfo(torch.int16).max else torch.int32
    keys_M = torch.where(row_ids_M < 0, num_rows, row_ids_M) if may_skip else row_ids_M
    rows_M, order_M = keys_M.to(key).sort(stable=True)
    bag_ids_M = bags_of_lookups(offsets, len(row_ids_M))
    return SortedLookups(rows_M, order_M, bag_ids_M[order_M], weights_M[order_M], num_rows)


def bags_of_lookups(offsets: Tensor, num_lookups: int) -> Tensor:
    """Return bag_ids_M, the bag of each lookup in int32."""
    bags = torch.arange(len(offsets) - 1, dtype=torch.int32, device=offsets.device)
    return torch.repeat_interleave(bags, offsets.diff(), output_size=num_lookups)


@triton.jit
def number_of_lookups(count, num_lookups):
    """Return how many lookups there are: the count on the device, if there is one."""
    if count is not None:
        num_lookups = tl.load(count)
    return num_lookups


@triton.jit
def _part(count, num_lookups, TILE: tl.constexpr):
    """Return where the lookups of this program start and end: a whole number of tiles."""
    num_lookups = number_of_lookups(count, num_lookups)
    num_tiles = tl.cdiv(tl.cdiv(num_lookups, TILE), tl.num_programs(0))
    i_first = tl.program_id(0).to(tl.int64) * num_tiles * TILE
    return i_first, tl.minimum(i_first + num_tiles * TILE, num_lookups)


@triton.jit(do_not_specialize=["count", "num_lookups", "shift"])
def _count_kernel(
    keys,  # [M]; a negative key is no lookup
    counts,  # [digits, P] lookups of each digit in the part of each program
    count,  # [1] number of keys; None: num_lookups
    num_lookups,
    shift,  # the bits of a key below the digit
    NUM_DIGITS: tl.constexpr,
    TILE: tl.constexpr,
):
    i_first, i_end = _part(count, num_lookups, TILE)
    b_counts = tl.zeros([NUM_DIGITS], tl.int32)
    for i in range(i_first, i_end, TILE):
        o_m = i + tl.arange(0, TILE)
        b_key = tl.load(keys + o_m, mask=o_m < i_end, other=-1).to(tl.int32)
        b_digit = (b_key >> shift) & (NUM_DIGITS - 1)
        b_counts += tl.histogram(b_digit, NUM_DIGITS, mask=b_key >= 0)
    o_counts = tl.arange(0, NUM_DIGITS) * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts + o_counts, b_counts)


@triton.jit(do_not_specialize=["count", "num_lookups", "shift", "bag_size"])
def _scatter_kernel(
    keys,  # [M]; a negative key is no lookup
    positions,  # [M] position of each lookup before the sort; None: its index
    ends,  # [digits, P] running sum of the counts
    keys_out,  # [M]
    positions_out,  # [M]
    bag_ids,  # [M] bag of each position; None: bags of bag_size positions
    weights,  # [M] weight of each position
    bags_out,  # [M]
    weights_out,  # [M]
    count,  # [1] number of keys; None: num_lookups
    num_lookups,
    shift,  # the bits of a key below the digit
    bag_size,
    WEIGHT_STRIDE: tl.constexpr,
    NUM_DIGITS: tl.constexpr,
    TILE: tl.constexpr,
    LAST: tl.constexpr,
):
    i_first, i_end = _part(count, num_lookups, TILE)
    o_tile = tl.arange(0, TILE)
    o_ends = tl.arange(0, NUM_DIGITS) * tl.num_programs(0) + tl.program_id(0) - 1
    b_next = tl.load(ends + o_ends, mask=o_ends >= 0, other=0)
    for i in range(i_first, i_end, TILE):
        o_m = i + o_tile
        b_key = tl.load(keys + o_m, mask=o_m < i_end, other=-1).to(tl.int32)
        m_key = b_key >= 0
        b_digit = (b_key >> shift) & (NUM_DIGITS - 1)
        b_counts = tl.histogram(b_digit, NUM_DIGITS, mask=m_key)
        # no lookup comes after all digits
        b_place = tl.sort(tl.where(m_key, b_digit, NUM_DIGITS) * TILE + o_tile)
        b_digit = b_place // TILE
        m_key = b_digit < NUM_DIGITS
        # the address of a lookup is that of the first of its digit, and its distance from it
        b_first = b_next - (tl.cumsum(b_counts, axis=0) - b_counts)
        o_out = tl.gather(b_first, tl.where(m_key, b_digit, 0), axis=0) + o_tile
        b_next += b_counts
        o_m = i + b_place % TILE
        b_key = tl.load(keys + o_m, mask=m_key, other=0).to(tl.int32)
        if positions is None:
            b_position = o_m.to(tl.int32)
        else:
            b_position = tl.load(positions + o_m, mask=m_key, other=0)
        tl.store(keys_out + o_out, b_key, mask=m_key)
        tl.store(positions_out + o_out, b_position, mask=m_key)
        if LAST:
            if bag_ids is None:
                b_bag = b_position // bag_size
            else:
                b_bag = tl.load(bag_ids + b_position, mask=m_key, other=0)
            tl.store(bags_out + o_out, b_bag, mask=m_key)
            b_weight = tl.load(weights + b_position * WEIGHT_STRIDE, mask=m_key, other=0.0)
            tl.store(weights_out + o_out, b_weight, mask=m_key)
        # other threads may store to the addresses of the next tile
        tl.debug_barrier()


def sort_by_radix(
    row_ids_M: Tensor,
    weights_M: Tensor,
    offsets: Tensor,
    num_rows: int,
    may_skip: bool = True,
    equal_bags: bool = False,
    expected: int | None = None,
) -> SortedLookups:
    """Sort the lookups that read a row by it, and lookups of one row by their position.

    Args:
        row_ids_M: row of the shard that each lookup reads, or a negative number for none.
        weights_M: weight of each lookup.
        offsets: [G + 1], where the lookups of each bag start; the last entry is M.
        num_rows: r, the rows of the shard.
        may_skip: whether row ids may be negative. If not, the result has no count.
        equal_bags: whether all bags have the same number of lookups, which saves a pass.
        expected: about how many lookups read a row, if that is known; passed on.

    Raises:
        ValueError: there are more than MAX_LOOKUPS.
    """
    num_lookups, device = len(row_ids_M), row_ids_M.device
    if num_lookups > MAX_LOOKUPS:
        raise ValueError(
            f"{num_lookups:,} lookups are more than the form radix can sort, {MAX_LOOKUPS:,}."
        )
    rows_M, order_M, bags_M = (
        torch.empty(num_lookups, dtype=torch.int32, device=device) for _ in range(3)
    )
    sorted_weights_M = torch.empty(num_lookups, dtype=weights_M.dtype, device=device)
    if num_lookups == 0:
        count = torch.zeros(1, dtype=torch.int32, device=device) if may_skip else None
        return SortedLookups(rows_M, order_M, bags_M, sorted_weights_M, num_rows, count, expected)
    bag_ids_M = None if equal_bags else bags_of_lookups(offsets, num_lookups)
    chosen = choices.current().sort_lookups
    programs = min(chosen.max_programs, triton.cdiv(num_lookups, chosen.tile))
    num_digits, bits = digits_of(num_rows, chosen.radix)
    # a pass writes to the buffers that the pass before did not write to, the last to the result
    buffers = [(rows_M, order_M)]
    if num_digits > 1:
        buffers.append((torch.empty_like(rows_M), torch.empty_like(order_M)))
    sizes = {"NUM_DIGITS": 2**bits, "TILE": chosen.tile, "num_warps": chosen.num_warps, **OPTIONS}
    keys_M, positions_M, count = row_ids_M, None, None
    for digit in range(num_digits):
        keys_out_M, positions_out_M = buffers[(num_digits - 1 - digit) % 2]
        shift = digit * bits
        counts = torch.empty(2**bits, programs, dtype=torch.int32, device=device)
        _count_kernel[(programs,)](keys_M, counts, count, num_lookups, shift, **sizes)
        ends = counts.view(-1).cumsum(0, dtype=torch.int32)
        _scatter_kernel[(programs,)](
            keys_M,
            positions_M,
            ends,
            keys_out_M,
            positions_out_M,
            bag_ids_M,
            weights_M,
            bags_M,
            sorted_weights_M,
            count,
            num_lookups,
            shift,
            num_lookups // (len(offsets) - 1),
            WEIGHT_STRIDE=weights_M.stride(0),
            **sizes,
            LAST=digit == num_digits - 1,
        )
        keys_M, positions_M = keys_out_M, positions_out_M
        if may_skip:
            count = ends[-1:]
    return SortedLookups(rows_M, order_M, bags_M, sorted_weights_M, num_rows, count, expected)
