"""Triton kernels of embedding_bag's backward: one pass over the rows, without atomics.

    row_gradient    _row_pass_kernel    value gradient and weight gradient in one pass
                    _merge_kernel       sums of rows that are spread over several chunks
                    _unsort_kernel      weight gradient in the original order of the lookups
                    _late_dots_kernel   the same of lookups that are more than was expected
                    _mark_kernel        which rows of the output were written

The sorted lookups are divided into chunks of equal length, so that the work does not depend on how
the lookups are distributed over rows. A program computes BLOCK_V columns of one chunk,

    sorted rows   3 3 | 3 3 3 | 3 5 7 | 7 9 9 |       (chunks between bars)
                  tail  head    head
                                  5 done
                                    tail   head
                                             9 done

and stores the sum of a row where the row ends. A row that crosses a boundary between chunks leaves
a partial sum in each of them: the tail of the chunk in which it starts, the head of the others.
_merge_kernel adds them in order, so repeated runs agree bit for bit. The columns are the slowest
axis of the grid, so that the bag gradients of one block of columns stay in the L2 cache while the
rows of the table are read once.

Only touched rows are written, and no cost is proportional to the number of rows. Where the gradient
is added to a buffer and `touched` is given, the first gradient of a row in a step overwrites what
the buffer holds there, so that the buffer is neither read for it nor ever cleared. The flags are
set by a kernel of their own afterwards, because the programs of all column blocks of a row, and
_merge_kernel, have to see them as they were before the pass.

sort_lookups.py sorts the lookups. Where it leaves lookups out, their number is only known on the
device, and the kernels read it from memory: there is a fixed number of chunks, of which each has an
equal part of the lookups that are present. The products of rows and gradients of bags, one for each
block of columns and lookup, are the largest of the buffers, so it has room for ROOM times as many
lookups as are expected. A slower kernel computes those of further lookups, in the same order.

The lookups are sorted in the backward and not in the forward, which does not need the order: it
would take 12 bytes per lookup until the backward, and recomputation would compute it twice.

Where a lookup has a weight for each of O cores, a block of columns lies within the columns of one
core, and _unsort_kernel adds up the products of the blocks of each.

Letters: r rows on this rank, V row width, M lookups, O cores, G bags. Prefixes in kernels: i_ an
index, o_ offsets, m_ a mask, b_ a block in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamem.kernels import choices
from megamem.kernels.embedding_bag import (
    OPTIONS,
    WHOLE,
    block_of_columns,
    block_width,
    blocks_of_columns,
    num_warps,
)
from megamem.kernels.sort_lookups import SortedLookups, number_of_lookups

ROOM = 2
LATE_PROGRAMS = 1024


def chunk_length(num_lookups: int) -> int:
    """Return the number of sorted lookups in a chunk."""
    chosen = choices.current().row_gradient
    length = triton.next_power_of_2(num_lookups // chosen.target_chunks)
    return min(chosen.max_chunk, max(chosen.min_chunk, length))


def chunks_and_room(
    num_lookups: int, counted: bool = False, expected: int | None = None
) -> tuple[int, int]:
    """Return for how many chunks and lookups there are buffers.

    Args:
        num_lookups: M, above 0.
        counted: whether the number of lookups that are present is only known on the device.
        expected: about how many are present, if that is known.
    """
    chosen = choices.current().row_gradient
    if not counted:
        return triton.cdiv(num_lookups, chunk_length(num_lookups)), num_lookups
    room = num_lookups
    if expected is not None:
        room = min(num_lookups, max(chosen.block_m, ROOM * expected))
    return min(chosen.target_chunks, triton.cdiv(num_lookups, chosen.min_chunk)), room


def column_block(width: int) -> int:
    """Return the number of columns that one program sums."""
    return block_width(width, choices.current().row_gradient.max_block_v)


@triton.jit
def _only_if(condition, mask):
    # equals mask & condition, which Triton 3.9's interpreter gets wrong for a scalar condition
    return tl.where(condition, mask, False)


@triton.jit
def _slot(slots, i_m, i_row, mask):
    """Return the index in the output of a row's sum: its slot if there are slots, else the row."""
    i_slot = i_row.to(tl.int64)
    if slots is not None:
        i_slot = tl.load(slots + i_m, mask=mask, other=0).to(tl.int64)
    return i_slot


