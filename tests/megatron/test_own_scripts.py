"""megamem's own training scripts need no Megatron-LM checkout, nor one of megamem."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megamem.megatron import launcher
from tests.helpers.megatron_runs import (
    ROOT,
    SCRIPT,
    TrainingLog,
    command_line,
    launch_warm,
    run_training,
)
from tests.helpers.warm_ranks import environment_of_runs
from tests.megatron.test_tiny_training import MEMORY

# the words of a run without those that only -m megamem.run has
WORDS = [str(word) for word in command_line(*MEMORY) if word not in ("--cpu", SCRIPT)]
# Megatron counts the layers of a pattern
AT = WORDS.index("--num-layers")
HYBRID = [*WORDS[:AT], *WORDS[AT + 2 :], "--hybrid-layer-pattern", "*-*-", "--memory-layers", "1"]
HYBRID += ["--spec", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]


@pytest.mark.gloo
def test_a_gpt_trains_as_through_the_launcher() -> None:
    log = launch_warm("own script", 2, "--cpu", *WORDS, module="megamem.pretrain_gpt")
    assert log.losses == run_training("through the launcher", 2, *MEMORY).losses
    assert "> megamem: layers 0, 1 are memory+" in log.stdout


@pytest.mark.parametrize("name", ["pretrain_gpt", "pretrain_hybrid"])
def test_the_script_is_found_and_gets_its_flags(monkeypatch, name: str) -> None:
    started = []
    monkeypatch.setattr(launcher, "main", lambda words, **more: started.append(words) or 0)
    module = __import__(f"megamem.{name}", fromlist=["main"])
    # --cpu may stand anywhere, as there is no script before which it would have to be
    assert module.main(["--lr", "1", "--cpu", "--min-lr", "0"]) == 0
    path = ROOT / "examples" / f"{name}.py"
    assert started == [["--cpu", str(path), "--lr", "1", "--min-lr", "0"]]
    assert path.is_file()


def test_an_installed_script_comes_first(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launcher, "HOMES_OF_SCRIPTS", (tmp_path / "examples", ROOT / "examples"))
    assert launcher.own_script("pretrain_gpt.py") == ROOT / "examples/pretrain_gpt.py"
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/pretrain_gpt.py").touch()
    assert launcher.own_script("pretrain_gpt.py") == tmp_path / "examples/pretrain_gpt.py"


@pytest.mark.slow
def test_an_installed_wheel_trains(tmp_path: Path) -> None:
    """python -m pytest -m slow tests/megatron/test_own_scripts.py; pip needs network access."""
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    wheels, installed = tmp_path / "wheels", tmp_path / "installed"
    # a copy, as the build writes beside the sources
    sources = tmp_path / "sources"
    for name in ("megamem", "examples", "patches"):
        shutil.copytree(ROOT / name, sources / name)
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, sources], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", installed, wheel], check=True)
    shutil.rmtree(sources)
    # -S, as the environment of the tests has this checkout installed
    paths = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    for name, words in (("pretrain_gpt", WORDS), ("pretrain_hybrid", HYBRID)):
        command = [sys.executable, "-S", "-m", f"megamem.{name}", "--cpu", *words]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**environment_of_runs(None), "PYTHONPATH": paths},
        )
        log = TrainingLog(name, command, done.returncode, done.stdout + done.stderr, 0)
        assert done.returncode == 0, log.tail()
        assert log.iterations == [1, 2, 3, 4, 5] and log.losses[-1] < log.losses[0]
