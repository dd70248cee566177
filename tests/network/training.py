"""Trains a tiny model through Megatron's loop over the hosts, and in one process."""

import math
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.megatron_runs import ITERATION, command_line
from tests.network.cases import HOSTS, RANKS_PER_HOST, TRAINED
from tests.network.hosts import Host, ended

PORT, PATIENCE = 29531, 600.0
MEMORY = (
    *("--memory-layers", 0, 1),
    *("--memory-num-keys", 9),  # 81 rows, which no number of ranks divides
    *("--memory-heads", 2),
    *("--memory-topk", 4),
    *("--memory-lr", 3e-3),
)
OVER_HOSTS = ("--tensor-model-parallel-size", RANKS_PER_HOST, "--micro-batch-size", 1)
# Megatron prints six digits of a loss and four of a gradient norm
LOSS, NORM = 2e-6, 1.1e-3

Steps = list[tuple[float, float]]
"""Loss and gradient norm of each iteration."""


@dataclass(frozen=True)
class Training:
    """One run, compared with one process."""

    name: str
    steps: Steps
    problem: str
    """What differs, or empty."""
    seconds: float


def train(hosts: list[Host], folder: Path) -> list[Training]:
    """Train in one process, then each layout over the hosts."""
    command = ("megamem.run", *command_line(*MEMORY))
    alone = _train("one process", hosts[:1], command, folder / "training-alone", [])
    found = [alone]
    for case in TRAINED:
        agent = ("torch.distributed.run", "--nnodes", HOSTS, "--nproc-per-node", RANKS_PER_HOST)
        agent += ("--master-addr", hosts[0].address, "--master-port", PORT)
        command = (*agent, "-m", "megamem.run", *command_line(*MEMORY, *OVER_HOSTS, *case.flags))
        name = f"{case.name} {case.grid_text}, pieces {case.pieces}, {case.wire}"
        output = folder / f"training-{case.name}"
        found.append(_train(name, hosts, command, output, alone.steps))
    return found


def _train(
    name: str, hosts: list[Host], command: tuple[object, ...], output: Path, wanted: Steps
) -> Training:
    started = time.monotonic()
    outputs = [output.with_suffix(f".host{host.number}.txt") for host in hosts]
    processes = [
        host.start(_on_node(command, host), output)
        for host, output in zip(hosts, outputs, strict=True)
    ]
    problem = ""
    with ended(processes):
        for process in processes:
            try:
                process.wait(max(0.0, started + PATIENCE - time.monotonic()))
            except subprocess.TimeoutExpired:
                problem = f"was ended after {PATIENCE:.0f} s"
    # the last rank of the world logs, which is on the last host
    steps = steps_in(outputs[-1].read_text())
    if any(process.returncode for process in processes):
        problem = problem or f"failed; see {outputs[-1]}"
    elif len(hosts) > 1:
        problem = difference(steps, wanted)
    elif not steps:
        problem = f"logged no iteration; see {outputs[-1]}"
    return Training(name, steps, problem, time.monotonic() - started)


def _on_node(command: tuple[object, ...], host: Host) -> tuple[object, ...]:
    if command[0] != "torch.distributed.run":
        return command
    node = ("--node-rank", host.number, "--local-addr", host.address)
    return (command[0], *node, *command[1:])


def steps_in(text: str) -> Steps:
    """The loss and the gradient norm of each iteration that a run has printed."""
    return [(float(match[2]), float(match[3])) for match in ITERATION.finditer(text)]


def difference(steps: Steps, wanted: Steps) -> str:
    """Return the first iteration that differs, in words; empty if none does."""
    if len(steps) != len(wanted) or not steps:
        return f"{len(steps)} iterations, not {len(wanted)}"
    for number, (one, other) in enumerate(zip(steps, wanted, strict=True), 1):
        same = math.isclose(one[0], other[0], rel_tol=LOSS) and abs(one[1] - other[1]) < NORM
        if not same:
            return f"iteration {number}: loss and gradient norm {one}, in one process {other}"
    return ""
