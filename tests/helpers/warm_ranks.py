"""Ranks forked from a process that has Megatron imported: importing is most of a short run.

    with a server:  python -m tests.helpers.warm_ranks, one per test process
    a request:      one JSON line on its standard input (see Request)
    its answer:     two lines, the run's session, then its exit status

A rank does what `python -m MODULE WORDS...` does under torchrun, in an environment of its own. What
is imported but changes nothing yet: the CPU runtime is installed, megamem's hooks are not.
"""

import atexit
import contextlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import psutil

SECONDS_TO_LEAVE = 8.0
"""What the other ranks get when one has failed, before they are killed."""


def environment_of_runs(added: dict[str, str] | None = None) -> dict[str, str]:
    """This process's, and what is added, for a rank."""
    # the interpreter of the tests' own kernels is not part of a run
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return {**inherited, "OMP_NUM_THREADS": "1", **(added or {})}


@dataclass(frozen=True)
class Request:
    """One run."""

    module: str
    words: list[str]
    ranks: int
    environment: dict[str, str]
    folder: str
    output: str
    """The file that takes what all ranks print."""


class Server:
    """The other side: asks for runs, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=folder,
            env=environment_of_runs(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        atexit.register(self.process.kill)

    def run(self, request: Request, timeout: float) -> tuple[int, str]:
        """The run's exit status, and what to add to its output if it had to be ended."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(asdict(request)) + "\n")
        session = int(self.process.stdout.readline())
        late = ""
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            late = f"\nended by the test after {timeout:.0f} s"
            _end_session(session)
        status = int(self.process.stdout.readline())
        # a killed rank's checkpoint writers wait for it forever
        _end_session(session)
        return status, late


@cache
def server(folder: Path) -> Server:
    """The one of this test process."""
    return Server(folder)


def _end_session(session: int) -> None:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session:
                process.kill()


def serve() -> Callable[[], NoReturn] | None:
    """Answer requests until there are no more; in a rank, return what it has to run."""
    for line in sys.stdin:
        request = Request(**json.loads(line))
        supervisor = os.fork()
        if supervisor == 0:
            os.setsid()
            return _supervise(request)
        sys.stdout.write(f"{supervisor}\n")
        sys.stdout.flush()
        _, status = os.waitpid(supervisor, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
    return None


def _supervise(request: Request) -> Callable[[], NoReturn]:
    """Fork the ranks and, as torchrun does, end them all when one has failed."""
    output = os.open(request.output, os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    port = _free_port()
    running: dict[int, int] = {}
    for rank in range(request.ranks):
        child = os.fork()
        if child == 0:
            _become(request, rank, port)
            return lambda: _run(request)
        running[child] = rank
    failed, deadline = 0, float("inf")
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in running:
            code = os.waitstatus_to_exitcode(status)
            # torchrun says 1 whatever it was
            first = code != 0 and not failed
            failed = failed or (code if request.ranks == 1 else int(code != 0))
            del running[child]
            if first:
                deadline = time.monotonic() + SECONDS_TO_LEAVE
                _signal(running, signal.SIGTERM)
        elif child == 0:
            if time.monotonic() > deadline:
                _signal(running, signal.SIGKILL)
            time.sleep(0.02)
    os._exit(failed if failed >= 0 else 128 - failed)


def _signal(running: dict[int, int], number: signal.Signals) -> None:
    for child in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)


def _free_port() -> int:
    # below those that connections are given, one of which might take it before the ranks do
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _become(request: Request, rank: int, port: int) -> None:
    # over what the CPU runtime has set
    os.environ.update(request.environment)
    if request.ranks > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(request.ranks),
            # a run may pretend that its ranks are on several nodes
            LOCAL_WORLD_SIZE=request.environment.get("LOCAL_WORLD_SIZE", str(request.ranks)),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    os.chdir(request.folder)


def _run(request: Request) -> NoReturn:
    sys.argv = [request.module, *request.words]
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    raise SystemExit(0)


def _import() -> None:
    from megamem.cpu import runtime as cpu_runtime

    cpu_runtime.install(force=True)
    from megatron.core.datasets import blended_megatron_dataset_builder, gpt_dataset  # noqa: F401
    from torch.utils import tensorboard  # noqa: F401

    from megamem.megatron import patches  # noqa: F401


if __name__ == "__main__":
    _import()
    if (rank := serve()) is not None:
        rank()