@triton.jit
def _divide(count, num_lookups, chunk, MIN_CHUNK: tl.constexpr):
    """Return the number of lookups and the length of a chunk, computed here if there is a count."""
    num_lookups = number_of_lookups(count, num_lookups)
    if count is not None:
        chunk = tl.maximum(tl.cdiv(num_lookups, tl.num_programs(0)), MIN_CHUNK)
    return num_lookups, chunk


@triton.jit
def _ends(i_c, count, num_present, chunk):
    """Return where a chunk starts and ends; lookups that were counted have indices of 4 bytes."""
    i_first = i_c * chunk
    i_end = tl.minimum(i_first + chunk, num_present)
    if count is not None:
        i_first, i_end = i_first.to(tl.int32), i_end.to(tl.int32)
    return i_first, i_end


@triton.jit
def _first_row(rows, i_first, count, num_present, num_rows):
    """Return the row of the first lookup of a chunk; num_rows if it has no lookups."""
    if count is None:
        i_row = tl.load(rows + i_first)
    else:
        i_row = tl.load(rows + i_first, mask=i_first < num_present, other=num_rows)
    return i_row.to(tl.int32)


@triton.jit
def _is_read(i_m, i_end, i_row, count, num_rows):
    """Return whether a lookup is in the chunk and reads a row, as all that were counted do."""
    m_read = i_m < i_end
    if count is None:
        m_read = m_read & (i_row < num_rows)
    return m_read


@triton.jit
def _with_room(mask, i_m, count, num_dots):
    """Return the mask without lookups for which there is no room in the products."""
    if count is not None:
        mask = mask & (i_m < num_dots)
    return mask


