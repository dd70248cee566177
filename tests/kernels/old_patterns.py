"""Small kernels with the faults that the checks must find, and the same kernels without them.

    python -m tests.kernels.old_patterns      compiles them and prints what is found

The first four are as they stood in megamem/kernels until a GPU showed them to be wrong, though
every test had passed in the interpreter.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tests.kernels.aot import report

N = 2048


@triton.jit
def _clear_kernel(
    weights, grads, copy, V: tl.constexpr, BLOCK_V: tl.constexpr, CURED: tl.constexpr
):
    """The gradient is read by threads of 8 columns, as the copy is written, and cleared by 4."""
    row = tl.program_id(0).to(tl.int64) * V
    for i_v in range(0, V, BLOCK_V):
        o_v = row + i_v + tl.arange(0, BLOCK_V)
        b_grad = tl.load(grads + o_v)
        b_weight = tl.load(weights + o_v)
        if CURED:
            tl.debug_barrier()
        tl.store(grads + o_v, tl.zeros([BLOCK_V], tl.float32))
        b_new = b_weight - 0.1 * b_grad
        tl.store(copy + o_v, b_new.to(tl.bfloat16))
        tl.store(weights + o_v, b_new)


@triton.jit
def _count_kernel(counts, steps, out, step, BLOCK_R: tl.constexpr, CURED: tl.constexpr):
    """All warps read the counter of a row, one thread writes it."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_count = tl.load(counts + o_r) + 1
    b_gap = step - tl.load(steps + o_r)
    if CURED:
        tl.debug_barrier()
    tl.store(counts + o_r, b_count)
    tl.store(steps + o_r, b_gap * 0 + step)
    o_v = o_r[:, None] * 1024 + tl.arange(0, 1024)[None, :]
    tl.store(out + o_v, tl.load(out + o_v) * (b_count * b_gap).to(tl.float32)[:, None])


@triton.jit(noinline=True)
def _sort_apart(out, BLOCK: tl.constexpr):
    o_out = out + tl.arange(0, BLOCK)
    b_sorted = tl.sort(tl.load(o_out))
    tl.debug_barrier()
    tl.store(o_out, b_sorted)


@triton.jit
def _sort_inlined(out, BLOCK: tl.constexpr):
    o_out = out + tl.arange(0, BLOCK)
    b_sorted = tl.sort(tl.load(o_out))
    tl.debug_barrier()
    tl.store(o_out, b_sorted)


@triton.jit
def _call_kernel(query, keys, out, BLOCK: tl.constexpr, CURED: tl.constexpr):
    """The function sorts in the shared memory that holds the query."""
    o_t = tl.arange(0, BLOCK)[:, None]
    o_c = tl.arange(0, BLOCK)[None, :]
    b_query = tl.load(query + o_t * BLOCK + o_c)
    for i_n in range(0, 512, BLOCK):
        b_keys = tl.load(keys + (i_n + o_c) * BLOCK + o_t)
        b_best = tl.max(tl.dot(b_query, b_keys), axis=1)
        tl.debug_barrier()
        tl.store(out + tl.arange(0, BLOCK), b_best)
        tl.debug_barrier()
        if CURED:
            _sort_inlined(out, BLOCK)
        else:
            _sort_apart(out, BLOCK)


@triton.jit
def _round_kernel(x, out, BLOCK: tl.constexpr, CURED: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x + o)
    if CURED:
        tl.store(out + o, tl.div_rn(b_x, tl.sqrt_rn(b_x) + 1))
    else:
        tl.store(out + o, b_x / (tl.sqrt(b_x) + 1))


@triton.jit
def _read_back_kernel(x, scratch, out, BLOCK: tl.constexpr, CURED: tl.constexpr):
    """Each thread reads what another wrote."""
    o = tl.arange(0, BLOCK)
    tl.store(scratch + o, tl.load(x + o))
    if CURED:
        tl.debug_barrier()
    tl.store(out + o, tl.load(scratch + BLOCK - 1 - o))


@triton.jit
def _next_round_kernel(x, scratch, out, rounds, BLOCK: tl.constexpr, CURED: tl.constexpr):
    """What one round of the loop writes, the next one reads."""
    o = tl.arange(0, BLOCK)
    for i in range(rounds):
        b_x = tl.load(scratch + BLOCK - 1 - o)
        tl.debug_barrier()
        tl.store(scratch + o, b_x + tl.load(x + i * BLOCK + o))
        if CURED:
            tl.debug_barrier()
    tl.store(out + o, rounds)


@triton.jit
def _window_kernel(x, STEPS: tl.constexpr, BLOCK: tl.constexpr, CURED: tl.constexpr):
    """Windows of different rounds overlap; tiles do not."""
    STEP: tl.constexpr = BLOCK if CURED else 16
    for i in range(0, STEPS * STEP, STEP):
        o_x = x + i + tl.arange(0, BLOCK)
        tl.store(o_x, tl.load(o_x) + 1)


