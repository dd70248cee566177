"""Megatron's dataset helpers, a module in C++ that a checkout compiles when a run starts.

Its Makefile asks whatever `python3` is on the PATH for headers and for the suffix of the module,
which need not be those of the interpreter that trains.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from megamem.config import ConfigurationError
from megamem.patching import replace_everywhere


def prepare_dataset_helpers() -> None:
    """Let Megatron compile its helpers for this interpreter, or not at all if they are there.

    Raises:
        ConfigurationError: they have to be compiled, and something is missing for it.
    """
    import megatron.core.datasets.utils as utils

    folder = Path(utils.__file__).parent
    missing = missing_for_compiling() if (folder / "Makefile").exists() else []
    compiled = (folder / f"helpers_cpp{suffix()}").exists()
    if missing and not compiled:
        one = len(missing) == 1
        raise ConfigurationError(
            f"the Megatron-LM checkout {checkout_of(folder)} has to compile its dataset helpers, "
            f"for which {' and '.join(missing)} {'is' if one else 'are'} missing; install "
            f"{'it' if one else 'them'}, or write -m megamem.pretrain_gpt in place of "
            "-m megamem.run and the script, if Megatron-Core is installed."
        )
    if missing or not (folder / "Makefile").exists():
        # a wheel holds the compiled module only
        replace_everywhere(utils, "compile_helpers", lambda _: lambda: None)
    else:
        replace_everywhere(utils, "compile_helpers", lambda _: lambda: compile_in(folder))


def checkout_of(folder: Path) -> Path:
    """The checkout with this folder of datasets, which is megatron/core/datasets in it."""
    return folder.parents[2]


def suffix() -> str:
    """The suffix of compiled modules of this interpreter."""
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def missing_for_compiling() -> list[str]:
    """What is not installed, each with the command that installs it."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    needed = (
        (shutil.which("make"), "make (apt install make)"),
        (shutil.which(compiler), f"the compiler {compiler} (apt install g++)"),
        (
            importlib.util.find_spec("pybind11"),
            f"pybind11 ({sys.executable} -m pip install pybind11)",
        ),
        (
            headers.is_file(),
            f"{headers} (apt install python{sys.version_info[0]}.{sys.version_info[1]}-dev)",
        ),
    )
    return [name for found, name in needed if not found]


def compile_in(folder: Path) -> None:
    """Compile the helpers by the Makefile of a folder; nothing is done if they are up to date.

    Raises:
        ConfigurationError: the compiler fails.
    """
    includes = subprocess.run(
        [sys.executable, "-m", "pybind11", "--includes"], capture_output=True, text=True
    )
    # what is given on the command line of make overrides the Makefile
    variables = (f"CPPFLAGS={includes.stdout.strip()}", f"LIBEXT={suffix()}")
    if subprocess.run(["make", "-C", folder, *variables]).returncode:
        raise ConfigurationError(
            f"the dataset helpers of the Megatron-LM checkout {checkout_of(folder)} could not be "
            "compiled; the message of the compiler is above."
        )