# most of its branches are decided by constants when it is compiled
@triton.jit(do_not_specialize=["count", "num_lookups", "num_dots", "num_rows", "chunk"])
def _row_pass_kernel(  # noqa: C901
    rows,  # [M] sorted
    bags,  # [M]
    weights,  # [M, O]
    slots,  # [M] index in out of each lookup's row; None: the row itself
    values,  # [r, V]; None without WEIGHT_GRAD
    grads,  # [G, V]
    out,  # [*, V]; None without VALUE_GRAD
    touched,  # [r] where a row is added to; None: to all rows with ADD
    partials,  # [chunks, 2, V] partial sums of head and tail
    dots,  # [V blocks, num_dots]
    count,  # [1] how many lookups are present; None: all M
    num_lookups,
    num_dots,
    num_rows,
    chunk,
    MIN_CHUNK: tl.constexpr,
    V: tl.constexpr,
    ROW: tl.constexpr,  # from a row of values, grads or out to the next
    BLOCK_V: tl.constexpr,
    UNROLL: tl.constexpr,
    ADD: tl.constexpr,
    VALUE_GRAD: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    CORES: tl.constexpr,
    FIRST: tl.constexpr,  # column of the whole table with which values begin
    CORE_WIDTH: tl.constexpr,  # columns of the whole table with one weight; None: all
):
    i_c = tl.program_id(0).to(tl.int64)
    i_v = tl.program_id(1).to(tl.int64)
    o_v, m_v, i_core = block_of_columns(i_v, V, BLOCK_V, FIRST, CORE_WIDTH)
    num_present, chunk = _divide(count, num_lookups, chunk, MIN_CHUNK)
    i_first, i_end = _ends(i_c, count, num_present, chunk)
    i_row = _first_row(rows, i_first, count, num_present, num_rows)
    if i_row >= num_rows:
        return
    row_before = tl.load(rows + i_first - 1, mask=i_c > 0, other=-1).to(tl.int32)

    b_sum = tl.zeros([BLOCK_V], tl.float32)
    for i in range(i_first, i_end, UNROLL):
        i_rows = (i_row,)
        for u in tl.static_range(UNROLL):
            i_m = i + u + 1
            i_rows += (tl.load(rows + i_m, mask=i_m < num_present, other=num_rows).to(tl.int32),)

        i_touched = ()
        if ADD and touched is not None:
            for u in tl.static_range(UNROLL):
                m_u = _is_read(i + u, i_end, i_rows[u], count, num_rows)
                m_whole = m_u & (i_rows[u] != i_rows[u + 1]) & (i_rows[u] != row_before)
                i_touched += (tl.load(touched + i_rows[u], mask=m_whole, other=0),)

        # every load of the group is issued before the first is used
        b_grads, b_weights, b_values, o_outs, b_outs = (), (), (), (), ()
        for u in tl.static_range(UNROLL):
            i_m = i + u
            m_u = _is_read(i_m, i_end, i_rows[u], count, num_rows)
            i_bag = tl.load(bags + i_m, mask=m_u, other=0).to(tl.int64)
            b_grads += (tl.load(grads + i_bag * ROW + o_v, mask=_only_if(m_u, m_v), other=0.0),)
            if WEIGHT_GRAD:
                o_value = values + i_rows[u].to(tl.int64) * ROW + o_v
                b_values += (
                    tl.load(o_value, _only_if(m_u, m_v), other=0.0, eviction_policy="evict_first"),
                )
            if VALUE_GRAD:
                o_weight = weights + i_m * CORES + i_core
                b_weights += (tl.load(o_weight, mask=m_u, other=0.0).to(tl.float32),)
                m_whole = m_u & (i_rows[u] != i_rows[u + 1]) & (i_rows[u] != row_before)
                o_outs += (out + _slot(slots, i_m, i_rows[u], m_whole) * ROW + o_v,)
                if ADD and touched is None:
                    b_outs += (tl.load(o_outs[u], mask=_only_if(m_whole, m_v), other=0.0),)
        if ADD and touched is not None:
            # these loads come last, as they wait for the flags
            for u in tl.static_range(UNROLL):
                b_outs += (tl.load(o_outs[u], _only_if(i_touched[u] != 0, m_v), other=0.0),)

        for u in tl.static_range(UNROLL):
            i_m = i + u
            m_u = _is_read(i_m, i_end, i_rows[u], count, num_rows)
            b_grad = b_grads[u].to(tl.float32)
            if WEIGHT_GRAD:
                b_dot = tl.sum(b_values[u].to(tl.float32) * b_grad, axis=0)
                m_dot = _with_room(m_u, i_m, count, num_dots)
                tl.store(dots + i_v * num_dots + i_m, b_dot, mask=m_dot)
            if VALUE_GRAD:
                b_sum += b_weights[u] * b_grad
                m_ends = m_u & (i_rows[u] != i_rows[u + 1])
                if m_ends & (i_rows[u] == row_before):
                    tl.store(partials + i_c * 2 * V + o_v, b_sum, mask=m_v)
                b_row = b_sum
                if ADD:
                    b_row += b_outs[u].to(tl.float32)
                m_whole = m_ends & (i_rows[u] != row_before)
                tl.store(o_outs[u], b_row.to(out.dtype.element_ty), mask=_only_if(m_whole, m_v))
                b_sum = tl.where(m_ends, 0.0, b_sum)
        i_row = i_rows[UNROLL]

    if VALUE_GRAD:
        i_last = tl.load(rows + i_end - 1).to(tl.int32)
        row_after = tl.load(rows + i_end, mask=i_end < num_present, other=num_rows).to(tl.int32)
        if (i_last == row_after) & (i_last < num_rows):
            i_half = tl.where(i_last == row_before, 0, 1)
            tl.store(partials + (i_c * 2 + i_half) * V + o_v, b_sum, mask=m_v)


