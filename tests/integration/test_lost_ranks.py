"""A rank that dies, a host that is cut off: what the others say, when, and how the run goes on."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megamem.integration import lost_ranks
from tests.helpers.hosts import two_hosts, wait_for
from tests.helpers.megatron_runs import ITERATION, command_line, run_training
from tests.integration.test_tiny_training import MEMORY, TP2, WIDE

GONE = re.compile(
    r"megamem: error( \(rank \d\))?: rank \d of 2 on \S+ stopped: a collective failed"
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
    assert "Without --save there is nothing to go on from." in message


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
    # at once, not after the two minutes that a collective may take
    assert log.returncode != 0 and log.seconds < 110
    said = [line for line in log.stdout.splitlines() if GONE.match(line)]
    assert len(said) == 1
    assert said[0].endswith("The same command goes on after iteration 2.")
    again = run_training("again", 2, *MEMORY, *TP2, "--load", tmp_path)
    assert again.iterations[0] == 3


@pytest.mark.gloo
def test_two_hosts_train_together_and_survive_a_cut(tmp_path: Path) -> None:
    """The error comes within the timeout, and the resumed run ends like an uninterrupted one."""
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
        assert said[0].endswith("The same command goes on after iteration 50.")
        # what a scheduler does now; torchrun's agents wait longer for each other than ranks do
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
