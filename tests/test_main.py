"""The megamem command: how every subcommand handles good and bad command lines."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Megatron imports it, and at its first import torch logs that there is no CUDA toolkit
import torch.utils.cpp_extension  # noqa: F401

from megamem import __version__, eval_harness
from megamem.__main__ import CLOSED_PIPE, COMMANDS, INTERRUPTED, carry_out, main
from megamem.config import ConfigurationError
from megamem.tools import plan

CONVERT = ("SOURCE", "--to", "TARGET")
# a valid command line -> a flag with a value and a switch that can be added to it
LINES: dict[tuple[str, ...], tuple[str, str]] = {
    ("plan",): ("--gpus-per-node", "--swiglu"),
    ("plan", "--preset", "134m"): ("--memory-num-keys", "--memory-qk-norm"),
    ("convert", "reference", *CONVERT, "--num-attention-heads", "4"): (
        "--rope",
        "--separate-tables",
    ),
    ("convert", "upcycle", *CONVERT): ("--memory-num-keys", "--memory-keep-ffn"),
    ("convert", "export", *CONVERT): ("--shard-size", "--dtype"),
    ("convert", "import", *CONVERT): ("--memory-placement-seed", "--dtype"),
    ("bench",): ("--min-ms", "--quick"),
    ("bench", "--memory"): ("--num-keys", "--ranks"),
    ("tune",): ("--seconds", "--swiglu"),
    ("doctor",): ("--timeout", "--light"),
}
each_line = pytest.mark.parametrize("line", LINES, ids=" ".join)


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error that was written, which must be one line."""
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("megamem: error: ") and said.err.count("\n") == 1, said.err
    return said.err


def test_usage_names_every_command(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said and purpose in said for name, (_, purpose) in COMMANDS.items())
    assert main([]) == 2
    assert capsys.readouterr().err == said


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megamem {__version__}\n"


@pytest.mark.parametrize(("name", "hint"), [("rum", " (did you mean run?)"), ("zzz", "")])
def test_unknown_command(capsys, name, hint):
    assert main([name, "--cpu"]) == 2
    assert f"error: unknown command {name}{hint}; the commands are: run" in _one_line(capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_gets_its_words(name, monkeypatch):
    module = importlib.import_module(COMMANDS[name][0])
    if hasattr(module, "main"):
        monkeypatch.setattr(module, "main", lambda words: words)
        assert main([name, "--a", "b"]) == ["--a", "b"]
        return
    monkeypatch.setattr(module, "add_flags", lambda parser, words: parser.add_argument("--a"))
    monkeypatch.setattr(module, "run", lambda args: args.a)
    assert main([name, "--a", "b"]) == "b"


@each_line
def test_flags_are_taken_as_they_are_spelt(line, capsys):
    for flag in LINES[line]:
        # a prefix of a flag is not accepted either
        wrong = flag[:-1]
        assert main([*line, wrong]) == 2
        said = _one_line(capsys)
        assert f"unrecognized arguments: {wrong}" in said and f"did you mean {flag}" in said


@each_line
def test_a_value_that_is_missing(line, capsys):
    flag, _ = LINES[line]
    assert main([*line, flag]) == 2
    assert f"argument {flag}: expected one argument" in _one_line(capsys)


@each_line
def test_help(line, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([*line, "--help"])
    said = capsys.readouterr()
    assert (leaving.value.code, said.err) == (0, "")
    words = [word for word in line[:2] if not word.startswith("--")]
    assert said.out.startswith(f"usage: megamem {' '.join(words)} [-h]")
    flag, _ = LINES[line]
    assert f"\n  {flag} " in said.out


@pytest.mark.parametrize("name", ["plan", "convert", "bench", "tune", "doctor"])
def test_help_begins_with_what_the_command_is_for(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    description = importlib.import_module(COMMANDS[name][0]).__doc__
    assert description and description.partition("\n")[0] in capsys.readouterr().out


def test_the_launchers_flag_is_no_hint_elsewhere(capsys):
    assert main(["doctor", "--cpu"]) == 2
    assert _one_line(capsys) == "megamem: error: unrecognized arguments: --cpu\n"


def test_what_there_is_to_convert(capsys):
    assert main(["convert"]) == 2
    assert "required: CONVERSION" in _one_line(capsys)
    assert main(["convert", "exprot"]) == 2
    assert "invalid choice: 'exprot' (choose from" in _one_line(capsys)


@pytest.mark.parametrize(
    "line",
    [
        ("plan", "--preset", "134m"),
        ("bench", "--device=cpu"),
        ("bench", "--memory", "--device=cpu"),
    ],
    ids=" ".join,
)
def test_a_file_that_cannot_be_written(line, tmp_path, capsys, monkeypatch):
    """The error names the path; a command that takes long checks it before."""
    monkeypatch.setattr("megamem.tools.bench.measure", None)
    monkeypatch.setattr("megamem.tools.memory_bench.measure", None)
    monkeypatch.setattr("megamem.tools.plan.show_plan", lambda plan, console, asks: None)
    for path, why in (
        (tmp_path, "Is a directory"),
        (Path("/proc/nothing/plan.json"), "No such file or directory"),
    ):
        assert main([*line, "--json", str(path)]) == 2
        said = _one_line(capsys)
        assert said.startswith(f"megamem: error: {'/proc' if 'proc' in str(path) else path}")
        assert said.endswith(f": {why}\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigurationError("--a 1: no"), "--a 1: no"),
        (FileNotFoundError(2, "No such file", "x.json"), "x.json: No such file"),
        (OSError("git failed"), "git failed"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(error, said, capsys):
    def fail() -> int:
        raise error

    assert carry_out(fail) == 2
    assert _one_line(capsys) == f"megamem: error: {said}\n"


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        carry_out(lambda: 1 // 0)


@pytest.mark.parametrize("what", ["importing", "running"])
def test_an_interrupt_has_no_traceback(what, capsys, monkeypatch):
    def interrupt(*rest: object) -> int:
        raise KeyboardInterrupt

    if what == "importing":
        monkeypatch.setattr(importlib, "import_module", interrupt)
    else:
        monkeypatch.setattr(plan, "make_plan", interrupt)
    assert main(["plan", "--preset", "134m"]) == INTERRUPTED == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "words",
    [("--help",), ("doctor", "--help"), ("plan", "--preset", "1.3b", "--world-size", "64")],
    ids=" ".join,
)
def test_nobody_reads_on(words):
    """As in `megamem plan ... | head`, where Python buffers what is written to the pipe."""
    command = [sys.executable, "-m", "megamem", *words]
    buffered = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == CLOSED_PIPE
    for trace in ("Traceback", "BrokenPipe", "Exception ignored"):
        assert trace not in said, said


def test_run_as_a_module_and_as_a_command():
    for module in (["megamem", "run"], ["megamem.run"]):
        words = [sys.executable, "-m", *module, "nowhere.py"]
        result = subprocess.run(words, capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr.startswith("megamem: error: there is no script nowhere.py")


def test_evaluation_without_lm_eval_names_what_to_install(capsys, monkeypatch) -> None:
    monkeypatch.setattr(eval_harness, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        eval_harness.main(["--model", "megamem"])
    assert ended.value.code == 2
    assert "pip install 'megamem[eval]'" in capsys.readouterr().err
