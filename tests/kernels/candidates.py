"""Compiles the candidates of `megamem tune` for an H100 that need not be there; looks for faults.

    python -m tests.kernels.candidates

A candidate that races is wrong now and then, so that known answers may not find it. It ends with
status 1 if there are faults.
"""

import sys
from collections.abc import Iterator
from unittest import mock

from megamem.kernels import choices
from megamem.tools.tune_ops import TUNED, Sizes
from tests.kernels.aot import CASES, MORE_CASES, compile_cases

ARCH, CAPABILITY = 90, (9, 0)
# an op -> cases that launch its kernels
LAUNCHES = {
    "product_topk": ("top-k bf16 N=1024 C=512 K=32", "fused top-k bf16 N=1024 C=512 K=32"),
    "product_topk_backward": ("top-k backward bf16 N=1024 K=32",),
    "embedding_bag": ("bf16 V=2048",),
    "row_gradient": ("gradient bf16 += fp32", "gradient bf16 first touch fp32"),
    "row_adam": ("adam fp32, gradients of few rows", "adam bf16 random, moment per row"),
    "squared_norm": ("norm fp32 V=2048",),
    "sort_lookups": ("sort of rows",),
}
SIZES = Sizes(8192, 4, 32, 1024, 1024, 2048, 2**20, 8192, 128, 1, 3, "adamw", False)


def faults() -> Iterator[str]:
    """A sentence for each fault of each candidate that has numbers of its own."""
    every = {**CASES, **MORE_CASES}
    for op in TUNED:
        seen = []
        for optimizer in ("adamw", "rowwise_adamw"):
            sizes = Sizes(**{**vars(SIZES), "optimizer": optimizer})
            for candidate in op.candidates(sizes, choices.of_capability(CAPABILITY)):
                if candidate.numbers and candidate.numbers not in seen:
                    seen.append(candidate.numbers)
        for numbers in seen:
            chosen = choices.of_capability(CAPABILITY).changed(op.name, **numbers)
            with mock.patch.dict(choices.DEFAULTS, {CAPABILITY: chosen}):
                for usage in compile_cases({n: every[n] for n in LAUNCHES[op.name]}, ARCH):
                    for fault in usage.faults():
                        yield f"{op.name} {dict(numbers)}: {usage.kernel}, {usage.case}: {fault}"


if __name__ == "__main__":
    found = list(faults())
    sys.stdout.write("".join(f"{fault}\n" for fault in found))
    sys.exit(1 if found else 0)
