"""The scripts of examples/cluster, with stand-ins for torchrun and srun that say what they got."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.megatron_runs import ROOT

CLUSTER = ROOT / "examples" / "cluster"
SIZES = {"134m": ["1m", "4m", "16m", "64m"]}
SIZES |= dict.fromkeys(["373m", "1.3b"], SIZES["134m"]) | {"8b": ["16m"]}


@dataclass(frozen=True)
class Started:
    """What a script handed to torchrun or srun."""

    words: list[str]
    environment: dict[str, str]

    @property
    def flags(self) -> list[str]:
        """After the training script."""
        (script,) = [place for place, word in enumerate(self.words) if word.endswith("_gpt.py")]
        return self.words[script + 1 :]

    def value(self, flag: str) -> str:
        assert self.words.count(flag) == 1, flag
        return self.words[self.words.index(flag) + 1]


def stand_ins(tmp_path: Path) -> Callable[..., Any]:
    """Runs a script of the cluster, giving a Started, or what it said when it started nothing."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("torchrun", "srun"):
        stand_in(programs / name, 'printf "%s\\0" "$@" >"$CAPTURE"; env -0 >"$CAPTURE.env"')
    stand_in(
        programs / "scontrol", 'test "$1 $2" = "show hostnames" && seq -f "node%02.0f" 7 20006'
    )

    def run(script: str, *words: str, **environment: object) -> Started | str:
        capture = tmp_path / "capture"
        capture.unlink(missing_ok=True)
        usual = {
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            # an environment is active: the script looks for no other
            "VIRTUAL_ENV": str(Path(sys.executable).parents[1]),
            "CAPTURE": str(capture),
            "DATA": "mock",
            "RUN": str(tmp_path / "run"),
        }
        settings = usual | {name: str(value) for name, value in environment.items()}
        settings = {name: value for name, value in settings.items() if value}
        result = subprocess.run(
            ["bash", str(CLUSTER / script), *words],
            cwd=tmp_path,
            env={"HOME": os.environ.get("HOME", "/"), **settings},
            capture_output=True,
            text=True,
        )
        if result.returncode:
            assert not capture.exists()
            return result.stdout + result.stderr
        if not capture.exists():
            return result.stdout
        pairs = (tmp_path / "capture.env").read_text().split("\0")[:-1]
        return Started(
            capture.read_text().split("\0")[:-1], dict(pair.split("=", 1) for pair in pairs)
        )

    return run


def stand_in(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def fewest(model: str, rows: str, lean: bool = False) -> int:
    """GPUs that a model's file says are needed."""
    text = (CLUSTER / "models" / f"{model}.sh").read_text()
    if rows == "dense":
        return int(re.search(r"^tensor_parallel=(\d+)", text, re.MULTILINE)[1])
    line = re.search(rf"^{'lean' if lean else 'least'}=\((.*)\)", text, re.MULTILINE)[1]
    return int(dict(re.findall(r"\[(\w+)\]=(\d+)", line))[rows])


def on(gpus: int) -> dict[str, object]:
    """The settings for so many GPUs, eight in a node."""
    return {"GPUS": min(gpus, 8), "NODES": max(1, gpus // 8), "HEAD": "node07"}
