"""Compiles the kernels for GPUs that need not be there, counts what they use and looks for faults.

    python -m tests.kernels.aot [--all] [--json]

The host functions run as they are, on tensors without memory; a driver that only names its target
stands in for the GPU, and every launch stops after compiling. So the shapes, dtypes and options
are those of real launches, and a second launch that compiles again is caught.

Faults are registers that spill, more shared memory than there is, races between the threads of a
program (tests.kernels.races), and instructions that round worse than IEEE arithmetic. It ends with
status 1 if there are any.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megamem.kernels import choices, product_topk_fused
from megamem.kernels.embedding_bag import sum_bags
from megamem.kernels.placement import place_rows
from megamem.kernels.product_topk import product_topk
from megamem.kernels.product_topk_backward import product_topk_backward
from megamem.kernels.row_adam import update_rows_
from megamem.kernels.row_gradient import row_gradient
from megamem.kernels.sort_lookups import SortedLookups, sort_by_radix, sort_by_torch
from megamem.kernels.squared_norm import squared_norm
from megamem.kernels.tucker_topk import tucker_topk
from megamem.kernels.tucker_topk_backward import tucker_topk_backward
from tests.kernels.races import Race, find_races

TRITON = ".".join(triton.__version__.split(".")[:2])
# what a program may take of a multiprocessor's shared memory, in KiB
SHARED_KIB = {80: 163, 90: 227, 100: 227, 120: 99}
ARCHITECTURES = tuple(SHARED_KIB)
# of kernel and argument: why no barrier is needed where the check asks for one
_SLOT = "no two candidates of a read have one slot, as {}; slots are read by a later kernel"
NO_RACE = {
    ("_candidates_kernel", "slots"): _SLOT.format("an atomic addition counts them"),
    ("_exact_kernel", "slots"): _SLOT.format("sums count them"),
    ("_row_pass_kernel", "out"): "a row is loaded and stored for one of its lookups only, the "
    "last, in one layout; what the next lookups load are other rows",
}
# of kernel and instruction: why it may be approximate
MAY_APPROXIMATE: dict[tuple[str, str], str] = {}
# of the release of Triton, kernel, case and architecture: bytes that may spill, and why
_FEW = "two or four registers, outside of the loops over blocks of sub-keys, or in fp32 alone"
_LIMITED = "ptxas limits registers to 96 or 128, for more programs at once, and spills a few"
MAY_SPILL = {
    ("3.6", "_merge_kernel", "gradient fp32 V=1000 += fp32", 80): (
        8,
        "ptxas gives the kernel 32 registers and needs one more; it runs once for rows that "
        "several chunks share",
    ),
    ("3.9", "_pairs_kernel", "fused top-k bf16 N=16384 C=128 K=64", 100): (8, _FEW),
    ("3.9", "_pairs_kernel", "fused top-k bf16 N=16384 C=128 K=64", 120): (8, _FEW),
    ("3.6", "_pairs_kernel", "fused top-k bf16 N=16384 C=128 K=64", 80): (8, _FEW),
    ("3.6", "_exact_kernel", "fused top-k fp32 N=4096 C=512 K=32", 90): (8, _FEW),
    ("3.6", "_exact_kernel", "fused top-k fp32 N=4096 C=512 K=32", 120): (8, _FEW),
    ("3.6", "_candidates_kernel", "fused top-k fp32 N=4096 C=512 K=32", 120): (16, _FEW),
    ("3.6", "_best_pairs_kernel", "Tucker bf16 N=1138 K=42 F=256", 80): (16, _LIMITED),
    ("3.6", "_best_sides_kernel", "Tucker bf16 N=1138 K=42 F=256", 90): (8, _LIMITED),
    ("3.6", "_best_sides_kernel", "Tucker bf16 N=1138 K=42 F=256", 100): (8, _LIMITED),
    ("3.6", "_best_sides_kernel", "Tucker bf16 N=3578 K=42 F=42 H=2", 80): (8, _LIMITED),
}
_APPROXIMATE = re.compile(r"\b(?:[a-z0-9]+\.approx|div\.full)[.\w]*")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Sort = Callable[..., SortedLookups]
# absent lookups are left out, and there is no room for the products of most of those present
FEW_EXPECTED: Sort = partial(sort_by_radix, expected=1)


class Usage(NamedTuple):
    kernel: str
    case: str
    arch: int
    warps: int
    registers: int
    shared: int
    spilled: int
    """Bytes per thread that did not fit into registers and went to local memory."""
    races: list[Race]
    approximate: list[str]
    """Instructions of the PTX that round worse than IEEE arithmetic."""

    def faults(self) -> list[str]:
        """What is wrong with it, apart from what the tables above allow."""
        found = []
        allowed, _ = MAY_SPILL.get((TRITON, self.kernel, self.case, self.arch), (0, ""))
        if self.spilled > allowed:
            found.append(f"{self.spilled} bytes per thread do not fit into registers")
        if self.shared > SHARED_KIB[self.arch] * 1024:
            found.append(f"more than {SHARED_KIB[self.arch]} KiB of shared memory")
        for argument, message in self.races:
            if (self.kernel, argument) not in NO_RACE:
                found.append(f"{argument}: {message}" if argument else message)
        for instruction in self.approximate:
            if (self.kernel, instruction) not in MAY_APPROXIMATE:
                found.append(f"{instruction} is approximate")
        return found


class _Driver:
    """As much of a driver as compiling takes; each architecture is a device of its own."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def _meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _lookups(tokens: int, ids: torch.dtype = torch.int64) -> tuple[torch.Tensor, ...]:
    return (
        _meta(tokens * 16, dtype=ids),
        _meta(tokens * 16),
        _meta(tokens + 1, dtype=torch.int64),
    )


