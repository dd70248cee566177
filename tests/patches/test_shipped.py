"""The patches of this repository: they only insert seven lines, and apply to their releases.

MEGATRON_LM_PATH may list checkouts of Megatron-LM, separated as in PATH. Each is copied, patched
and run; its scripts must be as released.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import megatron.core
import pytest

from megamem.__main__ import main
from megamem.config import MemoryConfig, flag
from megamem.megatron import patches
from megamem.tools import patch
from tests.helpers.megatron_runs import MODEL, SCRIPT, SWITCHES, TRAINING, launch, run_training
from tests.patches.trees import OLD_SEAM, SEAM, insert, write_series, write_tree

ROOT = Path(__file__).parents[2]
RELEASES = ("core_v0.17.x", "core_v0.18.x", "core_v0.19.x", "core_v0.20.x")
PATCHES = sorted((ROOT / "patches").glob("*/*.patch"))
NAMES = [f"{path.parent.name}-{path.stem}" for path in PATCHES]
CHECKOUTS = [
    Path(word) for word in os.environ.get("MEGATRON_LM_PATH", "").split(os.pathsep) if word
]
MEMORY = ("--memory-layers", "1", "2", "--memory-num-keys", "16", "--memory-topk", "8")
# the folder of Megatron's compiled dataset helpers
HELPERS = "megatron/core/datasets"
# 0.17 asks for a GPU before it parses the flags
WANTS_A_GPU_FIRST = megatron.core.__version__.startswith("0.17.")


def inserted(found: Path) -> str:
    """The lines that a patch file inserts into a script."""
    lines = found.read_text().splitlines(keepends=True)
    return "".join(line[1:] for line in lines if re.match(r"\+(?!\+\+ )", line))


def test_every_supported_release_has_patches():
    assert sorted(patch.available()) == list(RELEASES)
    assert patch.available()[RELEASES[0]].parent == ROOT / "patches"


@pytest.mark.parametrize("found", PATCHES, ids=NAMES)
def test_a_patch_opens_a_seam_and_no_more(found):
    text = found.read_text()
    assert inserted(found) == SEAM
    assert text.isascii() and all(len(line) <= 100 for line in SEAM.splitlines())
    # git diff repeats a line of Megatron's after the second @@; these patches do not
    assert len(re.findall("^@@ .*", text, re.MULTILINE)) == 1
    assert re.search(r"^@@ -\d+,0 \+\d+,7 @@$", text, re.MULTILINE)
    # the head of the patch says why a hook is not enough, and what would make the patch unnecessary
    for part in ("Subject: ", "\nReason: ", "\nRetired by: ", "\nMade for: core_v0."):
        assert part in text


@pytest.mark.parametrize("release", RELEASES)
def test_every_patched_file_is_pinned_and_patched_once(release):
    series = patch.read_series(ROOT / "patches" / release)
    git = ["git", "apply", "--numstat"]
    counts = subprocess.run(git, input=series.patches, capture_output=True, check=True).stdout
    assert sorted(counts.decode().splitlines()) == [f"7\t0\t{path}" for path in sorted(series.sums)]
    assert "pretrain_gpt.py" in series.sums
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in series.sums.values())
    # errors name the versions once, and take them from the first patch
    made_for = f"\nMade for: {series.made_for}\n".encode()
    assert series.made_for and series.patches.count(made_for) == len(series.sums)


@pytest.mark.parametrize("found", PATCHES, ids=NAMES)
def test_readme_gives_the_reason_for_every_patch(found):
    readme = (ROOT / "patches" / "README.md").read_text()
    assert f"| `{found.parent.name}` | `{found.name}` |" in readme
    assert f"**`{found.name}`**" in readme
    assert f"```python\n{SEAM.rstrip()}\n```" in readme


def test_without_megamem_the_seam_does_nothing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    names = dict(vars(sys))
    seam = {}
    exec(SEAM, seam)
    assert seam.keys() == {"importlib", "__builtins__"}
    assert vars(sys) == names


@pytest.mark.parametrize("seam", [SEAM, OLD_SEAM], ids=["new", "old"])
def test_every_seam_finds_megamem(monkeypatch, seam):
    """Checkouts that an older megamem has patched import the launcher by its old name."""
    installed = []
    monkeypatch.setattr(patches, "install", lambda: installed.append(True))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    exec(seam, {})
    assert installed == [True]


@pytest.fixture
def patched_tree(tmp_path, monkeypatch) -> Path:
    """A checkout whose pretrain_gpt.py is the script of examples/, patched by the command."""
    old = SCRIPT.read_text()
    before = old[: old.index("import megatron_releases\n")].count("\n") + 1
    new = insert(old, (before, SEAM))
    write_series(tmp_path / "patches", tmp_path / "scratch", {"pretrain_gpt.py": (old, new)})
    monkeypatch.setattr(patch, "HOMES", (tmp_path / "patches",))
    root = write_tree(tmp_path / "Megatron-LM", {"pretrain_gpt.py": old})
    shutil.copy(SCRIPT.parent / "megatron_releases.py", root)
    assert main(["patch", "--megatron-dir", str(root)]) == 0
    return root


def ask(tree: Path, *words: str) -> subprocess.CompletedProcess:
    """Run pretrain_gpt.py of a checkout without the launcher."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "pretrain_gpt.py", *words]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def lists_memory_flags(tree: Path) -> None:
    """Its --help names every flag of MemoryConfig."""
    told = ask(tree, "--help")
    assert told.returncode == 0, told.stderr[-2000:]
    assert all(flag(field.name) in told.stdout for field in fields(MemoryConfig))


