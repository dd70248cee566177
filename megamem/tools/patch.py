"""`megamem patch`: gives the training scripts of a Megatron-LM checkout memory layers for good.

    megamem patch --megatron-dir DIR              insert the seam, or renew that of an older megamem
    megamem patch --megatron-dir DIR --check      would that work? Nothing is written
    megamem patch --megatron-dir DIR --reverse    take the seam out again

The patches for a release lie in patches/<release>/, and `git apply` applies them. The SHA256SUMS
beside them pins the files as Megatron released them, so a patch needs no lines of context. A tree
whose files are not these, with or without the seam, is left as it was.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from megamem.config import ConfigurationError

# installed, the patches lie inside the package; in a checkout, beside it
HOMES = (Path(__file__).parents[1] / "patches", Path(__file__).parents[2] / "patches")
WITHOUT_PATCH = "or leave the tree as it is and start the script through `python -m megamem.run`"
# what a seam says -> what it said before megamem.integration became megamem.megatron
OLD_SEAM = {
    b"# its patches must be in place before the imports": b"# its hooks must precede the imports",
    b"from megamem.megatron.launcher import": b"from megamem.integration.launcher import",
}


@dataclass(frozen=True)
class Series:
    """The patches for one line of releases, and the files they were made for."""

    release: str
    patches: bytes
    """The patch files, one after the other."""
    sums: dict[str, str]
    """Path in the tree -> sha256 of the file as released."""

    def without_seam(self, path: str, content: bytes) -> bytes | None:
        """The file as released, or None where it differs from that in more than a seam."""
        old_patches = self.patches
        for new, old in OLD_SEAM.items():
            old_patches = old_patches.replace(new, old)
        candidates = [{path: content}] + [
            git_apply(patches, {path: content}, "--reverse", f"--include={path}")
            for patches in (self.patches, old_patches)
        ]
        for files in candidates:
            if files and hashlib.sha256(files[path]).hexdigest() == self.sums[path]:
                return files[path]
        return None


def add_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Which checkout, and what to do with it."""
    parser.add_argument(
        *("--megatron-dir", "-d"),
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="the checkout (default: the working directory)",
    )
    parser.add_argument("--check", action="store_true", help="do all but write")
    parser.add_argument("--reverse", action="store_true", help="take the patches out again")


def run(args: argparse.Namespace) -> int:
    """Patch, check or restore a checkout.

    Raises:
        ConfigurationError: it is not what the patches were made for, or cannot be written to.
    """
    tree: Path = args.megatron_dir
    version, series = find_release(tree)
    done, contents = plan(tree, version, series, reverse=args.reverse)
    try:
        if not args.check:
            replace_files({tree / path: content for path, content in contents.items()})
    except OSError as error:
        raise ConfigurationError(
            f"the scripts in --megatron-dir {tree} cannot be replaced ({error}); all are as they "
            f"were. Make the tree writable, {WITHOUT_PATCH}"
        ) from error
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"Megatron-LM {version} in {tree}, patches for {series.release}:")
    for path in contents:
        console.print(f"  {path}: {'can be ' if args.check else ''}{done}")
    if not args.check and not args.reverse:
        console.print("Its scripts take --memory-* flags now; --help lists them.")
        if not _importable_from(tree):
            console.print(
                "megamem itself is not installed in this Python, and the scripts do without it "
                f"until it is: {sys.executable} -m pip install {Path(__file__).parents[2]}"
            )
    return 0