def _bags(dtype: torch.dtype, width: int, ids: torch.dtype = torch.int32) -> Callable[[int], None]:
    return lambda tokens: sum_bags(_meta(2**20, width, dtype=dtype), *_lookups(tokens, ids))


def _cores(
    dtype: torch.dtype,
    width: int,
    num_cores: int,
    core_width: int,
    first_column: int = 0,
    sort: Sort = sort_by_torch,
    first_touch: bool = False,
) -> Callable[[int], None]:
    """Bags and gradients of lookups with several weights, all pieces in one launch."""

    def run(tokens: int) -> None:
        row_ids, weights, offsets = _lookups(tokens)
        several = _meta(len(weights), num_cores)
        table, grad = (_meta(n, width, dtype=dtype) for n in (2**20, tokens))
        split = {"first_column": first_column, "core_width": core_width}
        sum_bags(table, row_ids, several, offsets, **split)
        lookups = replace(sort(row_ids, weights, offsets, 2**20), weights_M=several)
        out = _meta(2**20, width)
        flags = _meta(2**20, dtype=torch.bool) if first_touch else None
        row_gradient(lookups, grad, table, out, add=True, touched_r=flags, **split)

    return run


def _piece(dtype: torch.dtype, width: int, columns: slice) -> Callable[[int], None]:
    """Bags and gradients of some columns of a table."""

    def run(tokens: int) -> None:
        table, grad = (_meta(n, width, dtype=dtype) for n in (2**20, tokens))
        flags, out = _meta(2**20, dtype=torch.bool), _meta(2**20, width)
        sum_bags(table, *_lookups(tokens), columns=columns)
        lookups = sort_by_torch(*_lookups(tokens), 2**20)
        row_gradient(lookups, grad, table, out, None, True, flags, columns, mark=False)

    return run


def _gradient(
    dtype: torch.dtype,
    width: int,
    out_dtype: torch.dtype | None = None,
    sparse: bool = False,
    want_weights: bool = True,
    num_rows: int = 2**20,
    first_touch: bool = False,
    sort: Sort = sort_by_torch,
) -> Callable[[int], None]:
    def run(tokens: int) -> None:
        flags = _meta(num_rows, dtype=torch.bool) if first_touch else None
        lookups = sort(*_lookups(tokens), num_rows)
        slots = _meta(tokens * 16, dtype=torch.int32) if sparse else None
        values = _meta(num_rows, width, dtype=dtype) if want_weights else None
        out = _meta(num_rows, width, dtype=out_dtype or dtype)
        grad = _meta(tokens, width, dtype=dtype)
        add = out_dtype is not None
        row_gradient(lookups, grad, values, out, slots, add=add, touched_r=flags)

    return run


