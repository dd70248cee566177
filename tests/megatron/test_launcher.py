import argparse
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from megamem import errors
from megamem.config import ConfigurationError
from megamem.megatron import launcher
from tests.helpers.megatron_runs import SCRIPT, command_line, launch

MEMORY = ("--memory-layers", 1, "--memory-num-keys", 16, "--memory-topk", 4)
SAYS_WHO_IT_IS = "import sys; print(__name__, __file__, sys.argv, sys.path[0])"
STACK_OF_ENDED_RANK = re.compile(r'^ *File ".*", line \d+ in .*\n', re.MULTILINE)


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "scripts" / "train.py"
    path.parent.mkdir()
    path.write_text(SAYS_WHO_IT_IS)
    return path


@pytest.fixture
def no_megatron(monkeypatch):
    """Run the launcher in this process, without its changes to Megatron and to the environment."""
    from megamem.megatron import dataset_helpers, patches

    installed = []
    monkeypatch.setattr(patches, "install", lambda: installed.append(True))
    monkeypatch.setattr(dataset_helpers, "prepare_dataset_helpers", lambda: None)
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("RANK", "0")
    return installed


def test_options_end_at_the_script(script):
    command = launcher.parse(["--cpu", str(script), "--cpu=force", "--lr", "1"])
    assert command == launcher.Command(str(script), ["--cpu=force", "--lr", "1"], cpu=True)
    forced = launcher.parse(["--cpu=force", str(script)])
    assert (forced.cpu, forced.force_cpu) == (True, True)
    assert launcher.parse([str(script)]) == launcher.Command(str(script), [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no script is given"),
        (["--cpu"], "no script is given"),
        (["nowhere/train.py", "--lr", "1"], "there is no script nowhere/train.py"),
        (["--tensor-model-parallel-size", "2"], "unknown option --tensor-model-parallel-size"),
        (["--cpu=yes", "x.py"], "unknown option --cpu=yes"),
    ],
)
def test_wrong_commands_end_in_one_line(no_megatron, capsys, words, message):
    with pytest.raises(SystemExit) as leaving:
        launcher.main(words)
    said = capsys.readouterr().err
    assert leaving.value.code == 2 and not no_megatron
    assert said.startswith(f"megamem: error: {message}") and said.count("\n") == 1


def test_help_needs_no_script(capsys):
    assert launcher.main(["--help"]) == 0
    assert "--cpu=force" in capsys.readouterr().out


def test_script_runs_as_python_would_run_it(no_megatron, capsys, script):
    assert launcher.main([str(script), "--lr", "1"]) == 0
    argv = [str(script), "--lr", "1"]
    assert capsys.readouterr().out == f"__main__ {script} {argv} {script.parent}\n"
    assert no_megatron == [True]
    # megamem can still be imported if only the working directory had it on the path
    assert str(Path(launcher.__file__).parents[2]) in sys.path


def test_a_script_in_a_folder_of_a_checkout_finds_its_megatron(
    no_megatron, capsys, tmp_path: Path
) -> None:
    (tmp_path / "megatron/core").mkdir(parents=True)
    script = tmp_path / "tools/serve.py"
    script.parent.mkdir()
    script.write_text("import sys; print(*sys.path[:2])")
    assert launcher.main([str(script)]) == 0
    assert capsys.readouterr().out == f"{script.parent} {tmp_path}\n"


@pytest.mark.parametrize("code", [0, 3])
def test_exit_status_is_the_scripts(no_megatron, script, code):
    script.write_text(f"import sys; sys.exit({code})")
    with pytest.raises(SystemExit) as leaving:
        launcher.main([str(script)])
    assert leaving.value.code == code


def test_other_errors_keep_their_traceback(no_megatron, script):
    script.write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        launcher.main([str(script)])


