"""`megamem patch`: gives the training scripts of a Megatron-LM checkout memory layers for good.

    megamem patch --megatron-dir DIR              open the seam
    megamem patch --megatron-dir DIR --check      would that work? Nothing is written
    megamem patch --megatron-dir DIR --reverse    close it again

A patch is a file of patches/<release>/ that only inserts lines. The SHA256SUMS beside it pins the
files as Megatron released them, so a line number is all the context an insertion needs. A tree that
differs is left as it was.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from megamem.config import ConfigurationError
from megamem.errors import refuse

# installed, the patches lie inside the package; in a checkout, beside it
HOMES = (Path(__file__).parents[1] / "patches", Path(__file__).parents[2] / "patches")
SUMS = "SHA256SUMS"
# git repeats a line of the file after the second @@; ours does not
HUNK = re.compile(rb"@@ -(\d+),0 \+(\d+)(?:,(\d+))? @@\n")
TARGET = re.compile(rb"^\+\+\+ b/(.+)$", re.MULTILINE)
WITHOUT_PATCH = "or leave the tree as it is and start the script through `python -m megamem.run`"

State = Literal["as released", "patched", "changed"]


@dataclass(frozen=True)
class Insertion:
    """Lines that a patch puts into a file."""

    after: int
    """Lines of the file that stay before them."""

    lines: tuple[bytes, ...]
    """Each with its line end."""


@dataclass(frozen=True)
class Patch:
    """The insertions that one patch file makes into one file."""

    name: str
    path: str
    insertions: tuple[Insertion, ...]

    def apply(self, content: bytes) -> bytes:
        """The file with the insertions."""
        lines, pieces, done = _lines(content), [], 0
        for insertion in self.insertions:
            pieces += [*lines[done : insertion.after], *insertion.lines]
            done = insertion.after
        return b"".join([*pieces, *lines[done:]])

    def reverse(self, content: bytes) -> bytes | None:
        """The file without the insertions, or None where they are not what stands there."""
        lines = _lines(content)
        for insertion in self.insertions:
            # those before are gone by now, so this one starts where it was put
            end = insertion.after + len(insertion.lines)
            if tuple(lines[insertion.after : end]) != insertion.lines:
                return None
            del lines[insertion.after : end]
        return b"".join(lines)


@dataclass(frozen=True)
class Series:
    """The patches for one line of releases, in order, and the files they were made for."""

    release: str
    patches: tuple[Patch, ...]
    sums: dict[str, str]
    """Path in the tree -> sha256 of the file as released."""

    def apply(self, path: str, content: bytes) -> bytes:
        """A released file with all its insertions."""
        for patch in self.patches:
            content = patch.apply(content) if patch.path == path else content
        return content

    def reverse(self, path: str, content: bytes) -> bytes | None:
        """The released file behind a patched one, or None where this is not one."""
        for patch in reversed(self.patches):
            if patch.path == path:
                found = patch.reverse(content)
                if found is None:
                    return None
                content = found
        return content if _sha256(content) == self.sums[path] else None

    def state(self, path: str, content: bytes) -> State:
        """What became of a file since its release."""
        if _sha256(content) == self.sums[path]:
            return "as released"
        return "changed" if self.reverse(path, content) is None else "patched"


def main(argv: Sequence[str] | None = None) -> int:
    """Patch, check or restore a checkout; return the exit status."""
    args = _parser().parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    try:
        version, series = find_release(args.megatron_dir)
        changes = plan(args.megatron_dir, version, series, reverse=args.reverse)
        if not args.check:
            write_all(changes)
    except ConfigurationError as error:
        return refuse(error)
    done = "restored" if args.reverse else "patched"
    can = f"can be {done}" if args.check else done
    console.print(f"Megatron-LM {version} in {args.megatron_dir}, patches for {series.release}:")
    for path in changes:
        name = str(path.relative_to(args.megatron_dir))
        patches = ", ".join(patch.name for patch in series.patches if patch.path == name)
        console.print(f"  {name}: {can} ({patches})")
    if not args.check and not args.reverse:
        console.print("Its scripts take --memory-* flags now; --help lists them.")
        if not _importable_from(args.megatron_dir):
            console.print(
                "megamem itself is not installed in this Python, and the scripts do without it "
                f"until it is: {sys.executable} -m pip install {Path(__file__).parents[2]}"
            )
    return 0


def find_release(tree: Path) -> tuple[str, Series]:
    """The release that a tree holds, and the patches for it.

    Raises:
        ConfigurationError: the tree is none of Megatron-LM, or no patches fit its release.
    """
    facts = tree / "megatron" / "core" / "package_info.py"
    if not facts.is_file():
        raise ConfigurationError(
            f"--megatron-dir {tree} is not a Megatron-LM checkout: it has no "
            f"{facts.relative_to(tree)}; give the folder that holds pretrain_gpt.py"
        )
    numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) *= *(\d+)", facts.read_text(), re.MULTILINE))
    known = available()
    version = ".".join(numbers.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))
    release = f"core_v{version.rpartition('.')[0]}.x"
    if release not in known:
        names = ", ".join(sorted(known))
        raise ConfigurationError(
            f"--megatron-dir {tree} holds Megatron-LM {version}, and there are patches for "
            f"{names} only; check out one of these, {WITHOUT_PATCH}"
        )
    return version, read_series(known[release])


def available() -> dict[str, Path]:
    """Line of releases, such as core_v0.19.x -> the folder of its patches."""
    homes = [home for home in HOMES if home.is_dir()]
    if not homes:
        raise ConfigurationError(
            f"the patches are missing: {' and '.join(map(str, HOMES))} do not exist; install "
            "megamem from its checkout"
        )
    return {folder.name: folder for folder in homes[0].glob("core_v*")}


def read_series(folder: Path) -> Series:
    """The patches of a folder, in the order of their names.

    Raises:
        ValueError: a patch does more than insert, or touches a file that is not pinned.
    """
    patches = tuple(parse_patch(path) for path in sorted(folder.glob("*.patch")))
    lines = (folder / SUMS).read_text().splitlines()
    sums = {path: digest for digest, path in (line.split() for line in lines)}
    if unpinned := {patch.path for patch in patches} ^ sums.keys():
        raise ValueError(f"{folder}: {SUMS} and the patches differ in {sorted(unpinned)}")
    return Series(folder.name, patches, sums)


def parse_patch(path: Path) -> Patch:
    """Read a patch made with `git diff -U0` that only inserts.

    Raises:
        ValueError: it has context or removes lines, or its line numbers do not add up.
    """
    head, *hunks = re.split(rb"^(?=@@ )", path.read_bytes(), flags=re.MULTILINE)
    targets = TARGET.findall(head)
    if len(targets) != 1:
        raise ValueError(f"{path}: one patch is for one file, not {len(targets)}")
    insertions: list[Insertion] = []
    for hunk in hunks:
        title, *lines = _lines(hunk)
        if other := [line for line in lines if not line.startswith(b"+")]:
            raise ValueError(f"{path}: only insertions, not {other[0].decode().rstrip()!r}")
        match = HUNK.match(title)
        before = sum(len(insertion.lines) for insertion in insertions)
        if not match or (int(match[2]), int(match[3] or 1)) != (
            int(match[1]) + before + 1,
            len(lines),
        ):
            raise ValueError(f"{path}: {title.decode().strip()} does not describe what follows")
        insertions.append(Insertion(int(match[1]), tuple(line[1:] for line in lines)))
    if not insertions:
        raise ValueError(f"{path}: no insertion found")
    return Patch(path.name, targets[0].decode(), tuple(insertions))


def plan(tree: Path, version: str, series: Series, *, reverse: bool) -> dict[Path, bytes]:
    """The files to write and what goes into them; all of them or none.

    Raises:
        ConfigurationError: a file is not what the patches were made for.
    """
    paths = sorted(series.sums)
    if missing := [path for path in paths if not (tree / path).is_file()]:
        raise ConfigurationError(
            f"--megatron-dir {tree} has no {', '.join(missing)}, which Megatron-LM {version} has; "
            "check the release out whole"
        )
    contents = {path: (tree / path).read_bytes() for path in paths}
    states = {path: series.state(path, contents[path]) for path in paths}
    wanted: State = "patched" if reverse else "as released"
    restore = f"`git -C {tree} checkout -- {' '.join(p for p in paths if states[p] != wanted)}`"
    if changed := [path for path in paths if states[path] == "changed"]:
        partly = [path for path in changed if _has_insertion(series, path, contents[path])]
        why = f"; of the patch, {', '.join(partly)} has a part" if partly else ""
        raise ConfigurationError(
            f"{', '.join(changed)} in {tree} is not as Megatron-LM {version} released it{why}; "
            f"restore it ({restore} does, and drops what was changed), {WITHOUT_PATCH}"
        )
    if all(state == wanted for state in states.values()):
        turn = series.reverse if reverse else series.apply
        changes = {tree / path: turn(path, contents[path]) for path in paths}
        return {path: content for path, content in changes.items() if content is not None}
    if len(set(states.values())) == 1:
        found, undo = (
            ("not patched", "") if reverse else ("patched already", "; --reverse undoes it")
        )
        raise ConfigurationError(f"{tree} is {found}, so there is nothing to do{undo}")
    listed = ", ".join(f"{path} is {states[path]}" for path in paths)
    raise ConfigurationError(f"{tree} is half patched: {listed}; {restore} makes them alike")


def _has_insertion(series: Series, path: str, content: bytes) -> bool:
    """Whether any inserted block stands somewhere in the file."""
    blocks = [
        b"".join(insertion.lines)
        for patch in series.patches
        if patch.path == path
        for insertion in patch.insertions
    ]
    return any(block in content for block in blocks)


def write_all(changes: dict[Path, bytes]) -> None:
    """Replace every file, or, where one cannot be, none.

    Raises:
        ConfigurationError: the tree cannot be written to.
    """
    staged: list[tuple[Path, Path, Path]] = []
    temporary: list[Path] = []
    try:
        # all that needs space is written first: from here on files only change their names
        for path, content in changes.items():
            home = path.resolve()
            temporary.append(new := _beside(home, content))
            temporary.append(old := _beside(home, home.read_bytes()))
            staged.append((home, new, old))
        for home, new, _ in staged:
            os.replace(new, home)
    except BaseException as error:
        for home, new, old in staged:
            if not new.exists():
                os.replace(old, home)
        if isinstance(error, OSError):
            raise ConfigurationError(
                f"the files cannot be replaced ({error}); all are as they were. Make the tree "
                f"writable, {WITHOUT_PATCH}"
            ) from error
        raise
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def _beside(path: Path, content: bytes) -> Path:
    """A new file with this content in the folder of path, with path's mode and owner."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, name)
        if os.geteuid() == 0:
            os.chown(name, path.stat().st_uid, path.stat().st_gid)
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def _importable_from(tree: Path) -> bool:
    """Whether a script of the tree finds megamem, which may lie in the working directory only."""
    question = "import importlib.util, sys; sys.exit(importlib.util.find_spec('megamem') is None)"
    return subprocess.run([sys.executable, "-c", question], cwd=tree).returncode == 0


def _lines(content: bytes) -> list[bytes]:
    """The lines as git counts them, each with its end."""
    return re.findall(rb"[^\n]*\n|[^\n]+", content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megamem patch",
        description="Give the training scripts of a Megatron-LM checkout memory layers for good.",
        allow_abbrev=False,
    )
    parser.add_argument(
        *("--megatron-dir", "-d"),
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="the checkout (default: the working directory)",
    )
    parser.add_argument("--check", action="store_true", help="do all but write")
    parser.add_argument("--reverse", action="store_true", help="take the patches out again")
    return parser