def _products(dtype: torch.dtype, width: int, sort: Sort = sort_by_torch) -> Callable[[int], None]:
    """Rows times the vectors of their bags, which is a weight gradient alone."""

    def run(tokens: int) -> None:
        lookups = sort(*_lookups(tokens), 2**20)
        vectors, values = _meta(tokens, width, dtype=dtype), _meta(2**20, width, dtype=dtype)
        row_gradient(lookups, vectors, values, None)

    return run


def _sort(
    num_rows: int, may_skip: bool = True, ids: torch.dtype = torch.int32
) -> Callable[[int], None]:
    def run(tokens: int) -> None:
        row_ids, weights, offsets = _lookups(tokens, ids)
        for equal_bags in (True, False):
            sort_by_radix(row_ids, weights, offsets, num_rows, may_skip, equal_bags)

    return run


def _topk(
    dtype: torch.dtype,
    num_keys: int,
    key_dim: int,
    topk: int,
    form: Callable[..., object] = product_topk,
) -> Callable[[int], None]:
    def run(tokens: int) -> None:
        query = _meta(tokens, 4, 2 * key_dim, dtype=dtype)
        form(query, _meta(2, 4, num_keys, key_dim, dtype=dtype), topk)

    return run


_fused = partial(_topk, form=product_topk_fused.product_topk)


def _topk_backward(
    dtype: torch.dtype, num_keys: int, key_dim: int, topk: int
) -> Callable[[int], None]:
    def run(tokens: int) -> None:
        grad, row_ids = _meta(tokens, 4, topk), _meta(tokens, 4, topk, dtype=torch.int64)
        query = _meta(tokens, 4, 2 * key_dim, dtype=dtype)
        sub_keys = _meta(2, 4, num_keys, key_dim, dtype=dtype)
        product_topk_backward(grad, row_ids, query, sub_keys)

    return run


def _tucker(
    dtype: torch.dtype,
    num_keys: int,
    width: int,
    topk: int,
    final_topk: int,
    heads: int = 1,
    rank: int = 2,
    cores: int = 2,
    queries: int = 1,
) -> Callable[[int], None]:
    def run(tokens: int) -> None:
        query = _meta(tokens, 2, queries, width, dtype=dtype)
        keys = _meta(2, heads, num_keys, rank, width, dtype=dtype)
        all_cores, directions = _meta(cores, heads, rank, rank), _meta(2, heads, rank)
        tucker_topk(query, keys, all_cores, directions, topk, final_topk)

    return run


def _tucker_backward(
    topk: int, final_topk: int, heads: int = 1, rank: int = 2, cores: int = 2
) -> Callable[[int], None]:
    def run(tokens: int) -> None:
        grad, sides = _meta(tokens, heads, final_topk, cores), _meta(2, tokens, heads, rank, topk)
        pairs = _meta(tokens, heads, final_topk, dtype=torch.int32)
        tucker_topk_backward(grad, pairs, sides, _meta(cores, heads, rank, rank))

    return run


