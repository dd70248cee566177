"""A training run of Megatron's own loop, small enough for a test, and what it logged.

    log = run_training("tp2", 2, "--tensor-model-parallel-size", "2")
    assert log.losses[-1] < log.losses[0]

The second loss of a run is the mean of its first two iterations (Megatron does not reset its sum
after the first), so comparisons look at whole lists or at later iterations.
"""

import contextlib
import re
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.helpers.warm_ranks import Request, environment_of_runs, server

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "pretrain_gpt.py"
TIMEOUT = 240.0
MARK = "MEGAMEM_TEST_RUN"
"""Variable that every process of a run inherits."""

MODEL = {
    "--num-layers": 4,
    "--hidden-size": 64,
    "--num-attention-heads": 4,
    "--ffn-hidden-size": 128,
    "--seq-length": 32,
    "--max-position-embeddings": 32,
    "--position-embedding-type": "rope",
    "--attention-dropout": 0,
    "--hidden-dropout": 0,
}
TRAINING = {
    "--micro-batch-size": 2,
    "--global-batch-size": 4,
    "--train-iters": 5,
    "--lr": 1e-3,
    "--min-lr": 1e-4,
    "--lr-decay-iters": 5,
    "--lr-warmup-iters": 1,
    "--weight-decay": 0.1,
    "--clip-grad": 1.0,
    "--tokenizer-type": "NullTokenizer",
    "--vocab-size": 127,
    # Megatron's 128 times the tensor-parallel size would give every layout another vocabulary
    "--make-vocab-size-divisible-by": 32,
    "--eval-interval": 100,
    "--eval-iters": 1,
    "--log-interval": 1,
    "--num-workers": 0,
    "--distributed-timeout-minutes": 2,
}
MOCK_DATA = ("--mock-data", "--split", "8,1,1")
SWITCHES = ("--disable-bias-linear", "--no-ckpt-fully-parallel-save")

SKIPPED = re.compile(r"number of skipped iterations: +(\d+)")
ITERATION = re.compile(r"iteration +(\d+)/ *\d+ .*? lm loss: (\S+) .*? grad norm: (\S+)")
PARAMETERS = re.compile(r"number of parameters on \(.*?\) model parallel rank \((.*?)\): (\d+)")
VALIDATION = re.compile(r"validation loss at .*? on (\w+) set \| lm loss value: (\S+)")


@dataclass(frozen=True)
class TrainingLog:
    """What a run printed, on all ranks, and the figures in it."""

    name: str
    command: list[str]
    returncode: int
    stdout: str
    seconds: float

    @property
    def iterations(self) -> list[int]:
        """The iterations that were logged."""
        return [int(match[1]) for match in ITERATION.finditer(self.stdout)]

    @property
    def losses(self) -> list[float]:
        """One training loss per logged iteration."""
        return [float(match[2]) for match in ITERATION.finditer(self.stdout)]

    @property
    def grad_norms(self) -> list[float]:
        """One gradient norm per logged iteration, before clipping."""
        return [float(match[3]) for match in ITERATION.finditer(self.stdout)]

    @property
    def skipped(self) -> list[int]:
        """Batches that were skipped, per logged iteration."""
        return [int(match[1]) for match in SKIPPED.finditer(self.stdout)]

    @property
    def parameters(self) -> dict[tuple[int, int], int]:
        """(tensor, pipeline) rank -> parameters it holds."""
        found = {}
        for match in PARAMETERS.finditer(self.stdout):
            tensor, *_, pipeline = map(int, match[1].split(","))
            found[tensor, pipeline] = int(match[2])
        return found

    @property
    def validation(self) -> dict[str, float]:
        """Set ("validation", "test") -> its last loss."""
        return {match[1]: float(match[2]) for match in VALIDATION.finditer(self.stdout)}

    def tail(self, lines: int = 60) -> str:
        """The end of what was printed, after the command."""
        text = "\n".join(self.stdout.splitlines()[-lines:])
        return f"{self.name} ended with {self.returncode}:\n{' '.join(self.command)}\n...\n{text}"


def launch(
    name: str,
    nproc: int,
    *words: object,
    check: bool = True,
    environment: dict[str, str] | None = None,
    module: str = "megamem.run",
) -> TrainingLog:
    """Run `-m MODULE WORDS...` on nproc ranks, under torchrun when they are several."""
    __tracebackhide__ = True
    ranks = ["torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "-m"]
    modules = [*(ranks if nproc > 1 else []), module]
    command = [sys.executable, "-m", *modules, *map(str, words)]
    started, mark = time.monotonic(), uuid.uuid4().hex
    # a file, as a pipe would be held open by whoever outlives the run
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment_of_runs(environment) | {MARK: mark},
        )
        late = ""
        try:
            process.wait(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            late = f"\nended by the test after {TIMEOUT:.0f} s"
        _end_all(mark)
        process.wait()
        output.seek(0)
        stdout = output.read() + late
    seconds = time.monotonic() - started
    return _checked(TrainingLog(name, command, process.returncode, stdout, seconds), check)


def launch_warm(
    name: str,
    nproc: int,
    *words: object,
    check: bool = True,
    environment: dict[str, str] | None = None,
    module: str = "megamem.run",
) -> TrainingLog:
    """launch(), on ranks that have Megatron imported already."""
    __tracebackhide__ = True
    started = time.monotonic()
    with tempfile.NamedTemporaryFile("r") as output:
        request = Request(
            module=module,
            words=[*map(str, words)],
            ranks=nproc,
            environment=environment_of_runs(environment),
            folder=str(ROOT),
            output=output.name,
        )
        status, late = server(ROOT).run(request, TIMEOUT)
        stdout = output.read() + late
    command = [f"{nproc} x python -m", module, *request.words]
    log = TrainingLog(name, command, status, stdout, time.monotonic() - started)
    return _checked(log, check)


def _checked(log: TrainingLog, check: bool) -> TrainingLog:
    __tracebackhide__ = True
    if check and log.returncode != 0:
        pytest.fail(log.tail(), pytrace=False)
    return log


def _end_all(mark: str) -> None:
    """End what a run left behind: a killed rank's checkpoint writers wait for it forever."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                process.kill()


def run_training(
    name: str,
    nproc: int,
    *flags: object,
    script: Path = SCRIPT,
    check: bool = True,
    data: tuple[object, ...] = MOCK_DATA,
    module: str = "megamem.run",
    environment: dict[str, str] | None = None,
    cold: bool = False,
) -> TrainingLog:
    """Train a tiny GPT on the CPU through the launcher; later flags overrule the usual ones.

    Args:
        name: what a failure calls the run.
        nproc: ranks.
        script: the training script, by default examples/pretrain_gpt.py.
        check: a run that fails, fails the test.
        data: the flags that say what to train on.
        module: what is launched; megamem.run, or a stand-in with its command line.
        environment: variables for it.
        cold: in processes that are started as a user starts them, by torchrun.
    """
    __tracebackhide__ = True
    words = command_line(*flags, script=script, data=data)
    start = launch if cold else launch_warm
    return start(name, nproc, *words, check=check, module=module, environment=environment)


def command_line(
    *flags: object,
    script: Path = SCRIPT,
    data: tuple[object, ...] = MOCK_DATA,
) -> tuple[object, ...]:
    """The words of such a run, behind `megamem.run`."""
    usual = [word for pair in (MODEL | TRAINING).items() for word in pair]
    return ("--cpu", script, *usual, *SWITCHES, *data, *flags)