@triton.jit(do_not_specialize=["count", "num_lookups", "num_rows", "chunk"])
def _merge_kernel(
    rows,  # [M] sorted
    slots,  # [M] or None
    partials,  # [chunks, 2, V]
    out,  # [*, V]
    touched,  # [r] or None
    count,  # [1] or None
    num_lookups,
    num_rows,
    chunk,
    MIN_CHUNK: tl.constexpr,
    V: tl.constexpr,
    ROW: tl.constexpr,  # from a row of values, grads or out to the next
    BLOCK_V: tl.constexpr,
    TILE: tl.constexpr,
    ADD: tl.constexpr,
    FIRST: tl.constexpr,
    CORE_WIDTH: tl.constexpr,
):
    i_c = tl.program_id(0).to(tl.int64)
    i_v = tl.program_id(1).to(tl.int64)
    o_v, m_v, _ = block_of_columns(i_v, V, BLOCK_V, FIRST, CORE_WIDTH)
    num_present, chunk = _divide(count, num_lookups, chunk, MIN_CHUNK)
    i_first = i_c * chunk
    i_next = i_first + chunk
    if i_next >= num_present:
        return
    i_row = tl.load(rows + i_next - 1).to(tl.int32)
    row_after = tl.load(rows + i_next).to(tl.int32)
    row_before = tl.load(rows + i_first - 1, mask=i_c > 0, other=-1).to(tl.int32)
    # only the program of the chunk in which the row starts adds up the partial sums
    if (i_row != row_after) | (i_row == row_before) | (i_row >= num_rows):
        return

    b_sum = tl.load(partials + (i_c * 2 + 1) * V + o_v, mask=m_v, other=0.0)
    i_k = i_c + 1
    go_on = True
    while go_on:
        o_k = i_k + tl.arange(0, TILE)
        b_row = tl.load(rows + o_k * chunk, mask=o_k * chunk < num_present, other=num_rows)
        m_k = b_row.to(tl.int32) == i_row
        b_heads = tl.load(
            partials + o_k[:, None] * 2 * V + o_v[None, :],
            mask=m_k[:, None] & m_v[None, :],
            other=0.0,
        )
        b_sum += tl.sum(b_heads, axis=0)
        go_on = tl.min(m_k.to(tl.int32), axis=0) > 0
        i_k += TILE
    o_out = out + _slot(slots, i_next - 1, i_row, True) * ROW + o_v
    if ADD:
        m_add = m_v
        if touched is not None:
            m_add = _only_if(tl.load(touched + i_row) != 0, m_v)
        b_sum += tl.load(o_out, mask=m_add, other=0.0).to(tl.float32)
    tl.store(o_out, b_sum.to(out.dtype.element_ty), mask=m_v)


