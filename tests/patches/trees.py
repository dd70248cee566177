"""Small folders that look like Megatron-LM checkouts, and patches that git makes for them."""

import hashlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

RELEASE = "core_v0.19.x"
MADE_FOR = "core_v0.19.0, branch core_r0.19.0"
# the lines that patches insert now, and those of the time of megamem.integration
SEAM = """\
import importlib.util

if importlib.util.find_spec("megamem"):  # its patches must be in place before the imports below
    from megamem.megatron.launcher import attach

    attach()

"""
OLD_SEAM = """\
import importlib.util

if importlib.util.find_spec("megamem"):  # its hooks must precede the imports below
    from megamem.integration.launcher import attach

    attach()

"""
VERSION = "MAJOR = 0\nMINOR = {minor}\nPATCH = {patch}\nPRE_RELEASE = ''\n"


@dataclass(frozen=True)
class Tree:
    """A checkout, its scripts as released, and its scripts as patched."""

    root: Path
    released: dict[str, bytes]
    patched: dict[str, bytes]

    @property
    def old(self) -> dict[str, bytes]:
        """The scripts as patched by an older megamem."""
        seams = SEAM.encode(), OLD_SEAM.encode()
        return {path: content.replace(*seams) for path, content in self.patched.items()}

    def write(self, contents: dict[str, bytes]) -> None:
        """Replace the contents of files."""
        for path, content in contents.items():
            (self.root / path).write_bytes(content)

    def read(self) -> dict[str, bytes]:
        """The current contents of the scripts."""
        return {path: (self.root / path).read_bytes() for path in self.released}

    def everything(self) -> dict[str, bytes]:
        """The contents of all files of the checkout, to find files that were left behind."""
        found = (path for path in self.root.rglob("*") if path.is_file())
        return {str(path.relative_to(self.root)): path.read_bytes() for path in found}


def write_tree(root: Path, files: dict[str, str], minor: int = 19, patch: int = 2) -> Path:
    """Write the files and Megatron-LM's package_info.py of a release into a folder; return it."""
    facts = {"megatron/core/package_info.py": VERSION.format(minor=minor, patch=patch)}
    for path, text in (facts | files).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def insert(text: str, *blocks: tuple[int, str]) -> str:
    """The text with each block inserted after a line number; only a newline ends a line."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    for after, block in sorted(blocks, reverse=True):
        lines[after:after] = [block]
    return "".join(lines)


def git_diff(old: str, new: str, path: str, scratch: Path) -> str:
    """The output of `git diff -U0`, without the line of the file that it repeats after each @@."""
    for side, text in (("a", old), ("b", new)):
        (scratch / side / path).parent.mkdir(parents=True, exist_ok=True)
        (scratch / side / path).write_text(text)
    words = ["git", "diff", "--no-index", "--no-prefix", "-U0", f"a/{path}", f"b/{path}"]
    # text mode would turn a carriage return into a line end
    diff = subprocess.run(words, cwd=scratch, capture_output=True).stdout.decode()
    return re.sub(r"^(@@ .*? @@).*$", r"\1", diff, flags=re.MULTILINE)


def write_series(home: Path, scratch: Path, changes: dict[str, tuple[str, str]]) -> Path:
    """Write patches/<release> for scripts given as path -> (as released, patched)."""
    folder = home / RELEASE
    folder.mkdir(parents=True)
    sums = []
    for number, (path, (old, new)) in enumerate(changes.items(), 1):
        diff = git_diff(old, new, path, scratch)
        file = folder / f"{number:04}-{Path(path).stem}.patch"
        file.write_text(f"Why it is here.\n\nMade for: {MADE_FOR}\n" + diff)
        sums.append(f"{hashlib.sha256(old.encode()).hexdigest()}  {path}\n")
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder
