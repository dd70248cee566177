"""`megamem patch`: patches the training scripts of a Megatron-LM checkout, so that they accept the
--memory-* flags without `-m megamem.run`.

    megamem patch --megatron-dir DIR              insert the patch, or update an older megamem's
    megamem patch --megatron-dir DIR --check      only say whether that is possible; write nothing
    megamem patch --megatron-dir DIR --reverse    remove the patch

The patches for a release are in patches/<release>/ and are applied with `git apply`. The SHA256SUMS
beside them are those of the scripts in the versions that the line "Made for:" of a patch names. A
checkout with other scripts, apart from megamem's own patch, is an error and is left unchanged.
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

# in an installed package the patches are inside of it; in a checkout they are beside it
HOMES = (Path(__file__).parents[1] / "patches", Path(__file__).parents[2] / "patches")
WITHOUT_PATCH = "or leave the checkout as it is and start the script with `python -m megamem.run`"
# lines of the patch -> the same lines before megamem.integration became megamem.megatron
OLD_SEAM = {
    b"# its patches must be in place before the imports": b"# its hooks must precede the imports",
    b"from megamem.megatron.launcher import": b"from megamem.integration.launcher import",
}


@dataclass(frozen=True)
class Series:
    """The patches for one line of releases, and the checksums of the scripts."""

    release: str
    patches: bytes
    """The patch files, one after the other."""
    sums: dict[str, str]
    """Path in the checkout -> sha256 of the unchanged script."""
    made_for: str
    """The versions of Megatron-LM that have these scripts."""

    def without_seam(self, path: str, content: bytes) -> bytes | None:
        """The unchanged script; None if it differs in more than megamem's lines."""
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
    """Add the flags of `megamem patch`."""
    parser.add_argument(
        *("--megatron-dir", "-d"),
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="the Megatron-LM checkout (default: the working directory)",
    )
    check = "only say whether it is possible; write nothing"
    parser.add_argument("--check", action="store_true", help=check)
    parser.add_argument("--reverse", action="store_true", help="remove the patch")


def run(args: argparse.Namespace) -> int:
    """Patch, check or restore a checkout; return the exit status.

    Raises:
        ConfigurationError: there are no patches for the checkout, its scripts were changed, or
            they cannot be written.
    """
    tree: Path = args.megatron_dir
    version, series = find_release(tree)
    done, contents = new_contents(tree, version, series, reverse=args.reverse)
    try:
        if not args.check:
            replace_files({tree / path: content for path, content in contents.items()})
    except OSError as error:
        raise ConfigurationError(
            f"the scripts in --megatron-dir {tree} cannot be replaced ({error}), and none was "
            f"changed; make the checkout writable, {WITHOUT_PATCH}"
        ) from error
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"Megatron-LM {version} in {tree}, patches for {series.release}:")
    for path in contents:
        console.print(f"  {path}: {'can be ' if args.check else ''}{done}")
    if not args.check and not args.reverse:
        console.print("These scripts now accept the --memory-* flags; --help lists them.")
        if not _importable_from(tree):
            console.print(
                "megamem is not installed in this Python, and without it the scripts do not know "
                f"the flags. Run {sys.executable} -m pip install {Path(__file__).parents[2]}"
            )
    return 0


def find_release(tree: Path) -> tuple[str, Series]:
    """The version of a Megatron-LM checkout, and the patches for it.

    Raises:
        ConfigurationError: the folder is not a checkout, or there are no patches for its release.
    """
    facts = tree / "megatron" / "core" / "package_info.py"
    if not facts.is_file():
        raise ConfigurationError(
            f"--megatron-dir {tree} is not a Megatron-LM checkout: it has no "
            f"{facts.relative_to(tree)}; give the folder that contains pretrain_gpt.py"
        )
    numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) *= *(\d+)", facts.read_text(), re.MULTILINE))
    known = available()
    version = ".".join(numbers.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))
    release = f"core_v{version.rpartition('.')[0]}.x"
    if release not in known:
        raise ConfigurationError(
            f"--megatron-dir {tree} is Megatron-LM {version}, but there are only patches for "
            f"{', '.join(sorted(known))}; check out one of these releases, {WITHOUT_PATCH}"
        )
    return version, read_series(known[release])


def available() -> dict[str, Path]:
    """Line of releases, such as core_v0.19.x -> the folder with its patches.

    Raises:
        ConfigurationError: megamem was installed without its patches.
    """
    homes = [home for home in HOMES if home.is_dir()]
    if not homes:
        raise ConfigurationError(
            f"megamem's patches are missing, as {' and '.join(map(str, HOMES))} do not exist; "
            "install megamem from its checkout"
        )
    return {folder.name: folder for folder in homes[0].glob("core_v*")}


