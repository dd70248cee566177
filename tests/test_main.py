import importlib
import subprocess
import sys

import pytest

from megamem import __version__
from megamem.__main__ import COMMANDS, main


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
    said = capsys.readouterr().err
    assert said.startswith(f"megamem: error: unknown command {name}{hint}; there is: run")
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main(name, monkeypatch):
    module = importlib.import_module(COMMANDS[name][0])
    monkeypatch.setattr(module, "main", lambda words: words)
    assert main([name, "--a", "b"]) == ["--a", "b"]


def test_run_as_a_module_and_as_a_command():
    for module in (["megamem", "run"], ["megamem.run"]):
        words = [sys.executable, "-m", *module, "nowhere.py"]
        result = subprocess.run(words, capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr.startswith("megamem: error: no script at nowhere.py")