@triton.jit
def _choice_kernel(x, scratch, other, which, out, BLOCK: tl.constexpr, CURED: tl.constexpr):
    """A pointer that is one of two arguments, and moves from round to round."""
    o = tl.arange(0, BLOCK)
    target = scratch
    if tl.load(which) > 0:
        target = other
    for i in range(tl.load(which + 1)):
        tl.debug_barrier()
        tl.store(target + o, tl.load(x + i * BLOCK + o))
        target += BLOCK
    if CURED:
        tl.debug_barrier()
    tl.store(out + o, tl.load(scratch + 2 * o))


@triton.jit
def _atomic_kernel(counts, out, BLOCK: tl.constexpr, CURED: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.atomic_add(counts + o % 16, 1)
    if CURED:
        tl.debug_barrier()
    tl.store(out + o, tl.load(counts + o // 64))


@triton.jit
def _scalar_kernel(counts, out, BLOCK: tl.constexpr, CURED: tl.constexpr):
    """A barrier that not every program comes by."""
    count = tl.load(counts)
    if CURED or count > 3:
        tl.debug_barrier()
    tl.store(counts, count + 1)
    tl.store(out + tl.arange(0, BLOCK), count)


@triton.jit
def _row_kernel(sums, x, V: tl.constexpr, CURED: tl.constexpr):
    """All columns of a row have one address."""
    o_r = tl.arange(0, 4)[:, None]
    o_sums = sums + o_r + tl.zeros([4, V], tl.int32)
    if CURED:
        o_sums += 4 * tl.arange(0, V)[None, :]
    b_x = tl.load(x + o_r * V + tl.arange(0, V)[None, :])
    tl.store(o_sums, tl.load(o_sums) + b_x)


class Pattern(NamedTuple):
    found: set[str]
    """The arguments that are raced for, or the approximate instructions, or "" for the kernel."""
    launch: Callable[[bool], object]


def _tensor(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(N, N, dtype=dtype, device="meta")


_INT, _BF16 = torch.int32, torch.bfloat16
PATTERNS = {
    "gradient cleared": Pattern(
        {"grads"},
        lambda cured: _clear_kernel[(1,)](_tensor(), _tensor(), _tensor(_BF16), N, 1024, cured),
    ),
    "counters": Pattern(
        {"counts", "steps"},
        lambda cured: _count_kernel[(1,)](_tensor(_INT), _tensor(_INT), _tensor(), N, 1, cured),
    ),
    "function beside tiles": Pattern(
        {""},
        lambda cured: _call_kernel[(1,)](_tensor(_BF16), _tensor(_BF16), _tensor(), 64, cured),
    ),
    "approximate": Pattern(
        {"div.full.f32", "sqrt.approx.ftz.f32"},
        lambda cured: _round_kernel[(1,)](_tensor(), _tensor(), 256, cured),
    ),
    "read back": Pattern(
        {"scratch"},
        lambda cured: _read_back_kernel[(1,)](_tensor(), _tensor(), _tensor(), 256, cured),
    ),
    "read back by one warp": Pattern(
        {"scratch"},
        lambda cured: _read_back_kernel[(1,)](
            _tensor(), _tensor(), _tensor(), 128, cured, num_warps=1
        ),
    ),
    "next round": Pattern(
        {"scratch"},
        lambda cured: _next_round_kernel[(1,)](_tensor(), _tensor(), _tensor(), N, 128, cured),
    ),
    "window": Pattern({"x"}, lambda cured: _window_kernel[(1,)](_tensor(), 8, 128, cured)),
    "choice of pointers": Pattern(
        {"scratch"},
        lambda cured: _choice_kernel[(1,)](
            _tensor(), _tensor(), _tensor(), _tensor(_INT), _tensor(), 128, cured
        ),
    ),
    "atomic": Pattern(
        {"counts"}, lambda cured: _atomic_kernel[(1,)](_tensor(_INT), _tensor(_INT), 1024, cured)
    ),
    "barrier on one path": Pattern(
        {"counts"}, lambda cured: _scalar_kernel[(1,)](_tensor(_INT), _tensor(_INT), 128, cured)
    ),
    "one address for many": Pattern(
        {"sums"}, lambda cured: _row_kernel[(1,)](_tensor(), _tensor(), 128, cured)
    ),
}
CURED = " cured"


def _launch(pattern: Pattern, cured: bool, tokens: int) -> None:
    pattern.launch(cured)


if __name__ == "__main__":
    cases = {
        name + CURED * cured: partial(_launch, pattern, cured)
        for name, pattern in PATTERNS.items()
        for cured in (False, True)
    }
    report(cases, [90], "--json" in sys.argv)