def read_series(folder: Path) -> Series:
    """The patches of a folder, in the order of their names."""
    patches = b"".join(path.read_bytes() for path in sorted(folder.glob("*.patch")))
    sums = (line.split() for line in (folder / "SHA256SUMS").read_text().splitlines())
    # all patches of a folder are made for the same versions
    made_for = patches.partition(b"\nMade for: ")[2].partition(b"\n")[0].decode()
    return Series(folder.name, patches, {path: digest for digest, path in sums}, made_for)


def new_contents(
    tree: Path, version: str, series: Series, *, reverse: bool
) -> tuple[str, dict[str, bytes]]:
    """The new contents of the scripts.

    Returns:
        A participle for the output ("patched"), and path -> new content of each changed script.

    Raises:
        ConfigurationError: a script is not one that the patches fit, or there is nothing to do.
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
            known.append("it has CRLF line ends; clone with core.autocrlf=false")
        hint = f" ({', '.join(known)})" if known else ""
        raise ConfigurationError(
            f"{', '.join(other)} in --megatron-dir {tree}, which is Megatron-LM {version}, differs "
            f"from what the patches for {series.release} are made for{hint}; run "
            f"`{restore} {' '.join(other)}`, which discards all changes, check out what they are "
            f"made for ({series.made_for}), {WITHOUT_PATCH}"
        )
    patched = [path for path in paths if found[path] != released[path]]
    if patched and patched != paths:
        raise ConfigurationError(
            f"--megatron-dir {tree} is only partly patched: of {', '.join(paths)} only "
            f"{', '.join(patched)} has the patch; run `{restore} {' '.join(patched)}` to remove it"
        )
    wanted = released if reverse else git_apply(series.patches, released)
    assert wanted is not None, f"the patches for {series.release} do not fit the files they pin"
    contents = {path: wanted[path] for path in paths if wanted[path] != found[path]}
    if not contents:
        status = "not patched" if reverse else "already patched (--reverse removes the patch)"
        raise ConfigurationError(f"--megatron-dir {tree} is {status}, so there is nothing to do")
    if reverse:
        return "restored", contents
    return "updated from the patch of an older megamem" if patched else "patched", contents


def git_apply(patches: bytes, files: dict[str, bytes], *options: str) -> dict[str, bytes] | None:
    """Apply patches to copies of the files; return the results, or None if they do not apply.

    In the checkout itself git would silently skip files inside of another repository, refuse
    symbolic links, drop permissions, and leave some files patched when it cannot write others.

    Raises:
        ConfigurationError: git is not installed.
        OSError: git fails, for example because the disk is full.
    """
    if not shutil.which("git"):
        raise ConfigurationError(
            f"megamem patch needs git, which is not on PATH; install git, {WITHOUT_PATCH}"
        )
    with TemporaryDirectory() as home:
        folder = Path(home)
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        # so that neither a surrounding repository nor a setting such as core.autocrlf matters
        alone = {"GIT_CEILING_DIRECTORIES": str(folder.parent), "HOME": home}
        alone |= {"XDG_CONFIG_HOME": home, "GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1"}
        kept = {name: text for name, text in os.environ.items() if not name.startswith("GIT_")}
        git = ["git", "apply", "--unidiff-zero", *options]
        ran = subprocess.run(git, cwd=folder, env=kept | alone, input=patches, capture_output=True)
        if ran.returncode == 1:
            return None
        if ran.returncode:
            said = " ".join(ran.stderr.decode(errors="replace").split())
            raise OSError(f"git apply ended with status {ran.returncode}: {said}".rstrip(": "))
        return {path: (folder / path).read_bytes() for path in files}


def replace_files(contents: dict[Path, bytes]) -> None:
    """Replace the contents of all files, or of none if one of them cannot be replaced.

    Raises:
        OSError: a file cannot be replaced.
    """
    with ExitStack() as cleanup, ExitStack() as undo:
        staged: list[tuple[Path, Path, Path]] = []
        # everything is written to the disk first; replacing then only renames files
        for path, content in contents.items():
            # scripts may be symbolic links
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
    """Whether a script in the checkout can import megamem.

    megamem may be importable here only because it is in the working directory.
    """
    question = "import importlib.util, sys; sys.exit(importlib.util.find_spec('megamem') is None)"
    return subprocess.run([sys.executable, "-c", question], cwd=tree).returncode == 0
