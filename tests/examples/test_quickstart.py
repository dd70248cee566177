"""The quickstart around its training run: where it writes, what it shows, how to go on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ITERATION = "iteration 1500/ 1500 | consumed samples: 48000 | lm loss: 1.234E+00 |"
PROBE = {
    "load": "",
    "iteration": 1500,
    "scores": [{"name": "capital", "asked": 4000, "right": 3000, "accuracy": 0.75, "chance": 0.01}],
    "totals": [{"name": "all", "asked": 4000, "right": 3000, "accuracy": 0.75, "chance": 0.01}],
    "samples": [{"question": "Capital of France?", "answer": "Paris", "model": "Paris"}],
}
# writes what the probe would have written, or logs what the training would have logged
TORCHRUN = f"""#!{sys.executable}
import json, sys
from pathlib import Path
words = dict(zip(sys.argv, sys.argv[1:]))
if "--probe-output" in words:
    probe = {PROBE!r} | {{"load": words["--load"]}}
    Path(words["--probe-output"]).write_text(json.dumps(probe))
else:
    print({ITERATION!r})
"""
PYTHON = f"""#!/bin/sh
case "$1" in *build_corpus.py) exit 0 ;; esac
exec {sys.executable} "$@"
"""


def _program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the examples whose environment trains nothing."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "examples/setup.sh").write_text("exit 0\n")
    _program(folder / ".venv/bin/torchrun", TORCHRUN)
    _program(folder / ".venv/bin/python", PYTHON)
    return folder


def _quickstart(checkout: Path, **environment: str) -> str:
    done = subprocess.run(
        ["bash", checkout / "examples/quickstart.sh"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "80", "MEGAMEM_RUN": "", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_result_is_shown_wherever_the_run_is(checkout: Path, tmp_path: Path) -> None:
    run = tmp_path / ("a long folder of runs " * 4).strip() / "and a name" / "quickstart"
    shown = _quickstart(checkout, MEGAMEM_RUN=str(run))
    assert json.loads((run / "probe.json").read_text())["scores"] == PROBE["scores"]
    assert f"{run}/checkpoints, iteration 1500: closed-book exact match" in shown
    assert "75.0%" in shown and "4,000" in shown
    assert "Capital of France? [Paris] model: Paris (right)" in shown
    # the command for going on finds the checkpoint of this run
    (command,) = [line for line in shown.splitlines() if "--train-iters 3000" in line]
    words = ["bash", "-c", f"{command.split('bash ')[0]} env"]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert f"MEGAMEM_RUN={run}\n" in told


def test_the_usual_folder_is_not_named_again(checkout: Path) -> None:
    shown = _quickstart(checkout)
    assert "    bash examples/quickstart.sh --train-iters 3000\n" in shown
    assert "runs/quickstart/checkpoints, iteration 1500" in shown and "75.0%" in shown