def says_errors_in_one_line(tree: Path) -> None:
    """Errors of the parser and of the start-up checks are one line each."""
    wrong = ask(tree, "--memory-layer", "1")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].endswith("(did you mean --memory-layers?)")
    model = [str(word) for pair in (MODEL | TRAINING).items() for word in pair]
    refused = ask(tree, *model, "--mock-data", "--memory-layers", "1", "--memory-topk", "2000")
    assert refused.returncode == 2, refused.stderr[-2000:]
    assert refused.stderr.splitlines()[-1].startswith("megamem: error: --memory-topk 2000 is lar")


def test_patched_script_takes_the_flags_by_itself(patched_tree):
    lists_memory_flags(patched_tree)
    if not WANTS_A_GPU_FIRST:
        says_errors_in_one_line(patched_tree)


@pytest.mark.gloo
def test_patched_script_under_the_launcher_is_hooked_once(patched_tree):
    patched = run_training("patched", 1, *MEMORY, script=patched_tree / "pretrain_gpt.py")
    plain = run_training("not patched", 1, *MEMORY)
    assert patched.losses == plain.losses and patched.grad_norms == plain.grad_norms
    assert patched.stdout.count("> megamem:") == plain.stdout.count("> megamem:") == 1
    assert len(patched.losses) == TRAINING["--train-iters"]


@pytest.fixture(params=CHECKOUTS, ids=lambda path: path.name)
def checkout(request, tmp_path) -> Path:
    """A copy of a real checkout, as released."""
    copy = tmp_path / "Megatron-LM"
    skip = shutil.ignore_patterns(".git", "tests", "docs", "examples", "tools", "__pycache__")
    shutil.copytree(request.param, copy, symlinks=True, ignore=skip)
    if main(["patch", "--megatron-dir", str(copy), "--check", "--reverse"]) == 0:
        assert main(["patch", "--megatron-dir", str(copy), "--reverse"]) == 0
    return copy


def test_real_checkout_there_and_back(checkout):
    _, series = patch.find_release(checkout)

    def read() -> dict[str, bytes]:
        return {path: (checkout / path).read_bytes() for path in series.sums}

    def git_apply(folder: Path) -> dict[str, bytes]:
        """The scripts after plain `git apply` of the patches in a folder."""
        git = ["git", "apply", "--unidiff-zero"]
        files = [str(path) for path in sorted(folder.glob("*.patch"))]
        subprocess.run([*git, *files], cwd=checkout, check=True)
        found = read()
        subprocess.run([*git, "--reverse", *files], cwd=checkout, check=True)
        return found

    released = read()
    new = git_apply(ROOT / "patches" / series.release)
    old_patches = checkout.parent / "old"
    old_patches.mkdir()
    for path in (ROOT / "patches" / series.release).glob("*.patch"):
        lines = ("".join(f"+{line}" for line in seam.splitlines(True)) for seam in (SEAM, OLD_SEAM))
        (old_patches / path.name).write_text(path.read_text().replace(*lines))
    old = git_apply(old_patches)
    assert len({tuple(scripts.items()) for scripts in (released, new, old)}) == 3
    for path, content in new.items():
        compile(content, path, "exec")

    for before, words, after in (
        (released, [], new),
        (new, ["--reverse"], released),
        (old, [], new),
        (old, ["--reverse"], released),
    ):
        for path, content in before.items():
            (checkout / path).write_bytes(content)
        assert main(["patch", "--megatron-dir", str(checkout), *words]) == 0
        assert read() == after


def test_no_line_of_a_real_checkout_is_carried(checkout):
    release = patch.find_release(checkout)[1].release
    for found in (path for path in PATCHES if path.parent.name == release):
        script = re.search(r"^\+\+\+ b/(.+)$", found.read_text(), re.MULTILINE)[1]
        theirs = {line.strip() for line in (checkout / script).read_text().splitlines()}
        ours = {line.lstrip("+").strip() for line in found.read_text().splitlines()}
        assert theirs & ours <= {"", "import importlib.util"}


@pytest.mark.slow
def test_real_script_takes_the_flags_by_itself(checkout):
    assert main(["patch", "--megatron-dir", str(checkout)]) == 0
    lists_memory_flags(checkout)
    if patch.find_release(checkout)[1].release != "core_v0.17.x":
        says_errors_in_one_line(checkout)


@pytest.mark.slow
@pytest.mark.gloo
def test_real_script_trains_and_is_unchanged_without_flags(checkout):
    use_compiled_helpers(checkout)
    model = [str(word) for pair in (MODEL | TRAINING).items() for word in pair]
    words = ("--cpu", checkout / "pretrain_gpt.py", *model, *SWITCHES, "--mock-data")

    def train(name: str, *flags: str):
        folders = os.pathsep.join([str(checkout), str(ROOT)])
        return launch(name, 1, *words, *flags, environment={"PYTHONPATH": folders})

    before = train("as released")
    assert main(["patch", "--megatron-dir", str(checkout)]) == 0
    after = train("patched, without a flag")
    memory = train("patched", *MEMORY)
    assert before.losses == after.losses and before.grad_norms == after.grad_norms
    assert before.parameters == after.parameters != memory.parameters
    assert len(memory.losses) == TRAINING["--train-iters"] and memory.losses[-1] < memory.losses[0]


def use_compiled_helpers(checkout: Path) -> None:
    """Copy compiled dataset helpers into a checkout, as compiling them needs pybind11."""
    import megatron.core.datasets as installed

    for library in Path(installed.__file__).parent.glob("helpers_cpp*.so"):
        shutil.copy(library, checkout / HELPERS)
    (checkout / HELPERS / "Makefile").write_text("default:\n")