def _adam(
    dtype: torch.dtype,
    touched: bool,
    row_wise: bool = False,
    width: int = 2048,
    moments: bool = True,
    few: bool = False,
    sliced: bool = False,
) -> Callable[[int], None]:
    def run(tokens: int) -> None:
        num_rows = 2**20
        table, random = (num_rows, width), dtype == BF16
        counters: tuple[torch.Tensor | None, ...] = (None, None, None)
        if touched:
            counters = tuple(
                _meta(size, dtype=kind)
                for size, kind in (
                    (tokens, torch.int64),
                    (num_rows, torch.int32),
                    (num_rows, torch.int32),
                )
            )
        update_rows_(
            _meta(*table, dtype=dtype),
            _meta(tokens if touched else num_rows, width),
            _meta(*table, dtype=dtype) if moments else None,
            (_meta(num_rows) if row_wise else _meta(*table, dtype=dtype)) if moments else None,
            *(counters if moments else counters[:1]),
            step=tokens,
            lr=0.1 / tokens,
            betas=(0.9, 0.99),
            eps=1e-8,
            weight_decay=0.1,
            grad_scale=_meta(1),
            copy_rV=None if random else _meta(*table, dtype=BF16),
            seed=tokens if random else None,
            row_offset=tokens,
            column_offset=1024 * tokens if sliced else 0,
            row_squares_r=_meta(num_rows) if sliced else None,
            touched_r=_meta(num_rows, dtype=torch.bool) if few else None,
            clear_grads=few,
        )

    return run


def _norm(dtype: torch.dtype, width: int, touched: bool = True) -> Callable[[int], None]:
    def run(tokens: int) -> None:
        rows = 256 * tokens
        flags = _meta(rows, dtype=torch.bool) if touched else None
        squared_norm(_meta(rows, width, dtype=dtype), flags)

    return run


def _placement(tokens: int) -> None:
    for placed in (torch.int64, torch.int32):
        pairs = _meta(tokens, 16, dtype=torch.int64)
        place_rows(pairs, 1024, [tokens, 2**31, 3, 4 * tokens], placed)


