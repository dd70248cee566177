"""Subcommands of megamem, carried out in this process, and scripts that torchrun starts."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megamem.__main__ import Parser, main
from tests.helpers.warm_ranks import environment_of_runs

ROOT = Path(__file__).parents[2]


def command(name: str) -> Callable[[Sequence[str]], int]:
    """Words of a command line -> exit status."""
    return lambda words: main([name, *words])


def parser_of(name: str) -> Parser:
    """An empty parser of a subcommand, which raises its errors."""
    return Parser(prog=f"megamem {name}", add_help=False)


def under_torchrun(
    ranks: int,
    *words: object,
    python: str | Path = sys.executable,
    timeout: float = 300,
    check: bool = True,
) -> str:
    """What a script prints, on all of its ranks."""
    torchrun = [python, "-m", "torch.distributed.run", "--nproc-per-node", ranks]
    command = [*torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *words]
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
        env=environment_of_runs(),
    )
    assert not check or done.returncode == 0, done.stdout[-4000:]
    return done.stdout