def test_first_rank_reports_before_the_others(no_megatron, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    for rank, local_rank in ((0, 0), (8, 0), (9, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        with pytest.raises(SystemExit):
            errors.stop("no")
    assert capsys.readouterr().err.splitlines() == [
        "megamem: error: no",
        "megamem: error (rank 8): no",
        "megamem: error (rank 9): no",
    ]
    assert 0 < waited[0] < waited[1] and len(waited) == 2


def test_one_process_is_a_world_of_one(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")  # the end of the test then restores the old value
        monkeypatch.delenv(name)
    launcher.set_rendezvous_defaults()
    assert [os.environ[name] for name in names[:5]] == ["0", "1", "0", "1", "127.0.0.1"]
    assert os.environ["MASTER_PORT"] == "0"


def test_torchruns_world_is_left_alone(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    for name in ("WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    launcher.set_rendezvous_defaults()
    assert os.environ["RANK"] == "5" and "MASTER_PORT" not in os.environ


FLAGS = ["--memory-layers", "--memory-topk", "--num-layers", "--lr"]


@pytest.mark.parametrize(
    ("unknown", "hint"),
    [
        ("--memory-layer 4 12", " (did you mean --memory-layers?)"),
        ("--memory_topk=3 --num-layer 2", " (did you mean --memory-topk, --num-layers?)"),
        ("--cpu", " (--cpu goes before the script's path)"),
        ("--nothing-like-it -3", ""),
    ],
)
def test_unknown_flags_get_a_suggestion(unknown, hint):
    assert errors.suggestion(f"unrecognized arguments: {unknown}", FLAGS) == hint


@pytest.mark.parametrize("memory", [True, False])
def test_other_parser_errors_get_none(memory, no_megatron, capsys, monkeypatch):
    """Without a memory flag on the command line, Megatron's own error stays."""
    words = ["--lr", "much", *(["--memory-layers"] if memory else [])]
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words])
    parser = argparse.ArgumentParser(prog="pretrain_gpt.py")
    parser.add_argument("--lr", type=float)
    errors.friendly_parser(parser)
    with pytest.raises(SystemExit) as leaving:
        parser.parse_args(words)
    assert leaving.value.code == 2
    expected = "error: argument --lr: invalid float value: 'much'\n"
    said = capsys.readouterr().err
    assert said.endswith(expected) and said.startswith("megamem: error:" if memory else "usage:")


def test_configuration_errors_have_no_traceback(no_megatron, script, capsys):
    script.write_text(
        "from megamem.config import ConfigurationError\nraise ConfigurationError('k')"
    )
    with pytest.raises(SystemExit) as leaving:
        launcher.main([str(script)])
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "megamem: error: k\n"
    assert issubclass(ConfigurationError, ValueError)


@pytest.mark.parametrize(
    ("error", "has_gpu", "named"),
    [
        ("AssertionError('Megatron requires CUDA.')", False, True),
        ("RuntimeError('Found no NVIDIA driver on your system.\\nPlease ...')", False, True),
        ("RuntimeError('CUDA out of memory')", True, False),
        ("RuntimeError('no such thing')", False, False),
    ],
)
def test_without_a_gpu_the_error_names_the_cpu(
    no_megatron, script, capsys, monkeypatch, error, has_gpu, named
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    script.write_text(f"raise {error}")
    with pytest.raises(SystemExit if named else RuntimeError):
        launcher.main([str(script)])
    said = capsys.readouterr().err
    assert (f"python -m megamem.run --cpu {script} ..." in said) == named
    assert said.count("\n") == named


def test_a_run_without_a_gpu_is_told_of_the_cpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    words = [word for word in command_line(*MEMORY) if word != "--cpu"]
    log = launch("no gpu", 1, *words, check=False)
    said = [line for line in log.stdout.splitlines() if "megamem: error" in line]
    assert log.returncode == 2 and len(said) == 1 and "Traceback" not in log.stdout
    assert f"megamem.run --cpu {SCRIPT} ..." in said[0]


@pytest.mark.gloo
def test_two_ranks_say_it_once():
    log = launch("unknown flag", 2, "--cpu", SCRIPT, "--memory-layer", "1", check=False)
    assert log.returncode != 0
    assert log.stdout.count("unrecognized arguments: --memory-layer 1 (did you mean") == 1
    assert "usage:" not in log.stdout
    # torchrun writes its own traceback, and the stack of the rank that it ends, without a comma
    # behind the line; a traceback of ours would name the file of the launcher
    assert "launcher.py" not in STACK_OF_ENDED_RANK.sub("", log.stdout)


def test_seams_of_older_releases_find_their_way():
    """Patched checkouts contain this import, and nobody may ever update them."""
    from megamem.integration.launcher import attach

    assert attach is launcher.attach
