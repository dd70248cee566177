"""A Megatron-LM checkout compiles its dataset helpers for the interpreter that trains."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
from megatron.core.datasets import utils

from megamem.config import ConfigurationError
from megamem.megatron import dataset_helpers
from tests.helpers.megatron_runs import run_training
from tests.megatron.test_tiny_training import MEMORY

# as Megatron's: python3 of the PATH names the suffix, and pybind11's headers
MAKEFILE = """
CPPFLAGS += $(shell python3 -m pybind11 --includes)
LIBEXT = $(shell python3-config --extension-suffix)
OUT = helpers_cpp$(LIBEXT)
default: $(OUT)
$(OUT): helpers.cpp
\t$(CXX) -shared -std=c++17 -fPIC $(CPPFLAGS) $< -o $@
"""
SOURCE = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(helpers_cpp, m) { m.attr("answer") = 42; }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """The datasets of a checkout; other versions of Python come first on the PATH."""
    folder = tmp_path / "Megatron LM/megatron/core/datasets"
    folder.mkdir(parents=True)
    (folder / "Makefile").write_text(MAKEFILE)
    (folder / "helpers.cpp").write_text(SOURCE)
    for name in ("python3", "python3-config"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\necho .of-another-python\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(utils, "__file__", str(folder / "utils.py"))
    # what is replaced comes back after the test
    monkeypatch.setattr(utils, "compile_helpers", lambda: pytest.fail("Megatron's own"))
    return folder


needs_compiler = pytest.mark.skipif(
    bool(dataset_helpers.missing_for_compiling()), reason="make, a compiler or pybind11 is missing"
)


@needs_compiler
def test_helpers_are_compiled_for_this_interpreter(folder: Path) -> None:
    dataset_helpers.prepare_dataset_helpers()
    utils.compile_helpers()
    module = folder / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("helpers_cpp", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    assert loaded.answer == 42
    # a second run compiles nothing
    before = module.stat().st_mtime_ns
    utils.compile_helpers()
    assert module.stat().st_mtime_ns == before


@needs_compiler
def test_what_does_not_compile_is_said(folder: Path) -> None:
    (folder / "helpers.cpp").write_text("no C++")
    dataset_helpers.prepare_dataset_helpers()
    with pytest.raises(ConfigurationError, match="Megatron LM could not be compiled"):
        utils.compile_helpers()


def test_what_is_missing_is_said_before_the_run(folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = (
        r"Megatron LM has .* the compiler no-such-compiler \(.*\) and pybind11 \(.*\) are missing; "
    )
    with pytest.raises(
        ConfigurationError, match=said + "install them, or write -m megamem.pretrain_"
    ):
        dataset_helpers.prepare_dataset_helpers()
    # with compiled helpers nothing is needed
    (folder / f"helpers_cpp{dataset_helpers.suffix()}").touch()
    dataset_helpers.prepare_dataset_helpers()
    utils.compile_helpers()


def test_a_wheel_compiles_nothing(folder: Path) -> None:
    (folder / "Makefile").unlink()
    dataset_helpers.prepare_dataset_helpers()
    utils.compile_helpers()
    assert not list(folder.glob("*.so"))


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif("MEGATRON_LM" not in os.environ, reason="MEGATRON_LM names no checkout")
def test_a_checkout_trains(tmp_path: Path) -> None:
    """MEGATRON_LM=path python -m pytest -m slow tests/megatron/test_dataset_helpers.py"""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("*.so", ".git", "tests")
    shutil.copytree(os.environ["MEGATRON_LM"], tree, ignore=ignored)
    log = run_training("checkout", 1, *MEMORY, script=tree / "pretrain_gpt.py", cold=True)
    assert log.losses[-1] < log.losses[0]
    assert (tree / f"megatron/core/datasets/helpers_cpp{dataset_helpers.suffix()}").exists()
