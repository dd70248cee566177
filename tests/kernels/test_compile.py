"""Every kernel compiles for every supported GPU generation, without faults in what comes out."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.aot import (
    ARCHITECTURES,
    CASES,
    MAY_APPROXIMATE,
    MAY_SPILL,
    MORE_CASES,
    NO_RACE,
    TRITON,
    Usage,
)

KERNELS = {
    "_bag_kernel",
    "_best_pairs_kernel",
    "_best_sides_kernel",
    "_candidates_kernel",
    "_compact_kernel",
    "_count_kernel",
    "_exact_kernel",
    "_late_dots_kernel",
    "_mark_kernel",
    "_merge_kernel",
    "_pair_gradient_kernel",
    "_pairs_kernel",
    "_place_kernel",
    "_squared_norm_kernel",
    "_row_pass_kernel",
    "_scatter_kernel",
    "_score_gradient_kernel",
    "_two_looks_kernel",
    "_unsort_kernel",
    "_update_kernel",
}


def compile_kernels(module: str = "tests.kernels.aot", *options: str) -> list[Usage]:
    """In a process of its own, as kernels defined under the interpreter cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", module, "--json", *options],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [Usage(**json.loads(line)) for line in run.stdout.splitlines()]


def _check(usages: list[Usage], cases: set[str]) -> None:
    assert {(usage.kernel, usage.arch) for usage in usages} == {
        (kernel, arch) for kernel in KERNELS for arch in ARCHITECTURES
    }
    assert {(usage.case, usage.arch) for usage in usages} == {
        (case, arch) for case in cases for arch in ARCHITECTURES
    }
    faults = [
        f"{usage.kernel}, {usage.case}, sm_{usage.arch}: {fault}"
        for usage in usages
        for fault in usage.faults()
    ]
    assert not faults, "\n".join(faults)


@pytest.fixture(scope="module")
def usages() -> list[Usage]:
    return compile_kernels()


def test_nothing_is_wrong_with_any_kernel_on_any_architecture(usages):
    """No registers spill, shared memory suffices, no threads race, arithmetic is IEEE's."""
    _check(usages, set(CASES))


@pytest.mark.slow
def test_nothing_is_wrong_in_any_shape_and_dtype_in_use():
    usages = compile_kernels("tests.kernels.aot", "--all")
    _check(usages, {*CASES, *MORE_CASES})
    spilled = {(TRITON, usage.kernel, usage.case, usage.arch) for usage in usages if usage.spilled}
    assert spilled == {key for key in MAY_SPILL if key[0] == TRITON}


@pytest.mark.slow
def test_nothing_is_wrong_with_the_candidates_of_megamem_tune():
    """A user's file may choose any of them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.candidates"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr


def test_every_exception_is_still_needed(usages):
    races = {(usage.kernel, argument) for usage in usages for argument, _ in usage.races}
    approximate = {(usage.kernel, name) for usage in usages for name in usage.approximate}
    assert races >= NO_RACE.keys()
    assert approximate >= MAY_APPROXIMATE.keys()


def test_every_kernel_is_compiled():
    """A kernel added to kernels/ must be added here."""
    source = "".join(
        path.read_text() for path in (Path(__file__).parents[2] / "megamem/kernels").glob("*.py")
    )
    assert {*re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)} == KERNELS
