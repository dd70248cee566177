"""A rank dies or a host is cut off: what the other ranks report, when, and how to resume."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megamem.megatron import launcher
from megamem.megatron.reports import lost_ranks
from tests.helpers.hosts import two_hosts, wait_for
from tests.helpers.megatron_runs import ITERATION, ROOT, command_line, run_training
from tests.helpers.warm_ranks import environment_of_runs
from tests.megatron.test_tiny_training import MEMORY, TP2, WIDE

GONE = re.compile(
    r"megamem: error( \(rank \d\))?: rank \d of 2 on \S+ stopped because a collective failed"
)


@pytest.fixture
def one_of_two(monkeypatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)


GLOO = "[/src/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.7]:37: Connection reset. GLHF!"
NCCL = "NCCL error in: /src/NCCLUtils.cpp:12, remote process exited or there was a network error"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError(GLOO), "(Read error [10.0.0.7]:37: Connection reset)"),
        (RuntimeError("[x.cc:1] Timed out waiting 60000ms for recv"), "(Timed out waiting 60000ms"),
        (dist.DistBackendError(NCCL), "remote process exited or there was a network error"),
        (dist.DistStoreError("wait timeout after 60000ms"), "(wait timeout after 60000ms)"),
    ],
)
@pytest.mark.usefixtures("one_of_two")
def test_what_backends_say_when_a_peer_is_gone(error: RuntimeError, says: str) -> None:
    message = lost_ranks.explain(error)
    assert message and "rank 1 of 2" in message and says in message
    assert "The run cannot resume, because --save was not given." in message


@pytest.mark.usefixtures("one_of_two")
def test_other_errors_are_left_alone(monkeypatch) -> None:
    assert lost_ranks.explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_ranks.explain(ValueError("connection reset")) is None
    assert lost_ranks.explain(torch.OutOfMemoryError("CUDA out of memory")) is None
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    assert lost_ranks.explain(RuntimeError(GLOO)) is None


@pytest.mark.gloo
def test_a_rank_that_dies_ends_the_others_at_once(tmp_path: Path) -> None:
    log = run_training(
        "killed",
        2,
        *(*MEMORY, *TP2, "--save", tmp_path, "--load", tmp_path, "--save-interval", 2),
        check=False,
        module="tests.helpers.faulty",
        environment={"FAULT": "kill 1 4"},
        cold=True,
    )
    # at once, and not after the time-out of two minutes of a collective
    assert log.returncode != 0 and log.seconds < 110
    said = [line for line in log.stdout.splitlines() if GONE.match(line)]
    assert len(said) == 1
    assert said[0].endswith("The same command resumes after iteration 2.")
    again = run_training("again", 2, *MEMORY, *TP2, "--load", tmp_path)
    assert again.iterations[0] == 3


@pytest.mark.gloo
@pytest.mark.slow
def test_two_hosts_train_together_and_survive_a_cut(tmp_path: Path) -> None:
    """The error comes within the time-out, and the resumed run ends like an uninterrupted one.

    It waits for a minute of time-out: bash tests/run.sh -m slow tests/megatron/test_lost_ranks.py
    """
    steps = ("--train-iters", 150, "--lr-decay-iters", 150, "--distributed-timeout-minutes", 1)
    saving = ("--save", tmp_path, "--load", tmp_path, "--save-interval", 50)
    words = command_line(*MEMORY, *WIDE, *steps, *saving)
    with two_hosts() as (head, other):
        for host in (head, other):
            host.start(head.address, *words)
        wait_for(other, " iteration       70/", seconds=200)
        head.cut_off()
        wait_for(other, "megamem: error", seconds=75, running=False)
        said = [line for line in other.text.splitlines() if GONE.match(line)]
        assert len(said) == 1, other.text
        assert said[0].endswith("The same command resumes after iteration 50.")
        # end the agent as a scheduler does; agents of torchrun wait longer than ranks
        for host in (head, other):
            host.kill()

        head.reconnect()
        for host in (head, other):
            host.start(head.address, *words)
        for host in (head, other):
            assert host.wait(200) == 0, host.text
        found = {int(match[1]): match[2] for match in ITERATION.finditer(other.text)}
    assert min(found) == 51 and max(found) == 150
    whole = run_training("uninterrupted", 2, *MEMORY, *WIDE, *steps)
    assert float(found[150]) == pytest.approx(whole.losses[-1], rel=2e-6)


# a process that hangs when Python exits, as with NCCL when it waits for a lost rank
HANGING = """
import atexit, os, sys, time
import torch, torch.distributed as dist

class NeverGone:
    def __del__(self):
        time.sleep(1000)

dist.init_process_group("gloo")
kept = NeverGone()
atexit.register(time.sleep, 1000)
atexit.register(print, "own exit function")
"""
LOSES = (
    HANGING
    + """
