"""Starts runs of Megatron's training loop without torchrun, and parses their logs.

Under torchrun every rank needs its own GPU. Here two ranks share one: as their NCCL_HOSTID differs,
NCCL treats them as two hosts and connects them by sockets over the loopback interface.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megamem.ops.forms import FORMS
from tests.gpu.machine import ROOT
from tests.gpu.runner import end_marked

UNTRIED = ",".join(
    f"{op}={name}"
    for op, choices in FORMS.items()
    for name, form in list(choices.items())[-1:]
    if form.record is None
)
"""Selects the last form of every op if it has never run on a GPU."""

SCRIPT = ROOT / "examples" / "pretrain_gpt.py"
MARK = "MEGAMEM_GPU_RUN_MARK"
# flags for Megatron without Transformer Engine and Apex, and for CPUs
WITHOUT_ENGINES = (
    *("--transformer-impl", "local"),
    *("--no-rope-fusion", "--no-gradient-accumulation-fusion"),
    *("--no-persist-layer-norm", "--no-masked-softmax-fusion"),
)
USUAL = (
    *("--tokenizer-type", "NullTokenizer", "--mock-data", "--split", "8,1,1"),
    *("--position-embedding-type", "rope", "--attention-dropout", 0, "--hidden-dropout", 0),
    *("--eval-interval", 1000, "--eval-iters", 1, "--log-interval", 1, "--num-workers", 0),
    *("--weight-decay", 0.1, "--clip-grad", 1.0, "--lr-warmup-iters", 1),
    *("--distributed-timeout-minutes", 2, "--disable-bias-linear"),
    "--no-ckpt-fully-parallel-save",
)
ITERATION = re.compile(
    r"iteration +(\d+)/ *\d+ .*? elapsed time per iteration \(ms\): (\S+)"
    r" .*? lm loss: (\S+) .*? grad norm: (\S+)"
)
ERROR_LINE = "megamem: error"
PEAK = re.compile(r"max allocated: ([\d.]+)")


@dataclass(frozen=True)
class Run:
    """A run of several ranks that can be started."""

    name: str
    ranks: int
    words: Sequence[object]
    """Flags of Megatron and megamem, or of the module."""

    module: str = "megamem.run"
    environment: dict[str, str] = field(default_factory=dict)
    cpu: bool = False
    """Whether it runs on the CPU, over gloo."""

    may_fail: bool = False
    script: Path | None = SCRIPT
    """None: the module does not train with Megatron, and gets no flags but `words`."""

    engines: Sequence[object] = WITHOUT_ENGINES
    """Flags that select Megatron's kernels."""


@dataclass(frozen=True)
class Log:
    """The result of a run."""

    run: Run
    statuses: list[int | None]
    """Exit status of each rank; None if it had to be killed."""

    stdout: str
    """Output of all ranks."""

    seconds: float
    ended_at: list[float]
    """Seconds from the start until each rank had ended."""

    error_at: float | None
    """Seconds from the start until megamem's error line appeared."""

    @property
    def losses(self) -> dict[int, float]:
        """Iteration -> training loss; the second that a run logs is the mean of its first two."""
        return {int(m[1]): float(m[3]) for m in ITERATION.finditer(self.stdout)}

    @property
    def milliseconds(self) -> list[float]:
        """Milliseconds of every iteration."""
        return [float(m[2]) for m in ITERATION.finditer(self.stdout)]

    @property
    def peak_gib(self) -> float | None:
        """Peak of the memory that torch has allocated, as Megatron reports it."""
        found = [float(m[1]) for m in PEAK.finditer(self.stdout)]
        return round(max(found) / 1024, 2) if found else None

    @property
    def failure(self) -> str:
        """Why the run failed, in one line; empty if every rank ended with status 0."""
        if self.run.may_fail or all(status == 0 for status in self.statuses):
            return ""
        lines = [line for line in self.stdout.splitlines() if re.search(r"[Ee]rror\b", line)]
        why = lines[-1].strip() if lines else "no error was logged"
        return f"{self.run.name} ended with status {self.statuses}: {why}"[:300]


def launch(run: Run, folder: Path, timeout: float) -> Log:
    """Start all ranks, wait for them, and kill all processes that are left.

    The output of all ranks is also written to FOLDER/NAME.log.
    """
    mark, started = uuid.uuid4().hex, time.monotonic()
    path = folder / f"{re.sub(r'[^a-z0-9]+', '_', run.name.lower())}.log"
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    with path.open("w") as output:
        processes = [
            subprocess.Popen(
                _command(run),
                cwd=ROOT,
                env=_environment(run, rank, port) | {MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for rank in range(run.ranks)
        ]
    ended: dict[int, float] = {}
    error_at = None
    while len(ended) < run.ranks and time.monotonic() - started < timeout:
        for rank, process in enumerate(processes):
            if rank not in ended and process.poll() is not None:
                ended[rank] = time.monotonic() - started
        if error_at is None and ERROR_LINE in path.read_text(errors="replace"):
            error_at = time.monotonic() - started
        failed = any(process.returncode not in (None, 0) for process in processes)
        if failed and not run.may_fail:
            # the other ranks would wait for the failed one
            break
        time.sleep(0.05)
    statuses = [process.poll() for process in processes]
    # the checkpoint writers of a killed rank would wait forever
    end_marked(MARK, mark)
    for process in processes:
        process.wait()
    seconds = time.monotonic() - started
    text = path.read_text(errors="replace")
    times = [ended.get(rank, seconds) for rank in range(run.ranks)]
    return Log(run, statuses, text, seconds, times, error_at)


def _command(run: Run) -> list[str]:
    if run.script is None:
        return [sys.executable, "-u", "-m", run.module, *map(str, run.words)]
    # force runs on the CPU even if there is a GPU
    launcher = [run.module, *(["--cpu=force"] if run.cpu else [])]
    return [
        *(sys.executable, "-u", "-m", *launcher, str(run.script)),
        *map(str, (*USUAL, *run.engines, *run.words)),
    ]


def _environment(run: Run, rank: int, port: int) -> dict[str, str]:
    found = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    found |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(run.ranks),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        # Megatron requires it for tensor parallelism on GPUs from before 2024
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "NCCL_HOSTID": f"megamem-{port}-{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
    }
    return found | run.environment


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
