"""The machine of a run: wheels, packages, the GPU, and the commit."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# module -> the package that contains it, where the names differ
PACKAGES = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "megatron.core": "megatron-core",
    "megatron.training": "megatron-core",
}
DRY_RUN = "dry run on CPU"


def unpack_wheels(wheels: Path, target: Path) -> None:
    """Unpack all wheels of a folder into one target folder, as pip install --target does.

    Raises:
        ValueError: the folder has no wheels, or a file is not a wheel.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise ValueError(f"the folder MEGAMEM_WHEELS={wheels} has no *.whl files")
    target.mkdir(parents=True, exist_ok=True)
    for wheel in found:
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{wheel} is not a wheel: {error}") from error


def python_path(added: Iterable[Path]) -> str:
    """PYTHONPATH for the parts: this checkout, the added folders, and the present PYTHONPATH."""
    before = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([str(ROOT), *map(str, added), *filter(None, [before])])


def missing(modules: Iterable[str]) -> list[str]:
    """The packages of those modules that cannot be imported, sorted by name."""
    lacking = []
    for module in modules:
        try:
            there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            there = False
        if not there:
            lacking.append(PACKAGES.get(module, module))
    return sorted(set(lacking))


def commit() -> str:
    """The commit: from MEGAMEM_COMMIT, from git, or, without git, from .git; else "unknown"."""
    if named := os.environ.get("MEGAMEM_COMMIT"):
        return named
    git = ["git", "-C", str(ROOT)]
    try:
        head, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno"))
        )
        return head.strip() + ("+" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return _commit_without_git(ROOT / ".git") or "unknown"


def _commit_without_git(folder: Path) -> str:
    """The commit that HEAD names, without a mark for modified files; "" if there is none."""
    try:
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:10]
        ref = head.removeprefix("ref: ")
        if (folder / ref).is_file():
            return (folder / ref).read_text().strip()[:10]
        packed = (folder / "packed-refs").read_text().splitlines()
        return next(line.split()[0][:10] for line in packed if line.endswith(f" {ref}"))
    except (OSError, StopIteration):
        return ""


def facts() -> dict[str, Any]:
    """The facts about machine and code that each record contains; imports torch."""
    import torch

    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else DRY_RUN,
        "dry_run": not cuda,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "megatron-core": _version("megatron-core"),
        "python": sys.version.split()[0],
        "commit": commit(),
    }
    if cuda:
        found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