hook = sys.excepthook
sys.excepthook = lambda *error: (print("own hook", flush=True), hook(*error))
dist.all_reduce(torch.ones(1))
"""
)
FAILS = (
    "from megamem.megatron.launcher import attach; attach()"
    + HANGING
    + "raise KeyError('of this rank alone')"
)
OTHER = """
import os, signal
import torch.distributed as dist
dist.init_process_group("gloo")
os.kill(os.getpid(), signal.{})
"""


def _by_hand(folder: Path, program: str, signal: str, *words: object) -> tuple[int, str, float]:
    """Run this as rank 0 of two, the other of which gets a signal, without an agent to end it.

    Returns:
        Its exit status, what it said, and how many seconds after its last line it was gone.
    """
    script = folder / "script.py"
    script.write_text(program)
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    commands = ((*words, script), ("-c", OTHER.format(signal)))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-u", *map(str, command)],
            env=environment_of_runs(store | {"RANK": str(rank), "LOCAL_RANK": str(rank)}),
            stdout=subprocess.PIPE if rank == 0 else None,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank, command in enumerate(commands)
    ]
    try:
        said, last = [], time.monotonic()
        assert ranks[0].stdout is not None
        for line in ranks[0].stdout:
            if "own exit function" not in line:
                last = time.monotonic()
            said.append(line)
        status = ranks[0].wait(20)
        return status, "".join(said), time.monotonic() - last
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


AT_ONCE = lost_ranks.SECONDS_TO_TIDY + 10


@pytest.mark.gloo
def test_a_rank_leaves_within_seconds_of_its_line(tmp_path: Path) -> None:
    launched = ("-m", "megamem.run", "--cpu")
    status, said, seconds = _by_hand(tmp_path, LOSES, "SIGKILL", *launched)
    assert status == 2 and seconds < AT_ONCE, said
    places = [
        said.index(words)
        for words in ("own hook", "Traceback", "megamem: error: rank 0 of 2", "own exit function")
    ]
    assert places == sorted(places)


@pytest.mark.gloo
def test_so_does_a_rank_that_fails_itself_in_a_patched_script(tmp_path: Path) -> None:
    """The other rank does not move, like one that waits for this rank."""
    status, said, seconds = _by_hand(tmp_path, FAILS, "SIGSTOP")
    assert status == 1 and seconds < AT_ONCE, said
    assert said.count("KeyError: 'of this rank alone'") == 1 and "own exit function" in said


@pytest.fixture
def left(monkeypatch) -> list[int]:
    """Records exit statuses instead of ending this process."""
    statuses: list[int] = []
    monkeypatch.setattr(lost_ranks, "leave", statuses.append)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    return statuses


@pytest.mark.usefixtures("one_of_two")
def test_the_exit_status_is_what_it_would_have_been(left, capsys) -> None:
    shown: list[BaseException] = []

    def show(kind, error, trace) -> None:
        shown.append(error)
        raise RuntimeError("a hook that is broken itself")

    for code in (3, True, "why", None, 0):
        lost_ranks.end_process(SystemExit(code), show)
    assert left == [3, 1, 1] and not shown and capsys.readouterr().err == "why\n"
    lost_ranks.end_process(ZeroDivisionError("of zero"), show)
    assert left.pop() == 1 and len(shown) == 1
    assert "ZeroDivisionError: of zero" in capsys.readouterr().err
    lost_ranks.end_process(KeyboardInterrupt(), show)
    assert left.pop() == 130 and len(shown) == 2


@pytest.mark.usefixtures("one_of_two")
def test_a_debugger_and_a_lone_process_are_left_alone(left, monkeypatch) -> None:
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    lost_ranks.end_process(SystemExit(3), print)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    lost_ranks.end_process(SystemExit(3), print)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    lost_ranks.end_process(SystemExit(3), print)
    assert not left


@pytest.mark.usefixtures("one_of_two")
def test_a_caller_of_the_launcher_keeps_its_process(left, monkeypatch) -> None:
    def refuse(words: list[str]) -> None:
        raise SystemExit(2)

    monkeypatch.setattr(launcher, "_main", refuse)
    for ends_process, statuses in ((None, []), (False, []), (True, [2])):
        with pytest.raises(SystemExit):
            launcher.main(["script.py"], ends_process=ends_process)
        assert left == statuses


def test_an_exit_function_that_keeps_the_interpreter_cannot_keep_the_process() -> None:
    program = (
        "import atexit, ctypes; from megamem.megatron.reports import lost_ranks\n"
        "lost_ranks.SECONDS_TO_TIDY = 0.2\n"
        # a PyDLL call does not release the interpreter lock
        "atexit.register(ctypes.PyDLL(None).sleep, 1000)\n"
        "lost_ranks.leave(2)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120)
    assert done.returncode == 1


@pytest.mark.parametrize(("rank", "status", "said"), [(0, 0, "said\n"), (1, -signal.SIGTERM, "")])
def test_only_the_first_rank_speaks_while_it_is_being_ended(rank: int, status: int, said: str):
    code = (
        "import os, signal, sys, torch.distributed as dist\n"
        "from megamem.megatron.reports import lost_ranks\n"
        f"dist.get_rank = lambda: {rank}\n"
        "lost_ranks.finish_report()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('said', flush=True)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (status, said), run.stderr
