"""What depends on the card: sizes of blocks, unrolling, warps, chunks, and forms of ops.

    GENERAL     the choices for GPUs that were not measured, and for Triton's interpreter
    DEFAULTS    the choices for GPUs that were measured, by compute capability

Kernels ask current() at every launch. It returns the choices that the process was told to use,
which a run reads from the file of `megamem tune`, or else those for the compute capability of the
GPU.

Choices do not change what an op computes. They can change the order of its sums, as far as its
reference leaves that open, and which of two sub-keys is chosen if their scores differ by rounding
alone. Every number but one is a power of two.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class ProductTopk:
    """product_topk: the form two_looks, and with names of their own the form fused."""

    tile: int = 512
    """Scores of one half that a program loads at once in the second pass."""
    score_bytes: int = 2**26
    """Bytes of the scores of the tokens that are scored at once."""
    fused_tile: int = 2**13
    """Scores that a program of the form fused holds in registers."""
    fused_block_t: int = 128
    """The most tokens of a program."""
    fused_block_c: int = 64
    """Columns of queries and sub-keys that are multiplied at once."""
    fused_warps: int = 8
    fused_stages: int = 3
    """Blocks of columns that are loaded ahead; of all numbers this one is no power of two."""
    fused_exact_tile: int = 2**12
    """Scores of a program that computes reads with many equal scores again."""
    fused_full_look: int = 2048
    """Up to so many sub-keys the first look is at all of them."""
    fused_bytes: int = 2**26
    """Bytes of the candidates of the tokens that are processed at once."""


@dataclass(frozen=True)
class ProductTopkBackward:
    """The form dense of product_topk's backward."""

    tile: int = 512
    """Pairs of a program."""
    zeros_tile: int = 4096
    """Zeros that a program stores at once."""
    num_warps: int = 4
    dense_bytes: int = 2**26
    """Bytes of the dense gradient of the tokens that are processed at once."""


@dataclass(frozen=True)
class EmbeddingBag:
    """The forward of embedding_bag."""

    max_block_v: int = 1024
    """The most columns that a program sums."""
    unroll: int = 8
    """Lookups whose rows a program loads at once."""
    compact_block: int = 128
    """Lookups of a bag that are compacted at once."""


@dataclass(frozen=True)
class RowGradient:
    """The backward of embedding_bag and row_dot.

    On an H100, blocks of 512 columns take 8 to 12 % less time than those of 256 if lookups are
    skewed (Zipf 1.0); for uniform lookups nothing was faster than these numbers.
    """

    max_block_v: int = 256
    """The most columns that a program sums."""
    unroll: int = 4
    """Lookups whose rows a program loads at once."""
    merge_tile: int = 8
    """Partial sums that are added at once."""
    target_chunks: int = 8192
    """Enough chunks of lookups to fill a GPU, few enough that their partial sums stay small."""
    min_chunk: int = 32
    """The fewest lookups of a chunk."""
    max_chunk: int = 512
    """The most lookups of a chunk."""
    block_m: int = 256
    """Lookups of a program that does little for each."""


@dataclass(frozen=True)
class SortLookups:
    """The form radix of the sort of lookups by row."""

    radix: int = 1024
    """The most values of a digit: the more, the fewer passes, and the more counters of each
    program."""
    tile: int = 2048
    """Lookups that a program sorts at once."""
    max_programs: int = 512
    num_warps: int = 8


@dataclass(frozen=True)
class RowAdam:
    """The steps of the tables' optimizers."""

    tile: int = 1024
    """Elements that a program updates at once."""
    max_block_v: int = 1024
    """The most columns that a program updates at once."""
    row_moment_tile: int = 1024
    """The same for a step on every row with one second moment per row."""
    row_moment_block_v: int = 1024
    num_warps: int = 4


@dataclass(frozen=True)
class SquaredNorm:
    """The gradient norm of a table."""

    rows: int = 64
    """Rows of a program. A table of a million rows then has 16,384 of them."""
    tile: int = 2048
    """Elements that a program reads at once."""
    max_block_v: int = 1024
    """The most columns that a program reads at once."""
    num_warps: int = 4


@dataclass(frozen=True)
class Choices:
    """The choices of every op, and the forms of ops that are not the default."""

    product_topk: ProductTopk = ProductTopk()
    product_topk_backward: ProductTopkBackward = ProductTopkBackward()
    embedding_bag: EmbeddingBag = EmbeddingBag()
    row_gradient: RowGradient = RowGradient()
    sort_lookups: SortLookups = SortLookups()
    row_adam: RowAdam = RowAdam()
    squared_norm: SquaredNorm = SquaredNorm()
    forms: Mapping[str, str] = field(default_factory=dict)
    """Op -> its form, where that is not the default of megamem.ops.forms."""

    def changed(self, op: str, **values: Any) -> "Choices":
        """These choices with other numbers for one op; its form is the value of `form`."""
        chosen = self
        if (form := values.pop("form", None)) is not None:
            chosen = replace(chosen, forms={**self.forms, op: form})
        if values:
            made: dict[str, Any] = {op: replace(getattr(self, op), **values)}
            chosen = replace(chosen, **made)
        return chosen


OPS = tuple(each.name for each in fields(Choices) if each.name != "forms")
"""The ops whose kernels have numbers to choose."""

GENERAL = Choices()
# tensor cores that read their operands from shared memory, and do not keep them in registers, leave
# room for larger tiles; no GPU has timed them yet
_LARGE_TILES = ProductTopk(fused_tile=2**14)
DEFAULTS: dict[tuple[int, int], Choices] = {
    # tests/bench/results/h100-a4677c2-stages.json has the measurements of the step
    (9, 0): Choices(
        product_topk=_LARGE_TILES,
        row_adam=RowAdam(row_moment_tile=2048, row_moment_block_v=2048),
    ),
    (10, 0): Choices(product_topk=_LARGE_TILES),
}
_of_process: Choices | None = None
"""The choices of this process, if it was told any; all of its threads use them."""


def of_capability(capability: tuple[int, int]) -> Choices:
    """Return the choices for GPUs of a compute capability, such as (9, 0)."""
    return DEFAULTS.get(capability, GENERAL)


def current() -> Choices:
    """Return the choices that kernels which are launched now use."""
    if _of_process is not None:
        return _of_process
    # a kernel is launched on the current GPU; asking for it would initialise CUDA
    if not torch.cuda.is_initialized():
        return GENERAL
    return _of_device(torch.cuda.current_device())


@lru_cache
def _of_device(index: int) -> Choices:
    return of_capability(torch.cuda.get_device_capability(index))


def use(choices: Choices | None) -> None:
    """Use these choices in this process from now on; None for those of its GPU."""
    global _of_process
    _of_process = choices


@contextmanager
def using(choices: Choices | None) -> Iterator[None]:
    """Use these choices inside of a `with` block; None for those of the GPU."""
    before = _of_process
    use(choices)
    try:
        yield
    finally:
        use(before)
