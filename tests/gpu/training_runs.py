"""Runs of Megatron's training loop whose ranks are started by hand, and what they logged.

torchrun gives every rank a GPU of its own. Here two ranks share one: NCCL takes them for two hosts,
as each has another NCCL_HOSTID, and joins them by sockets over the loopback.
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

from tests.gpu.machine import ROOT
from tests.gpu.runner import end_marked

SCRIPT = ROOT / "examples" / "pretrain_gpt.py"
MARK = "MEGAMEM_GPU_RUN_MARK"
# Megatron without Transformer Engine and Apex, and on a CPU
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
    """What is to be started."""

    name: str
    ranks: int
    words: Sequence[object]
    """Megatron's flags and megamem's."""

    module: str = "megamem.run"
    environment: dict[str, str] = field(default_factory=dict)
    cpu: bool = False
    """On the CPU, over gloo."""

    may_fail: bool = False
    script: Path = SCRIPT
    engines: Sequence[object] = WITHOUT_ENGINES
    """Flags that say whose kernels there are."""


@dataclass(frozen=True)
class Log:
    """How it went."""

    run: Run
    statuses: list[int | None]
    """Of each rank; None where it had to be ended."""

    stdout: str
    """Of all ranks."""

    seconds: float
    ended_at: list[float]
    """Seconds from the start until each rank had left."""

    error_at: float | None
    """Seconds from the start until megamem's own error line was seen."""

    @property
    def losses(self) -> dict[int, float]:
        """Iteration -> training loss; the second that a run logs is the mean of its first two."""
        return {int(m[1]): float(m[3]) for m in ITERATION.finditer(self.stdout)}

    @property
    def milliseconds(self) -> list[float]:
        """Of every iteration."""
        return [float(m[2]) for m in ITERATION.finditer(self.stdout)]

    @property
    def peak_gib(self) -> float | None:
        """The most that torch had allocated, as Megatron reports it after the first iteration."""
        found = [float(m[1]) for m in PEAK.finditer(self.stdout)]
        return round(max(found) / 1024, 2) if found else None

    @property
    def failure(self) -> str:
        """Why it cannot be used, in a line; empty where every rank left with 0."""
        if self.run.may_fail or all(status == 0 for status in self.statuses):
            return ""
        lines = [line for line in self.stdout.splitlines() if re.search(r"[Ee]rror\b", line)]
        why = lines[-1].strip() if lines else "nothing was said of an error"
        return f"{self.run.name} ended with {self.statuses}: {why}"[:300]


def launch(run: Run, folder: Path, timeout: float) -> Log:
    """Start all ranks, wait for them, and end whatever is left of them.

    The output of all of them also goes to FOLDER/NAME.log.
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
            # the others would wait for the one that is gone
            break
        time.sleep(0.05)
    statuses = [process.poll() for process in processes]
    # a killed rank's checkpoint writers wait for it forever
    end_marked(MARK, mark)
    for process in processes:
        process.wait()
    seconds = time.monotonic() - started
    text = path.read_text(errors="replace")
    times = [ended.get(rank, seconds) for rank in range(run.ranks)]
    return Log(run, statuses, text, seconds, times, error_at)


def _command(run: Run) -> list[str]:
    # also where there is a GPU
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
        # before GPUs of 2024, Megatron insists on it for tensor parallelism
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