CASES: dict[str, Callable[[int], None]] = {
    "placement": _placement,
    "bf16 V=2048": _bags(BF16, 2048),
    "gradient bf16 V=2048": _gradient(BF16, 2048),
    "gradient bf16 += fp32": _gradient(BF16, 2048, out_dtype=FP32),
    "gradient bf16 first touch fp32": _gradient(BF16, 2048, out_dtype=FP32, first_touch=True),
    "sort of rows": _sort(2**20),
    "gradient of those present": _gradient(BF16, 2048, out_dtype=FP32, sort=FEW_EXPECTED),
    "two cores bf16 V=512": _cores(BF16, 512, 2, 256, first_touch=True),
    "top-k bf16 N=1024 C=512 K=32": _topk(BF16, 1024, 512, 32),
    "fused top-k bf16 N=1024 C=512 K=32": _fused(BF16, 1024, 512, 32),
    "top-k backward bf16 N=1024 K=32": _topk_backward(BF16, 1024, 512, 32),
    "Tucker bf16 N=1138 K=42 F=256": _tucker(BF16, 1138, 192, 42, 256),
    "Tucker backward K=42 F=256": _tucker_backward(42, 256),
    "adam fp32, gradients of few rows": _adam(FP32, touched=False, few=True),
    "adam bf16 random, touched": _adam(BF16, touched=True),
    "norm fp32 V=2048": _norm(FP32, 2048),
}
MORE_CASES: dict[str, Callable[[int], None]] = {
    "fp32 V=1024": _bags(FP32, 1024),
    "fp16 V=1536": _bags(FP16, 1536),
    "bf16 V=8": _bags(BF16, 8),
    "bf16 V=24": _bags(BF16, 24),
    "fp32 V=1000": _bags(FP32, 1000),
    "bf16 V=4096": _bags(BF16, 4096),
    "bf16 V=2048, ids of 8 bytes": _bags(BF16, 2048, ids=torch.int64),
    "gradient fp32 V=1024": _gradient(FP32, 1024),
    "gradient bf16 V=8": _gradient(BF16, 8),
    "gradient fp32 V=1000 += fp32": _gradient(FP32, 1000, out_dtype=FP32),
    "gradient fp16 V=72": _gradient(FP16, 72),
    "gradient bf16 += bf16": _gradient(BF16, 4096, out_dtype=BF16),
    "gradient fp32 V=1000 first touch": _gradient(FP32, 1000, out_dtype=FP32, first_touch=True),
    "gradient bf16 first touch bf16": _gradient(
        BF16, 4096, out_dtype=BF16, first_touch=True, want_weights=False
    ),
    "gradient bf16 sparse": _gradient(BF16, 2048, sparse=True, want_weights=False),
    "products bf16 V=2048": _products(BF16, 2048),
    "gradient of sub-keys": _gradient(BF16, 256, want_weights=False, num_rows=8192),
    "gradient fp32 V=1000, of those present": _gradient(
        FP32, 1000, out_dtype=FP32, sort=FEW_EXPECTED
    ),
    "gradient bf16 first touch, of those present": _gradient(
        BF16, 2048, out_dtype=BF16, first_touch=True, sort=FEW_EXPECTED
    ),
    "products bf16 V=2048, of those present": _products(BF16, 2048, sort=FEW_EXPECTED),
    "two cores bf16 V=1024, of those present": _cores(BF16, 1024, 2, 512, sort=FEW_EXPECTED),
    "two cores bf16 V=2048": _cores(BF16, 2048, 2, 1024),
    "four cores fp32 V=1000": _cores(FP32, 1000, 4, 504, 520, first_touch=True),
    "four cores bf16 V=24, one column block": _cores(BF16, 24, 4, 8, 8),
    "a piece, bf16 V=1024": _piece(BF16, 1024, slice(512, 1024)),
    "a piece, bf16 V=24": _piece(BF16, 24, slice(8, 16)),
    "a piece, fp32 V=1000": _piece(FP32, 1000, slice(8, 512)),
    "sort of rows, all present": _sort(2**20, may_skip=False),
    "sort of few rows": _sort(100, ids=torch.int64),
    "sort of many rows": _sort(2**31 - 1, ids=torch.int64),
    "top-k fp32 N=4096 C=512 K=32": _topk(FP32, 4096, 512, 32),
    "top-k bf16 N=16384 C=128 K=64": _topk(BF16, 16384, 128, 64),
    "top-k bf16 N=46340 C=512 K=128": _topk(BF16, 46340, 512, 128),
    "top-k fp16 N=16 C=20 K=8": _topk(FP16, 16, 20, 8),
    "top-k bf16 N=1 C=256 K=1": _topk(BF16, 1, 256, 1),
    "fused top-k bf16 N=4096 C=512 K=32": _fused(BF16, 4096, 512, 32),
    "fused top-k bf16 N=16384 C=512 K=32": _fused(BF16, 16384, 512, 32),
    "fused top-k bf16 N=16384 C=128 K=64": _fused(BF16, 16384, 128, 64),
    "fused top-k bf16 N=100 C=24 K=8": _fused(BF16, 100, 24, 8),
    "fused top-k fp16 N=1024 C=256 K=16": _fused(FP16, 1024, 256, 16),
    "fused top-k fp32 N=4096 C=512 K=32": _fused(FP32, 4096, 512, 32),
    "top-k backward bf16 N=100 K=8": _topk_backward(BF16, 100, 24, 8),
    "top-k backward bf16 N=2048 K=64": _topk_backward(BF16, 2048, 512, 64),
    "top-k backward fp32 N=1000 K=33": _topk_backward(FP32, 1000, 64, 33),
    "Tucker bf16 N=1138 K=32 F=32": _tucker(BF16, 1138, 192, 32, 32),
    "Tucker bf16 N=3578 K=42 F=42 H=2": _tucker(BF16, 3578, 512, 42, 42, heads=2),
    "Tucker bf16 N=964 K=128 F=768": _tucker(BF16, 964, 524, 128, 768, queries=2),
    "Tucker fp32 N=100 K=5 F=7 A=4": _tucker(FP32, 100, 24, 5, 7, rank=4, cores=1, queries=4),
    "Tucker bf16 N=10 K=1 F=1 A=1": _tucker(BF16, 10, 24, 1, 1, rank=1, cores=4),
    "Tucker backward K=32 F=32": _tucker_backward(32, 32),
    "Tucker backward K=42 F=42 H=2": _tucker_backward(42, 42, heads=2),
    "Tucker backward K=128 F=768": _tucker_backward(128, 768),
    "Tucker backward K=5 F=7 A=4": _tucker_backward(5, 7, rank=4, cores=3),
    "adam fp32 + bf16 copy": _adam(FP32, touched=False),
    "adam fp32 + bf16 copy V=1024, few": _adam(FP32, touched=False, width=1024, few=True),
    "adam bf16 random": _adam(BF16, touched=False),
    "adam bf16 random, few": _adam(BF16, touched=False, few=True),
    "sgd bf16 random, touched": _adam(BF16, touched=True, moments=False),
    "adam bf16 random, moment per row": _adam(BF16, touched=False, row_wise=True),
    "moment per row V=512, few": _adam(BF16, touched=False, row_wise=True, width=512, few=True),
    "moment per row, slices, few": _adam(FP32, False, row_wise=True, few=True, sliced=True),
    "sgd fp32 V=1000, few": _adam(FP32, touched=False, moments=False, width=1000, few=True),
    "adam fp32 touched V=72": _adam(FP32, touched=True, width=72),
    "norm bf16 V=1000": _norm(BF16, 1000),
    "norm fp32 V=8, all rows": _norm(FP32, 8, touched=False),
}


