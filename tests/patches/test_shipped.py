"""The patches themselves: small, of insertions only, and right for the releases they name.

MEGATRON_LM_PATH may name checkouts of Megatron-LM, as PATH names folders. Each is copied, patched
and tried; that its files are as released is part of the test.
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

from megamem.config import MemoryConfig, flag
from megamem.tools import patch
from tests.helpers.megatron_runs import MODEL, SCRIPT, SWITCHES, TRAINING, launch, run_training
from tests.patches.trees import insert, write_series, write_tree

ROOT = Path(__file__).parents[2]
RELEASES = ("core_v0.17.x", "core_v0.18.x", "core_v0.19.x")
SERIES = [patch.read_series(ROOT / "patches" / release) for release in RELEASES]
CHECKOUTS = [
    Path(word) for word in os.environ.get("MEGATRON_LM_PATH", "").split(os.pathsep) if word
]
MEMORY = ("--memory-layers", "1", "2", "--memory-num-keys", "16", "--memory-topk", "8")
# what the dataset helpers are compiled into where make finds nothing to do
HELPERS = "megatron/core/datasets"
# before it reads the flags, 0.17 does
WANTS_A_GPU_FIRST = megatron.core.__version__.startswith("0.17.")


def inserted(series: patch.Series) -> str:
    """The seam: what a series puts into pretrain_gpt.py."""
    blocks = [
        b"".join(insertion.lines)
        for found in series.patches
        if found.path == "pretrain_gpt.py"
        for insertion in found.insertions
    ]
    assert len(blocks) == 1
    return blocks[0].decode()


def test_every_supported_release_has_patches():
    assert sorted(patch.available()) == list(RELEASES)
    assert patch.available()[RELEASES[0]].parent == ROOT / "patches"


@pytest.mark.parametrize("series", SERIES, ids=RELEASES)
def test_a_patch_opens_a_seam_and_no_more(series):
    for found in series.patches:
        lines = [line for insertion in found.insertions for line in insertion.lines]
        assert 0 < len(lines) <= 20
        compile(b"".join(lines), found.name, "exec")
        text = (ROOT / "patches" / series.release / found.name).read_text()
        assert text.isascii()
        # says why a hook would not do, and what would make it needless
        for part in ("Subject: ", "\nReason: ", "\nRetired by: ", "\nMade for: core_v0."):
            assert part in text
    assert "pretrain_gpt.py" in series.sums
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in series.sums.values())


@pytest.mark.parametrize("series", SERIES, ids=RELEASES)
def test_readme_gives_the_reason_for_every_patch(series):
    readme = (ROOT / "patches" / "README.md").read_text()
    for found in series.patches:
        assert f"`{found.name}`" in readme and f"`{series.release}`" in readme


def test_without_megamem_the_seam_does_nothing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    names = dict(vars(sys))
    for series in SERIES:
        seam = {}
        exec(inserted(series), seam)
        assert seam.keys() == {"importlib", "__builtins__"}
    assert vars(sys) == names


@pytest.fixture
def patched_tree(tmp_path, monkeypatch) -> Path:
    """A checkout whose pretrain_gpt.py is the script of examples/, patched by the command."""
    old = SCRIPT.read_text()
    before = old[: old.index("import torch\n")].count("\n") + 1
    new = insert(old, (before, inserted(SERIES[-1])))
    write_series(tmp_path / "patches", tmp_path / "scratch", {"pretrain_gpt.py": (old, new)})
    monkeypatch.setattr(patch, "HOMES", (tmp_path / "patches",))
    root = write_tree(tmp_path / "Megatron-LM", {"pretrain_gpt.py": old})
    assert patch.main(["--megatron-dir", str(root)]) == 0
    return root


def ask(tree: Path, *words: str) -> subprocess.CompletedProcess:
    """What pretrain_gpt.py of a tree says by itself, without the launcher."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "pretrain_gpt.py", *words]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def lists_memory_flags(tree: Path) -> None:
    """Every flag of MemoryConfig."""
    told = ask(tree, "--help")
    assert told.returncode == 0, told.stderr[-2000:]
    assert all(flag(field.name) in told.stdout for field in fields(MemoryConfig))


def says_errors_in_one_line(tree: Path) -> None:
    """Those of the parser, and those of the checks."""
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
    if patch.main(["--megatron-dir", str(copy), "--check", "--reverse"]) == 0:
        assert patch.main(["--megatron-dir", str(copy), "--reverse"]) == 0
    return copy


def test_real_checkout_there_and_back(checkout):
    version, series = patch.find_release(checkout)
    released = {path: (checkout / path).read_bytes() for path in series.sums}
    git = ["git", "apply", "--unidiff-zero"]
    files = [str(ROOT / "patches" / series.release / found.name) for found in series.patches]
    # git reads the same patches, and means the same by them
    subprocess.run([*git, "--check", *files], cwd=checkout, check=True)
    subprocess.run([*git, *files], cwd=checkout, check=True)
    by_git = {path: (checkout / path).read_bytes() for path in series.sums}
    subprocess.run([*git, "--reverse", *files], cwd=checkout, check=True)
    assert patch.main(["--megatron-dir", str(checkout)]) == 0
    assert {path: (checkout / path).read_bytes() for path in series.sums} == by_git != released
    for path in series.sums:
        compile(by_git[path], path, "exec")
    assert patch.main(["--megatron-dir", str(checkout), "--reverse"]) == 0
    assert {path: (checkout / path).read_bytes() for path in series.sums} == released


def test_no_line_of_a_real_checkout_is_carried(checkout):
    _, series = patch.find_release(checkout)
    for found in series.patches:
        theirs = {line.strip() for line in (checkout / found.path).read_text().splitlines()}
        text = (ROOT / "patches" / series.release / found.name).read_text()
        ours = {line.lstrip("+").strip() for line in text.splitlines()}
        assert theirs & ours <= {"", "import importlib.util"}


@pytest.mark.slow
def test_real_script_takes_the_flags_by_itself(checkout):
    assert patch.main(["--megatron-dir", str(checkout)]) == 0
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
    assert patch.main(["--megatron-dir", str(checkout)]) == 0
    after = train("patched, without a flag")
    memory = train("patched", *MEMORY)
    assert before.losses == after.losses and before.grad_norms == after.grad_norms
    assert before.parameters == after.parameters != memory.parameters
    assert len(memory.losses) == TRAINING["--train-iters"] and memory.losses[-1] < memory.losses[0]


def use_compiled_helpers(checkout: Path) -> None:
    """Spare the run the compilation of Megatron's dataset helpers, which needs pybind11."""
    import megatron.core.datasets as installed

    for library in Path(installed.__file__).parent.glob("helpers_cpp*.so"):
        shutil.copy(library, checkout / HELPERS)
    (checkout / HELPERS / "Makefile").write_text("default:\n")
