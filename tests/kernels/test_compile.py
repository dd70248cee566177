"""Every kernel compiles for every supported GPU generation, and none spills registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.aot import ARCHITECTURES, CASES, MORE_CASES, Usage

# what a program may take of a multiprocessor's shared memory
SHARED_KIB = {80: 163, 90: 227, 100: 227}
KERNELS = {
    "_bag_kernel",
    "_compact_kernel",
    "_half_topk_kernel",
    "_merge_kernel",
    "_pair_kernel",
    "_place_kernel",
    "_row_pass_kernel",
    "_unsort_kernel",
    "_update_kernel",
}


def _compile(*options: str) -> list[Usage]:
    """In a process of its own, as kernels defined under the interpreter cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot", "--json", *options],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [Usage(**json.loads(line)) for line in run.stdout.splitlines()]


def _check(usages: list[Usage], cases: set[str]) -> None:
    assert {usage.kernel for usage in usages} == KERNELS
    assert {(usage.case, usage.arch) for usage in usages} == {
        (case, arch) for case in cases for arch in ARCHITECTURES
    }
    spills = [usage for usage in usages if usage.spilled]
    assert not spills, "\n".join(map(str, spills))
    too_large = [usage for usage in usages if usage.shared > SHARED_KIB[usage.arch] * 1024]
    assert not too_large, "\n".join(map(str, too_large))


def test_compiles_for_every_architecture_without_spills():
    _check(_compile(), set(CASES))


@pytest.mark.slow
def test_every_shape_and_dtype_in_use_compiles_without_spills():
    _check(_compile("--all"), {*CASES, *MORE_CASES})


def test_every_kernel_is_compiled():
    """A kernel added to kernels/ must be added here."""
    source = "".join(
        path.read_text() for path in (Path(__file__).parents[2] / "megamem/kernels").glob("*.py")
    )
    assert all(f"def {kernel}(" in source for kernel in KERNELS)
    assert source.count("_kernel(\n") == len(KERNELS)