def compile_cases(cases: dict[str, Callable[[int], None]], arch: int) -> Iterator[Usage]:
    """What every kernel of every case uses on one architecture.

    Raises:
        RuntimeError: another number of tokens made a kernel compile again.
    """
    driver.set_active(_Driver(arch))  # type: ignore[arg-type]
    choices.use(choices.of_capability((arch // 10, arch % 10)))
    launched: dict[Any, str] = {}
    launch = JITFunction.run

    def stop_after_compiling(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = launch(self, *args, warmup=True, **kwargs)
        if kernel not in launched and case is None:
            raise RuntimeError(f"{kernel.name} compiles again for another number of tokens")
        launched.setdefault(kernel, case)

    JITFunction.run = stop_after_compiling
    case: str | None = None
    try:
        for name, run in cases.items():
            case = name
            run(4096)
            case = None
            for tokens in (1, 15, 16, 4097):
                run(tokens)
    finally:
        JITFunction.run = launch
        choices.use(None)
    for kernel, case in launched.items():
        yield _measure(kernel, case, arch)


def _measure(kernel: Any, case: str, arch: int) -> Usage:
    """What the machine code that would be launched says of itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(kernel.asm["cubin"])
        binary.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", binary.name]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", log)[1])  # type: ignore[index]
        for name in ("REG", "STACK", "LOCAL")
    )
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    # what is constant is no argument of the compiled kernel
    arguments = [name for name, kind in kernel.src.signature.items() if kind != "constexpr"]
    return Usage(
        kernel.name,
        case,
        arch,
        warps,
        registers,
        shared,
        stack + local,
        find_races(kernel.asm["ttgir"], arguments),
        sorted(set(_APPROXIMATE.findall(kernel.asm["ptx"]))),
    )


def report(cases: dict[str, Callable[[int], None]], archs: Iterable[int], as_json: bool) -> bool:
    """Prints what the kernels use, and their faults; says whether there are none."""
    assert not knobs.runtime.interpret, "the interpreter compiles nothing"
    if not as_json:
        print(f"{'kernel':20} {'case':34} sm  warps registers shared spilled")
    compiled, faults = 0, 0
    for arch in archs:
        for usage in compile_cases(cases, arch):
            if as_json:
                print(json.dumps(usage._asdict()), flush=True)
                continue
            name, case, *numbers = usage[:7]
            print(f"{name:20} {case:34} {'{:3} {:5} {:9} {:6} {:7}'.format(*numbers)}")
            for fault in usage.faults():
                print(f"    {fault}")
            sys.stdout.flush()
            compiled, faults = compiled + 1, faults + len(usage.faults())
    if not as_json:
        print(f"{compiled} kernels compiled, {faults} faults found")
    return faults == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--all", action="store_true", help="every shape and dtype in use")
    parser.add_argument("--json", action="store_true", help="one record per line")
    args = parser.parse_args()
    right = report({**CASES, **MORE_CASES} if args.all else CASES, ARCHITECTURES, args.json)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
