"""The patch command on checkouts in miniature: what it changes, and what it leaves alone."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamem.config import ConfigurationError
from megamem.tools import patch
from tests.patches.trees import RELEASE, Tree, insert, write_series, write_tree

SCRIPT = "".join(f"line {number}\n" for number in range(1, 30))
SEAM = "import seam\n\nseam.open()\n"


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Tree:
    """Two scripts, one of them patched in two places, and patches that fit them."""
    released = {"pretrain_gpt.py": SCRIPT, "deep/pretrain.py": "a\rb\r\nc\x0cd\nno end"}
    patched = {
        "pretrain_gpt.py": insert(SCRIPT, (4, SEAM), (20, "two\n")),
        "deep/pretrain.py": insert(released["deep/pretrain.py"], (2, SEAM)),
    }
    changes = {path: (released[path], patched[path]) for path in released}
    home = write_series(tmp_path / "patches", tmp_path / "scratch", changes).parent
    monkeypatch.setattr(patch, "HOMES", (tmp_path / "nowhere", home))
    root = write_tree(tmp_path / "Megatron-LM", released)
    contents = [
        {path: (root / path).read_bytes() for path in released},
        {path: (tmp_path / "scratch" / "b" / path).read_bytes() for path in released},
    ]
    return Tree(root, *contents)


def run(tree: Path, *words: str) -> int:
    return patch.main(["--megatron-dir", str(tree), *words])


def test_patched_and_restored(tree, capsys):
    (tree.root / "pretrain_gpt.py").chmod(0o755)
    assert run(tree.root) == 0
    assert tree.read() == tree.patched != tree.released
    assert (tree.root / "pretrain_gpt.py").stat().st_mode & 0o777 == 0o755
    said = capsys.readouterr().out
    assert f"Megatron-LM 0.19.2 in {tree.root}, patches for {RELEASE}:" in said
    assert "pretrain_gpt.py: patched (0001-pretrain_gpt.patch)" in said
    assert "deep/pretrain.py: patched (0002-pretrain.patch)" in said

    assert run(tree.root, "--reverse") == 0
    assert tree.read() == tree.released
    assert "pretrain_gpt.py: restored" in capsys.readouterr().out
    # no temporary file stays behind
    assert len(tree.everything()) == 3


@pytest.mark.parametrize("words", [["--check"], ["--check", "--reverse"]])
def test_check_writes_nothing(tree, capsys, words):
    before = tree.released
    if "--reverse" in words:
        assert run(tree.root) == 0
        before = tree.patched
    assert run(tree.root, *words) == 0
    assert tree.read() == before
    assert " can be " in capsys.readouterr().out


def test_a_link_is_followed(tree, tmp_path):
    script = tree.root / "pretrain_gpt.py"
    script.rename(tmp_path / "elsewhere.py")
    script.symlink_to(tmp_path / "elsewhere.py")
    assert run(tree.root) == 0
    assert script.is_symlink()
    assert (tmp_path / "elsewhere.py").read_bytes() == tree.patched["pretrain_gpt.py"]


def _not_megatron(tree: Tree) -> None:
    shutil.rmtree(tree.root / "megatron")


def _unknown_release(tree: Tree) -> None:
    write_tree(tree.root, {}, minor=16)


def _no_version(tree: Tree) -> None:
    (tree.root / "megatron/core/package_info.py").write_text("")


def _script_missing(tree: Tree) -> None:
    (tree.root / "deep/pretrain.py").unlink()


def _script_changed(tree: Tree) -> None:
    path = tree.root / "deep/pretrain.py"
    path.write_bytes(path.read_bytes() + b"\n")


def _patched_already(tree: Tree) -> None:
    assert run(tree.root) == 0


def _patched_and_changed(tree: Tree) -> None:
    _patched_already(tree)
    path = tree.root / "pretrain_gpt.py"
    path.write_bytes(path.read_bytes().replace(b"line 9\n", b"line nine\n"))


def _one_hunk_only(tree: Tree) -> None:
    (tree.root / "pretrain_gpt.py").write_text(insert(SCRIPT, (4, SEAM)))


def _one_file_only(tree: Tree) -> None:
    (tree.root / "pretrain_gpt.py").write_bytes(tree.patched["pretrain_gpt.py"])


@pytest.mark.parametrize("words", [[], ["--check"]], ids=["apply", "check"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_not_megatron, "is not a Megatron-LM checkout: it has no megatron/core/package_info.py"),
        (_unknown_release, "holds Megatron-LM 0.16.2, and there are patches for core_v0.19.x only"),
        (_no_version, "holds Megatron-LM ?.?.?, and there are"),
        (_script_missing, "has no deep/pretrain.py, which Megatron-LM 0.19.2 has"),
        (_script_changed, "deep/pretrain.py in {root} is not as Megatron-LM 0.19.2 released it; "),
        (_patched_already, "{root} is patched already, so there is nothing to do"),
        (_patched_and_changed, "released it; of the patch, pretrain_gpt.py has a part; restore it"),
        (_one_hunk_only, "released it; of the patch, pretrain_gpt.py has a part; restore it"),
        (
            _one_file_only,
            "{root} is half patched: deep/pretrain.py is as released, pretrain_gpt.py is patched; "
            "`git -C {root} checkout -- pretrain_gpt.py` makes them alike",
        ),
    ],
)
def test_anything_else_is_refused_and_left_alone(tree, capsys, spoil, message, words):
    spoil(tree)
    before = tree.everything()
    capsys.readouterr()
    assert run(tree.root, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("megamem: error: ") and said.count("\n") == 1
    assert message.format(root=tree.root) in said
    assert tree.everything() == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tree: None, "{root} is not patched, so there is nothing to do"),
        (_script_changed, "deep/pretrain.py in {root} is not as"),
        (_one_file_only, "{root} is half patched"),
        (_patched_and_changed, "pretrain_gpt.py in {root} is not as"),
    ],
)
def test_reverse_refuses_too(tree, capsys, spoil, message):
    spoil(tree)
    before = tree.everything()
    capsys.readouterr()
    assert run(tree.root, "--reverse") == 2
    assert message.format(root=tree.root) in capsys.readouterr().err
    assert tree.everything() == before


def test_the_command_that_an_error_names_mends_the_tree(tree, capsys):
    def git(*words: str) -> None:
        name = ("-c", "user.name=x", "-c", "user.email=x@y", "-c", "core.autocrlf=false")
        subprocess.run(["git", *name, *words], cwd=tree.root, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "released")
    _patched_and_changed(tree)
    capsys.readouterr()
    assert run(tree.root, "--check") == 2
    command = capsys.readouterr().err.split("(`")[1].split("`")[0]
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert tree.read() == tree.released


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write everywhere; be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_read_only_tree(tree, capsys):
    # pytest's own folders are private
    with tempfile.TemporaryDirectory() as public:
        os.chmod(public, 0o755)
        root = Path(public) / "Megatron-LM"
        shutil.copytree(tree.root, root)
        folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        _, series = patch.find_release(root)
        changes = patch.plan(root, "0.19.2", series, reverse=False)
        refused = pytest.raises(ConfigurationError, match="cannot be replaced.*Permission denied")
        with unprivileged(), refused:
            patch.write_all(changes)
        assert {path: (root / path).read_bytes() for path in tree.released} == tree.released
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "no"), OSError(28, "full"), KeyboardInterrupt]
)
@pytest.mark.parametrize("fails", [1, 2])
def test_a_failure_half_way_is_rolled_back(tree, capsys, monkeypatch, fails, error):
    replace, calls = os.replace, []

    def failing(old, new):
        calls.append(new)
        if len(calls) == fails:
            raise error
        replace(old, new)

    monkeypatch.setattr(patch.os, "replace", failing)
    before = tree.everything()
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            run(tree.root)
    else:
        assert run(tree.root) == 2
        assert str(error) in capsys.readouterr().err
    assert tree.everything() == before
    assert len(calls) == 2 * fails - 1


def test_a_disk_that_fills_up_leaves_nothing(tree, capsys, monkeypatch):
    calls = []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(patch.os, "fsync", fsync)
    before = tree.everything()
    assert run(tree.root) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert tree.everything() == before


def test_missing_patches_are_named(tree, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(patch, "HOMES", (tmp_path / "gone",))
    assert run(tree.root) == 2
    assert f"the patches are missing: {tmp_path / 'gone'} do not exist" in capsys.readouterr().err


@pytest.mark.parametrize("installed", [True, False])
def test_says_when_scripts_would_not_find_megamem(tree, capsys, monkeypatch, installed):
    monkeypatch.setattr(patch, "_importable_from", lambda root: installed)
    assert run(tree.root) == 0
    assert ("pip install" in capsys.readouterr().out) is not installed


def test_importable_means_for_a_script_of_the_tree(tree, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    assert patch._importable_from(tree.root)
    monkeypatch.setattr(patch.sys, "executable", "/usr/bin/false")
    assert not patch._importable_from(tree.root)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n", "only insertions, not '-a'"),
        ("--- a/x\n+++ b/x\n@@ -1,2 +1,3 @@\n a\n+b\n c\n", "only insertions, not ' a'"),
        ("--- a/x\n+++ b/x\n@@ -1,0 +2,2 @@\n+b\n", "@@ -1,0 +2,2 @@ does not describe"),
        ("--- a/x\n+++ b/x\n@@ -1,0 +3 @@\n+b\n", "does not describe what follows"),
        ("--- a/x\n+++ b/x\n@@ -1,0 +2 @@ def f():\n+b\n", "does not describe what follows"),
        ("--- a/x\n+++ b/x\n", "no insertion found"),
        ("--- a/x\n+++ b/x\n--- a/y\n+++ b/y\n@@ -1,0 +2 @@\n+b\n", "one file, not 2"),
        ("", "one file, not 0"),
    ],
)
def test_a_patch_that_does_more_than_insert_is_none(tmp_path, body, message):
    path = tmp_path / "0001.patch"
    path.write_text(f"Words.\n\ndiff --git a/x b/x\n{body}")
    with pytest.raises(ValueError) as caught:
        patch.parse_patch(path)
    assert message in str(caught.value)
    assert not isinstance(caught.value, ConfigurationError)


def test_every_patched_file_is_pinned(tree, tmp_path):
    folder = tmp_path / "patches" / RELEASE
    (folder / "SHA256SUMS").write_text("")
    with pytest.raises(ValueError, match="differ in"):
        patch.read_series(folder)


@given(
    lines=st.lists(st.sampled_from(["a", "b", "", "+c", "@@ -1 @@", "--- d", "e\rf"]), min_size=1),
    blocks=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["x\n", "a\n", "\n", "y\nz\n"]))),
    ended=st.booleans(),
)
def test_any_insertions_of_git_go_in_and_out(lines, blocks, ended):
    old = "\n".join(lines) + "\n"
    # past an end without a newline git has to change the last line
    places = {min(after, len(lines) if ended else len(lines) - 1): text for after, text in blocks}
    new = insert(old, *places.items())
    if not ended:
        old, new = old.removesuffix("\n"), new.removesuffix("\n")
    if old == new:
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_series(Path(scratch), Path(scratch), {"x.py": (old, new)})
        series = patch.read_series(folder)
    assert series.apply("x.py", old.encode()) == new.encode()
    assert series.reverse("x.py", new.encode()) == old.encode()
    assert series.state("x.py", new.encode()) == "patched"
    assert series.state("x.py", old.encode()) == "as released"
