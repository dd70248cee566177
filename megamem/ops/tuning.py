"""The file of `megamem tune`: choices that were measured on one GPU, and for which they hold.

A file holds for one kind of GPU, one release of torch and of Triton, and the sources of the ops and
kernels with which it was measured. It is written in one step, so a reader never sees half of it.
"""

import hashlib
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
import triton

from megamem.kernels import choices as table
from megamem.kernels.choices import (
    DEFAULTS,
    GENERAL,
    OPS,
    Choices,
    current,
    of_capability,
    use,
    using,
)
from megamem.ops.forms import FORMS

__all__ = [
    "DEFAULTS",
    "GENERAL",
    "OPS",
    "Choices",
    "Machine",
    "OtherMachineError",
    "Tuning",
    "current",
    "default_path",
    "of_capability",
    "read",
    "this_machine",
    "use",
    "using",
    "write",
]

FORMAT = 1
"""Number of the format of the file."""
LARGEST = 2**31
"""The largest number that a choice may be."""


class OtherMachineError(ValueError):
    """The file was measured on another kind of GPU, or with other software."""


@dataclass(frozen=True)
class Machine:
    """What the times of a kernel depend on, apart from its arguments."""

    device: str
    """Name of the GPU, or "cpu" for Triton's interpreter."""
    capability: tuple[int, int]
    torch: str
    triton: str
    kernels: str
    """A hash of the sources of ops and kernels."""

    def difference(self, other: Self) -> str:
        """What differs from another machine, naming both; empty if nothing does."""
        words = {"device": "", "capability": "compute capability "}
        for each in fields(self):
            ours, theirs = getattr(self, each.name), getattr(other, each.name)
            if ours != theirs:
                what = words.get(each.name, f"{each.name} ")
                return f"{what}{_shown(ours)}, not with {what}{_shown(theirs)}"
        return ""


@dataclass(frozen=True)
class Tuning:
    """What `megamem tune` found."""

    machine: Machine
    sizes: dict[str, Any]
    """The sizes of the run for which the times were measured."""
    choices: Choices
    megamem: str = ""
    """Release and commit of megamem, for the reader of the file."""
    measured: list[dict[str, Any]] = field(default_factory=list)
    """Every candidate: its op, its name, its time, and whether it was right and was chosen."""


def this_machine(device: torch.device) -> Machine:
    """The machine of this process with one of its devices."""
    name, capability = "cpu", (0, 0)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = torch.cuda.get_device_capability(device)
    return Machine(name, capability, torch.__version__, triton.__version__, kernels_hash())


@lru_cache
def kernels_hash() -> str:
    """The first digits of a hash of the sources of ops and kernels."""
    found = hashlib.sha256()
    for folder in (Path(table.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.glob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def default_path(device_name: str) -> Path:
    """The file for a kind of GPU in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    name = re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower()
    return Path(cache) / "megamem" / f"tuning-{name}.json"


def write(path: Path, tuning: Tuning) -> None:
    """Write the file in one step, in place of an older one; its folder is made.

    Raises:
        OSError: it cannot be written.
    """
    content = {"format": FORMAT, **asdict(tuning)}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(content, indent=1) + "\n")
        # mkstemp makes files that only their owner can read
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read(path: Path, machine: Machine | None = None) -> Tuning:
    """The contents of a file.

    Args:
        path: the file.
        machine: the machine that will use it; None if that is not known.

    Raises:
        OtherMachineError: the file was measured on another machine; the message names both.
        ValueError: it is not a file of `megamem tune`.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
        number = content["format"]
        if number != FORMAT:
            raise ValueError(f"its format is {number!r}, and this megamem reads {FORMAT}")
        measured = _machine(content["machine"])
    except OSError:
        raise
    except Exception as error:
        raise _broken(path, error) from error
    # before the choices, because other kernels may have other numbers
    if machine is not None and (difference := measured.difference(machine)):
        raise OtherMachineError(
            f"{path} was measured with {difference}; run python -m megamem tune on this machine."
        )
    try:
        return Tuning(
            machine=measured,
            sizes=dict(content["sizes"]),
            choices=_choices(content["choices"]),
            megamem=str(content["megamem"]),
            measured=list(content["measured"]),
        )
    except Exception as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> ValueError:
    said = str(error).strip().splitlines() or [""]
    why = f"it lacks {error}" if isinstance(error, KeyError) else said[0]
    return ValueError(
        f"{path} is not a file of megamem tune ({why}); delete it, or write it again with python "
        "-m megamem tune."
    )


def _machine(content: dict[str, Any]) -> Machine:
    major, minor = content["capability"]
    names = ("device", "torch", "triton", "kernels")
    return Machine(capability=(major, minor), **{name: content[name] for name in names})


def _choices(content: dict[str, dict[str, Any]]) -> Choices:
    """The choices in a file.

    Raises:
        ValueError: an op, a number or a form does not exist, or a number is no power of two.
    """
    found = GENERAL
    for op, values in content.items():
        if op == "forms":
            continue
        if op not in OPS:
            raise ValueError(f"there are no numbers of an op {op!r}")
        known = asdict(getattr(found, op))
        for name, number in values.items():
            if name not in known:
                raise ValueError(f"{op} has no number {name!r}")
            right = type(number) is int and 0 < number <= LARGEST
            # how far ahead a loop loads is the one number that need not be a power of two
            if not right or (number & (number - 1) and not name.endswith("stages")):
                raise ValueError(f"{op}.{name} is {number!r}, which is no power of two")
        found = found.changed(op, **values)
    for op, form in content["forms"].items():
        if form not in FORMS.get(op, {}):
            raise ValueError(f"there is no form {form!r} of {op!r}")
        found = found.changed(op, form=form)
    return found


def _shown(value: object) -> str:
    return ".".join(map(str, value)) if isinstance(value, tuple) else str(value)