def find_release(tree: Path) -> tuple[str, Series]:
    """The version of Megatron-LM that a tree holds, and the patches for it.

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
        raise ConfigurationError(
            f"--megatron-dir {tree} holds Megatron-LM {version}, and there are patches for "
            f"{', '.join(sorted(known))} only; check out one of these, {WITHOUT_PATCH}"
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
    """The patches of a folder, in the order of their names."""
    patches = b"".join(path.read_bytes() for path in sorted(folder.glob("*.patch")))
    sums = (line.split() for line in (folder / "SHA256SUMS").read_text().splitlines())
    return Series(folder.name, patches, {path: digest for digest, path in sums})


def plan(
    tree: Path, version: str, series: Series, *, reverse: bool
) -> tuple[str, dict[str, bytes]]:
    """What is done to the tree, in a word, and the new contents of the files it is done to.

    Raises:
        ConfigurationError: a file is not what the patches were made for, or nothing is to be done.
    """
    paths = sorted(series.sums)
    found = {path: (tree / path).read_bytes() for path in paths if (tree / path).is_file()}
    stripped = {path: series.without_seam(path, content) for path, content in found.items()}
    released = {path: content for path, content in stripped.items() if content is not None}
    restore = f"git -C {shlex.quote(str(tree))} checkout --"
    if other := [path for path in paths if path not in released]:
        known = [f"{path} is missing" for path in other if path not in found]
        known += [
            f"{path} mentions megamem" for path in other if b"megamem" in found.get(path, b"")
        ]
        if any(b"\r\n" in found.get(path, b"") for path in other):
            known.append("for LF line ends, clone with core.autocrlf=false")
        hint = f" ({', '.join(known)})" if known else ""
        raise ConfigurationError(
            f"{', '.join(other)} in --megatron-dir {tree} is not as Megatron-LM {version} released "
            f"it{hint}; restore it (`{restore} {' '.join(other)}` does, and drops what was "
            f"changed), {WITHOUT_PATCH}"
        )
    patched = [path for path in paths if found[path] != released[path]]
    if patched and patched != paths:
        raise ConfigurationError(
            f"--megatron-dir {tree} is half patched: of {', '.join(paths)} only "
            f"{', '.join(patched)} has the seam; `{restore} {' '.join(patched)}` makes them alike"
        )
    wanted = released if reverse else git_apply(series.patches, released)
    assert wanted is not None, f"the patches for {series.release} do not fit the files they pin"
    contents = {path: wanted[path] for path in paths if wanted[path] != found[path]}
    if not contents:
        state = "not patched" if reverse else "patched already (--reverse undoes it)"
        raise ConfigurationError(f"--megatron-dir {tree} is {state}, so there is nothing to do")
    if reverse:
        return "restored", contents
    return "renewed, as its seam is an older megamem's" if patched else "patched", contents


def git_apply(patches: bytes, files: dict[str, bytes], *options: str) -> dict[str, bytes] | None:
    """The files as `git apply` leaves copies of them, or None where the patches do not fit.

    In the tree itself git would skip files without a word where another repository surrounds it,
    refuse links, drop permissions, and leave a part done where it fails to write.

    Raises:
        ConfigurationError: git is not installed.
        OSError: git fails, for example where no space is left.
    """
    if not shutil.which("git"):
        raise ConfigurationError(
            f"megamem patch needs git, and there is none on PATH; install git, {WITHOUT_PATCH}"
        )
    with TemporaryDirectory() as home:
        folder = Path(home)
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        # neither a repository around the folder nor a setting such as core.autocrlf takes part
        alone = {"GIT_CEILING_DIRECTORIES": str(folder.parent), "HOME": home}
        alone |= {"XDG_CONFIG_HOME": home, "GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1"}
        kept = {name: text for name, text in os.environ.items() if not name.startswith("GIT_")}
        git = ["git", "apply", "--unidiff-zero", *options]
        ran = subprocess.run(git, cwd=folder, env=kept | alone, input=patches, capture_output=True)
        if ran.returncode == 1:
            return None
        if ran.returncode:
            said = " ".join(ran.stderr.decode(errors="replace").split())
            raise OSError(f"git apply ended with status {ran.returncode} {said}".rstrip())
        return {path: (folder / path).read_bytes() for path in files}


def replace_files(contents: dict[Path, bytes]) -> None:
    """Give all files their new contents, or, where one cannot be replaced, none.

    Raises:
        OSError: one cannot be replaced.
    """
    with ExitStack() as cleanup, ExitStack() as undo:
        staged: list[tuple[Path, Path, Path]] = []
        # all that needs space is written first: from here on files only change their names
        for path, content in contents.items():
            # the scripts of a checkout may be links
            script = path.resolve()
            folder = TemporaryDirectory(prefix=".megamem-patch-", dir=script.parent)
            home = Path(cleanup.enter_context(folder))
            new, old = home / "new", home / "old"
            shutil.copy2(script, old)
            new.write_bytes(content)
            shutil.copymode(script, new)
            if os.geteuid() == 0:
                for file in (new, old):
                    os.chown(file, script.stat().st_uid, script.stat().st_gid)
            staged.append((script, new, old))
        for script, new, old in staged:
            undo.callback(os.replace, old, script)
            os.replace(new, script)
        undo.pop_all()


def _importable_from(tree: Path) -> bool:
    """Whether a script of the tree finds megamem, which may lie in the working directory only."""
    question = "import importlib.util, sys; sys.exit(importlib.util.find_spec('megamem') is None)"
    return subprocess.run([sys.executable, "-c", question], cwd=tree).returncode == 0
