"""The patch command on checkouts in miniature: what it changes, and what it leaves alone."""

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megamem.__main__ import INTERRUPTED, main
from megamem.tools import patch
from tests.patches.trees import MADE_FOR, RELEASE, SEAM, Tree, insert, write_series, write_tree

SCRIPT = "".join(f"line {number}\n" for number in range(1, 30))
NOBODY = 65534


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Tree:
    """A checkout with two scripts, one of them patched in two places, and its patches."""
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
    return main(["patch", "--megatron-dir", str(tree), *words])


def git(folder: Path, *words: str) -> None:
    settings = ("-c", "user.name=x", "-c", "user.email=x@y", "-c", "core.autocrlf=false")
    subprocess.run(["git", *settings, *words], cwd=folder, check=True, capture_output=True)


def give_to_nobody(*paths: Path) -> None:
    """Change the owner to nobody if root runs the tests; other users own the files anyway."""
    for path in paths:
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY)


def goes_there_and_back(tree: Tree) -> None:
    assert run(tree.root) == 0
    assert tree.read() == tree.patched != tree.released
    assert run(tree.root, "--reverse") == 0
    assert tree.read() == tree.released


def is_refused(tree: Tree, capsys, *words: str) -> str:
    """The error message, which must be one line; the checkout must not change."""
    before = tree.everything()
    capsys.readouterr()
    assert run(tree.root, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("megamem: error: ") and said.count("\n") == 1
    assert tree.everything() == before
    return said


def test_patched_and_restored(tree, capsys):
    assert run(tree.root) == 0
    assert tree.read() == tree.patched != tree.released
    said = capsys.readouterr().out
    assert f"Megatron-LM 0.19.2 in {tree.root}, patches for {RELEASE}:" in said
    assert "  pretrain_gpt.py: patched\n" in said and "  deep/pretrain.py: patched\n" in said

    assert run(tree.root, "--reverse") == 0
    assert tree.read() == tree.released
    assert "pretrain_gpt.py: restored" in capsys.readouterr().out
    # no temporary file stays behind
    assert len(tree.everything()) == 3
    assert not list(tree.root.rglob(".*"))


@pytest.mark.parametrize("words", [["--check"], ["--check", "--reverse"]])
def test_check_writes_nothing(tree, capsys, words):
    before = tree.released
    if "--reverse" in words:
        assert run(tree.root) == 0
        before = tree.patched
    assert run(tree.root, *words) == 0
    assert tree.read() == before
    assert " can be " in capsys.readouterr().out


def test_an_old_seam_is_renewed(tree, capsys):
    tree.write(tree.old)
    assert tree.read() == tree.old != tree.patched
    assert run(tree.root, "--check") == 0
    said = capsys.readouterr().out
    assert "pretrain_gpt.py: can be updated from the patch of an older megamem\n" in said
    assert tree.read() == tree.old

    assert run(tree.root) == 0
    said = capsys.readouterr().out
    assert "deep/pretrain.py: updated from the patch of an older megamem\n" in said
    assert tree.read() == tree.patched
    assert "already patched" in is_refused(tree, capsys)


def test_only_an_old_seam_is_renewed(tree, capsys):
    tree.write(tree.patched | {"deep/pretrain.py": tree.old["deep/pretrain.py"]})
    assert run(tree.root) == 0
    assert tree.read() == tree.patched
    said = capsys.readouterr().out
    assert "deep/pretrain.py: updated" in said and "pretrain_gpt.py" not in said


@pytest.mark.parametrize("new", [[], ["pretrain_gpt.py"]], ids=["all old", "one old"])
def test_an_old_seam_is_taken_out(tree, capsys, new):
    contents = tree.old | {path: tree.patched[path] for path in new}
    tree.write(contents)
    assert run(tree.root, "--check", "--reverse") == 0
    assert tree.read() == contents
    assert run(tree.root, "--reverse") == 0
    assert tree.read() == tree.released
    assert "pretrain_gpt.py: restored\n" in capsys.readouterr().out


def test_an_old_seam_in_one_file_only_is_half_a_patch(tree, capsys):
    tree.write({"pretrain_gpt.py": tree.old["pretrain_gpt.py"]})
    assert "is only partly patched" in is_refused(tree, capsys)
    assert "is only partly patched" in is_refused(tree, capsys, "--reverse")


def test_a_link_is_followed(tree, tmp_path):
    script = tree.root / "pretrain_gpt.py"
    script.rename(tmp_path / "elsewhere.py")
    script.symlink_to(tmp_path / "elsewhere.py")
    assert run(tree.root) == 0
    assert script.is_symlink()
    assert (tmp_path / "elsewhere.py").read_bytes() == tree.patched["pretrain_gpt.py"]


@pytest.mark.parametrize("mode", [0o755, 0o640, 0o444])
def test_permissions_are_kept(tree, mode):
    script = tree.root / "pretrain_gpt.py"
    script.chmod(mode)
    give_to_nobody(script)
    owner = script.stat().st_uid
    for words in ([], ["--reverse"]):
        assert run(tree.root, *words) == 0
        assert (script.stat().st_mode & 0o777, script.stat().st_uid) == (mode, owner)


def _in_no_repository(tree: Tree, monkeypatch) -> None:
    pass


def _in_another_repository(tree: Tree, monkeypatch) -> None:
    git(tree.root.parent, "init")


def _ignored_by_another_repository(tree: Tree, monkeypatch) -> None:
    git(tree.root.parent, "init")
    (tree.root.parent / ".gitignore").write_text("*\n")


def _is_a_repository(tree: Tree, monkeypatch) -> None:
    git(tree.root, "init")
    git(tree.root, "add", ".")
    git(tree.root, "commit", "-m", "released")


def _below_a_hook_of_another_repository(tree: Tree, monkeypatch) -> None:
    git(tree.root.parent, "init", "other")
    monkeypatch.setenv("GIT_DIR", str(tree.root.parent / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", "/")


def _temporary_files_in_a_repository(tree: Tree, monkeypatch) -> None:
    git(tree.root.parent, "init")
    (tree.root.parent / "temporary").mkdir()
    # git follows the symbolic link
    (tree.root.parent / "link").symlink_to("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(tree.root.parent / "link"))


def _own_settings(tree: Tree, monkeypatch) -> None:
    home = tree.root.parent / "home"
    (home / "git").mkdir(parents=True)
    (home / ".gitconfig").write_text("[core]\nautocrlf = true\n[apply]\nwhitespace = error-all\n")
    (home / "git" / "attributes").write_text("* text eol=crlf\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.autocrlf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "true")


@pytest.mark.parametrize(
    "put",
    [
        _in_no_repository,
        _in_another_repository,
        _ignored_by_another_repository,
        _is_a_repository,
        _below_a_hook_of_another_repository,
        _temporary_files_in_a_repository,
        _own_settings,
    ],
)
def test_no_repository_and_no_setting_takes_part(tree, monkeypatch, put):
    put(tree, monkeypatch)
    goes_there_and_back(tree)
    tree.write(tree.old)
    assert run(tree.root) == 0
    assert tree.read() == tree.patched


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


def _other_line_ends(tree: Tree) -> None:
    tree.write({"pretrain_gpt.py": tree.released["pretrain_gpt.py"].replace(b"\n", b"\r\n")})


def _patched_already(tree: Tree) -> None:
    tree.write(tree.patched)


def _patched_and_changed(tree: Tree) -> None:
    _patched_already(tree)
    path = tree.root / "pretrain_gpt.py"
    path.write_bytes(path.read_bytes().replace(b"line 9\n", b"line nine\n"))


def _old_seam_and_changed(tree: Tree) -> None:
    tree.write(tree.old)
    _script_changed(tree)


def _one_hunk_only(tree: Tree) -> None:
    (tree.root / "pretrain_gpt.py").write_text(insert(SCRIPT, (4, SEAM)))


def _one_file_only(tree: Tree) -> None:
    (tree.root / "pretrain_gpt.py").write_bytes(tree.patched["pretrain_gpt.py"])


@pytest.mark.parametrize("words", [[], ["--check"]], ids=["apply", "check"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_not_megatron, "is not a Megatron-LM checkout: it has no megatron/core/package_info.py"),
        (_unknown_release, "is Megatron-LM 0.16.2, but there are only patches for core_v0.19.x;"),
        (_no_version, "is Megatron-LM ?.?.?, but there are only"),
        (
            _script_missing,
            "deep/pretrain.py in --megatron-dir {root}, which is Megatron-LM 0.19.2, differs from "
            f"what the patches for {RELEASE} are made for (deep/pretrain.py is missing); run "
            "`git -C {root} checkout -- deep/pretrain.py`, which discards all changes, check out "
            f"what they are made for ({MADE_FOR}), or leave the checkout as it is",
        ),
        (_script_changed, "deep/pretrain.py in --megatron-dir {root}, which is Megatron-LM 0.19.2"),
        (
            _other_line_ends,
            "are made for (it has CRLF line ends; clone with core.autocrlf=false); run `git",
        ),
        (_patched_already, "{root} is already patched (--reverse removes the patch), so there is"),
        (_patched_and_changed, "are made for (pretrain_gpt.py mentions megamem); run `git"),
        (_old_seam_and_changed, "are made for (deep/pretrain.py mentions megamem, it has CRLF"),
        (_one_hunk_only, "are made for (pretrain_gpt.py mentions megamem); run `git"),
        (
            _one_file_only,
            "{root} is only partly patched: of deep/pretrain.py, pretrain_gpt.py only "
            "pretrain_gpt.py has the patch; run `git -C {root} checkout -- pretrain_gpt.py` to",
        ),
    ],
)
def test_anything_else_is_refused_and_left_alone(tree, capsys, spoil, message, words):
    spoil(tree)
    assert message.format(root=tree.root) in is_refused(tree, capsys, *words)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tree: None, "{root} is not patched, so there is nothing to do"),
        (_script_changed, "deep/pretrain.py in --megatron-dir {root}, which is Megatron-LM 0.19.2"),
        (_one_file_only, "{root} is only partly patched"),
        (_patched_and_changed, "pretrain_gpt.py in --megatron-dir {root}, which is Megatron-LM 0."),
    ],
)
def test_reverse_refuses_too(tree, capsys, spoil, message):
    spoil(tree)
    assert message.format(root=tree.root) in is_refused(tree, capsys, "--reverse")


@pytest.mark.parametrize("spoil", [_patched_and_changed, _one_file_only, _script_missing])
def test_the_command_that_an_error_names_mends_the_tree(tree, capsys, spoil):
    _is_a_repository(tree, None)
    spoil(tree)
    if spoil is _patched_and_changed:
        tree.write({"deep/pretrain.py": tree.released["deep/pretrain.py"]})
    said = is_refused(tree, capsys, "--check")
    subprocess.run(said.split("`")[1], shell=True, check=True, capture_output=True)
    assert tree.read() == tree.released


@pytest.fixture
def public_tree(tree, monkeypatch) -> Iterator[Tree]:
    """The checkout and its patches in a folder that all users may read, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as public:
        shutil.copytree(tree.root.parent, public, dirs_exist_ok=True)
        os.chmod(public, 0o755)
        monkeypatch.setattr(patch, "HOMES", (Path(public) / "patches",))
        yield Tree(Path(public) / "Megatron-LM", tree.released, tree.patched)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run as nobody if root runs the tests, as root may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("closed", [".", "deep"])
def test_read_only_folder(public_tree, capsys, closed):
    give_to_nobody(public_tree.root, public_tree.root / "deep")
    (public_tree.root / closed).chmod(0o555)
    try:
        with unprivileged():
            said = is_refused(public_tree, capsys)
            # --check works without the right to write
            assert run(public_tree.root, "--check") == 0
    finally:
        (public_tree.root / closed).chmod(0o755)
    assert f"--megatron-dir {public_tree.root} cannot be replaced" in said
    assert "Permission denied" in said and "make the checkout writable" in said


def test_read_only_file(public_tree, monkeypatch):
    # it starts this Python, which the user nobody may not be allowed to do
    monkeypatch.setattr(patch, "_importable_from", lambda root: True)
    script = public_tree.root / "pretrain_gpt.py"
    script.chmod(0o444)
    give_to_nobody(script, public_tree.root, public_tree.root / "deep")
    with unprivileged():
        goes_there_and_back(public_tree)
    assert script.stat().st_mode & 0o777 == 0o444


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
    (tree.root / "deep/pretrain.py").chmod(0o751)
    before = tree.everything()
    if error is KeyboardInterrupt:
        assert run(tree.root) == INTERRUPTED
        assert tree.everything() == before
    else:
        assert str(error) in is_refused(tree, capsys)
    assert len(calls) == 2 * fails
    assert (tree.root / "deep/pretrain.py").stat().st_mode & 0o777 == 0o751


def test_a_disk_that_fills_up_leaves_nothing(tree, capsys, monkeypatch):
    copy, calls = shutil.copy2, []

    def full(old, new):
        calls.append(new)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        copy(old, new)

    monkeypatch.setattr(patch.shutil, "copy2", full)
    assert "No space left on device" in is_refused(tree, capsys)
    assert len(calls) == 2


def test_git_without_space_leaves_nothing(tree, capsys):
    """The limit on the size of files allows a copy of the script, but not the patched script."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(SCRIPT) + 10, hard))
    try:
        said = is_refused(tree, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "git apply ended with status " in said


def test_without_git(tree, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for words in ([], ["--check"], ["--reverse"]):
        assert "megamem patch needs git, which is not on PATH; install git, or" in is_refused(
            tree, capsys, *words
        )


def test_a_git_that_fails_is_quoted(tree, capsys, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text("#!/bin/sh\necho fatal: no >&2\nexit 128\n")
    (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert "git apply ended with status 128: fatal: no" in is_refused(tree, capsys)


def test_missing_patches_are_named(tree, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(patch, "HOMES", (tmp_path / "gone",))
    said = is_refused(tree, capsys)
    assert f"megamem's patches are missing, as {tmp_path / 'gone'} do not exist" in said


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
