"""Two hosts on one machine: network namespaces with addresses of their own, joined by a cable.

Where the machine does not allow namespaces, they are two agents on the loopback, and to cut one off
is to kill it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.megatron_runs import ROOT
from tests.helpers.warm_ranks import environment_of_runs

PORT = 29577


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(("ip", *words), check=check, capture_output=True, text=True)


@dataclass
class Host:
    """One of two."""

    number: int
    address: str
    namespace: str | None
    device: str
    process: subprocess.Popen | None = None
    output: Path = field(default_factory=Path)

    def start(self, head: str, *words: object) -> None:
        """An agent of torchrun with one rank."""
        self.output = Path(tempfile.mkstemp(suffix=f".host{self.number}")[1])
        rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{head}:{PORT}")
        command = (
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
            *("--nproc-per-node", "1", *rendezvous, "--rdzv-id", "two-hosts"),
            *("--rdzv-conf", f"is_host={int(self.address == head and self.number == 0)}"),
            *("--local-addr", self.address, "-m", "megamem.run", *map(str, words)),
        )
        inside = ("ip", "netns", "exec", self.namespace) if self.namespace else ()
        interface = {"GLOO_SOCKET_IFNAME": self.device}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                (*inside, *command),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment_of_runs(interface),
                start_new_session=True,
            )

    def cut_off(self) -> None:
        """Nothing leaves it or reaches it any more, and nobody is told."""
        if self.namespace:
            _ip("-n", self.namespace, "link", "set", self.device, "down")
        else:
            self.kill()

    def reconnect(self) -> None:
        if self.namespace:
            _ip("-n", self.namespace, "link", "set", self.device, "up")

    def kill(self) -> None:
        """The agent and its ranks."""
        if self.process and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait(self, seconds: float) -> int | None:
        """The agent's exit status, or None while it runs."""
        assert self.process
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text()


def wait_for(host: Host, words: str, seconds: float, running: bool = True) -> None:
    """Until the host has printed the words; where it is to be running, its end is a failure."""
    deadline = time.monotonic() + seconds
    while words not in host.text:
        assert time.monotonic() < deadline, f"no '{words}' after {seconds} s in\n{host.text}"
        ended = host.process is None or host.process.poll() is not None
        assert not (running and ended), f"it ended:\n{host.text}"
        time.sleep(0.05)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Both, stopped and taken down at the end."""
    mark = uuid.uuid4().hex[:6]
    names = [f"mm-{mark}-{number}" for number in range(2)]
    cable = [f"mm{mark}{number}" for number in range(2)]
    made = [name for name in names if _try("netns", "add", name)]
    isolated = len(made) == 2 and _try(
        *("link", "add", cable[0], "netns", names[0], "type", "veth"),
        *("peer", "name", cable[1], "netns", names[1]),
    )
    if isolated:
        hosts = [
            Host(number, f"10.77.0.{number + 1}", names[number], cable[number])
            for number in range(2)
        ]
        for host in hosts:
            assert host.namespace
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.device)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", host.namespace, "link", "set", host.device, "up")
    else:
        hosts = [Host(number, "127.0.0.1", None, "lo") for number in range(2)]
    try:
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.kill()
            host.output.unlink(missing_ok=True)
        for name in made:
            _ip("netns", "delete", name, check=False)


def _try(*words: str) -> bool:
    try:
        return _ip(*words, check=False).returncode == 0
    except FileNotFoundError:
        return False