@triton.jit(do_not_specialize=["count", "num_lookups", "num_dots", "num_rows"])
def _unsort_kernel(
    rows,  # [M] sorted
    order,  # [M]
    dots,  # [pieces, V blocks, num_dots]
    out,  # [M, O] zeros if there is a count
    count,  # [1] how many lookups are present; None: all M
    num_lookups,
    num_dots,
    num_rows,
    NUM_BLOCKS: tl.constexpr,  # of a piece
    BLOCK_M: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    CORES: tl.constexpr,
    FIRST_CORE: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = _with_room(o_m < number_of_lookups(count, num_lookups), o_m, count, num_dots)
    m_present = tl.load(rows + o_m, mask=m_m, other=0).to(tl.int32) < num_rows
    i_piece = 0
    if NUM_PIECES > 1:
        i_piece = tl.program_id(1)
    b_dot = tl.zeros([BLOCK_M], tl.float32)
    for i_v in tl.static_range(NUM_BLOCKS):
        i_block = tl.full([1], i_v, tl.int64) + i_piece * NUM_BLOCKS
        o_dots = dots + i_block * num_dots + o_m
        b_dot += tl.load(o_dots, mask=m_m & m_present, other=0.0)
    i_out = tl.load(order + o_m, mask=m_m, other=0)
    if CORES > 1:
        i_out = i_out.to(tl.int64) * CORES + FIRST_CORE + i_piece
    tl.store(out + i_out, b_dot.to(out.dtype.element_ty), mask=m_m)


@triton.jit(do_not_specialize=["count", "num_dots"])
def _late_dots_kernel(
    rows,  # [M] sorted
    order,  # [M]
    bags,  # [M]
    values,  # [r, V]
    grads,  # [G, V]
    out,  # [M, O]
    count,  # [1] how many lookups are present
    num_dots,
    V: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,  # of a piece
    NUM_PIECES: tl.constexpr,
    CORES: tl.constexpr,
    FIRST: tl.constexpr,
    CORE_WIDTH: tl.constexpr,
):
    for i_m in range(num_dots + tl.program_id(0), tl.load(count), tl.num_programs(0)):
        i_row = tl.load(rows + i_m).to(tl.int64)
        i_bag = tl.load(bags + i_m).to(tl.int64)
        if CORE_WIDTH is None:
            dot = 0.0
            for i_v in range(0, V, BLOCK_V):
                o_v = i_v + tl.arange(0, BLOCK_V)
                b_value = tl.load(values + i_row * ROW + o_v, mask=o_v < V, other=0.0)
                b_grad = tl.load(grads + i_bag * ROW + o_v, mask=o_v < V, other=0.0)
                dot += tl.sum(b_value.to(tl.float32) * b_grad.to(tl.float32), axis=0)
            tl.store(out + tl.load(order + i_m), dot)
        else:
            o_out = out + tl.load(order + i_m).to(tl.int64) * CORES + FIRST // CORE_WIDTH
            for i_piece in tl.static_range(NUM_PIECES):
                dot = 0.0
                for i in range(NUM_BLOCKS):
                    i_v = i_piece * NUM_BLOCKS + i
                    o_v, m_v, _ = block_of_columns(i_v, V, BLOCK_V, FIRST, CORE_WIDTH)
                    b_value = tl.load(values + i_row * ROW + o_v, mask=m_v, other=0.0)
                    b_grad = tl.load(grads + i_bag * ROW + o_v, mask=m_v, other=0.0)
                    dot += tl.sum(b_value.to(tl.float32) * b_grad.to(tl.float32), axis=0)
                tl.store(o_out + i_piece, dot)


@triton.jit(do_not_specialize=["count", "num_lookups", "num_rows"])
def _mark_kernel(
    rows,  # [M] sorted
    touched,  # [r]
    count,  # [1] how many lookups are present; None: all M
    num_lookups,
    num_rows,
    BLOCK_M: tl.constexpr,
):
    num_lookups = number_of_lookups(count, num_lookups)
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_row = tl.load(rows + o_m, mask=o_m < num_lookups, other=num_rows).to(tl.int32)
    b_before = tl.load(rows + o_m - 1, mask=(o_m > 0) & (o_m < num_lookups), other=-1).to(tl.int32)
    b_one = tl.full([BLOCK_M], 1, touched.dtype.element_ty)
    tl.store(touched + b_row, b_one, mask=(b_row < num_rows) & (b_row != b_before))


def row_gradient(
    lookups: SortedLookups,
    grad_GV: Tensor,
    values_rV: Tensor | None,
    out: Tensor | None,
    slots_M: Tensor | None = None,
    add: bool = False,
    touched_r: Tensor | None = None,
    columns: slice = WHOLE,
    mark: bool = True,
    first_column: int = 0,
    core_width: int | None = None,
) -> Tensor | None:
    """Write the value gradient to `out`, and return the weight gradient.

    Args:
        lookups: the sorted lookups.
        grad_GV: gradient of the bags.
        values_rV: the table; None if the weight gradient is not needed.
        out: receives the value gradient of the touched rows; None if it is not needed.
        slots_M: index in `out` of each sorted lookup's row; None for the row itself.
        add: whether to add to `out` instead of overwriting the touched rows.
        touched_r: bool; with `add`, the rows of `out` that are added to. All other rows that are
            written are overwritten, and marked.
        columns: the columns to compute.
        mark: whether to mark; False where further columns of these rows follow.
        first_column: column of the whole table with which these columns begin.
        core_width: columns of the whole table that have the same weight, of which a lookup then has
            O; None for all.

    Returns:
        The weight gradient in the original order of the lookups, [M] in fp32, or with core_width
        [M, O], where cores without a column have zeros; None without values.
    """
    num_lookups, row = len(lookups.rows_M), grad_GV.shape[1]
    count, num_rows, device = lookups.count, lookups.num_rows, grad_GV.device
    grad_GV = grad_GV[:, columns]
    values_rV = None if values_rV is None else values_rV[:, columns]
    out = None if out is None else out[:, columns]
    width = grad_GV.shape[1]
    want_weights, want_values = values_rV is not None, out is not None
    if num_lookups == 0:
        none_M = torch.empty_like(lookups.weights_M, dtype=torch.float32)
        return none_M if want_weights else None
    chosen = choices.current().row_gradient
    block, num_blocks, _ = blocks_of_columns(width, chosen.max_block_v, first_column, core_width)
    num_chunks, num_dots = chunks_and_room(num_lookups, count is not None, lookups.expected)
    partials = dots = None
    if want_values:
        partials = torch.empty(num_chunks, 2, width, dtype=torch.float32, device=device)
    if want_weights:
        dots = torch.empty(num_blocks, num_dots, dtype=torch.float32, device=device)
    sizes = {
        "count": count,
        "num_lookups": num_lookups,
        "num_rows": num_rows,
        "chunk": chunk_length(num_lookups),
        "MIN_CHUNK": chosen.min_chunk,
        "V": width,
        "ROW": row,
        "BLOCK_V": block,
        "ADD": add,
        "FIRST": first_column,
        "CORE_WIDTH": core_width,
        **OPTIONS,
    }
    _row_pass_kernel[(num_chunks, num_blocks)](
        lookups.rows_M,
        lookups.bags_M,
        lookups.weights_M,
        slots_M,
        values_rV,
        grad_GV,
        out,
        touched_r,
        partials,
        dots,
        num_dots=num_dots,
        UNROLL=chosen.unroll,
        VALUE_GRAD=want_values,
        WEIGHT_GRAD=want_weights,
        CORES=1 if core_width is None else lookups.weights_M.shape[1],
        # several would store the products of rows without a barrier
        num_warps=1,
        **sizes,
    )
    if want_values:
        _merge_kernel[(num_chunks, num_blocks)](
            lookups.rows_M,
            slots_M,
            partials,
            out,
            touched_r,
            TILE=chosen.merge_tile,
            num_warps=num_warps(block, 4),
            **sizes,
        )
    if touched_r is not None and mark:
        mark_rows_(lookups, touched_r)
    if values_rV is None or dots is None:
        return None
    return _unsorted(dots, lookups, values_rV, grad_GV, row, (first_column, core_width))


def _unsorted(
    dots: Tensor,
    lookups: SortedLookups,
    values_rV: Tensor,
    grad_GV: Tensor,
    row: int,
    split: tuple[int, int | None],
) -> Tensor:
    """Return the weight gradient, from products that have room for some or all of the lookups."""
    num_lookups, count = len(lookups.rows_M), lookups.count
    (num_blocks, num_dots), chosen = dots.shape, choices.current().row_gradient
    (first_column, core_width), width, block_m = split, grad_GV.shape[1], chosen.block_m
    block, _, num_pieces = blocks_of_columns(width, chosen.max_block_v, first_column, core_width)
    num_cores = 1 if core_width is None else lookups.weights_M.shape[1]
    # lookups that were left out get a gradient of zero, and so do cores without a column
    make = torch.empty if count is None and num_pieces == num_cores else torch.zeros
    shape = (num_lookups,) if core_width is None else (num_lookups, num_cores)
    weight_grad = make(shape, dtype=torch.float32, device=dots.device)
    pieces = {"NUM_BLOCKS": num_blocks // num_pieces, "NUM_PIECES": num_pieces, "CORES": num_cores}
    _unsort_kernel[(triton.cdiv(num_dots, block_m), num_pieces)](
        lookups.rows_M,
        lookups.order_M,
        dots,
        weight_grad,
        count,
        num_lookups,
        num_dots,
        lookups.num_rows,
        BLOCK_M=block_m,
        FIRST_CORE=first_column // (core_width or width),
        **pieces,
        **OPTIONS,
    )
    if num_dots < num_lookups:
        _late_dots_kernel[(min(LATE_PROGRAMS, num_lookups - num_dots),)](
            lookups.rows_M,
            lookups.order_M,
            lookups.bags_M,
            values_rV,
            grad_GV,
            weight_grad,
            count,
            num_dots,
            V=width,
            ROW=row,
            BLOCK_V=block,
            FIRST=first_column,
            CORE_WIDTH=core_width,
            **pieces,
            num_warps=1,
            **OPTIONS,
        )
    return weight_grad


def mark_rows_(lookups: SortedLookups, touched_r: Tensor) -> None:
    """Set the flags of the rows that sorted lookups read."""
    num_lookups, block_m = len(lookups.rows_M), choices.current().row_gradient.block_m
    if num_lookups:
        _mark_kernel[(triton.cdiv(num_lookups, block_m),)](
            lookups.rows_M,
            touched_r,
            lookups.count,
            num_lookups,
            lookups.num_rows,
            BLOCK_M=block_m,
            **OPTIONS,
        )
