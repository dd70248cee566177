"""Four hosts on one machine: network namespaces on one bridge, with shaped links between them.

    host 0   eth0 10.78.0.1 --tbf--    --tbf-- port0 \
    host 1   eth0 10.78.0.2 --tbf--    --tbf-- port1  bridge
    ...                                              /

Both ends of a host's cable are shaped, so that it neither sends nor receives faster. Two processes
of one host reach each other by its own address, which the kernel sends over its loopback: that is
not shaped, and its counter is the number of bytes that stay inside.

The bridge is in the namespace of the caller, which has to be one of its own (tests/network.sh): it
goes with everything in it when the last process ends.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.network.cases import HOSTS, RANKS_PER_HOST

ROOT = Path(__file__).parents[2]
DEVICE, LOOPBACK = "eth0", "lo"
# few large packets, as 8 ranks share few cores; what does not fit a burst is cut into packets
MTU, BURST, QUEUE = 9000, "64kb", "4mb"
# a connection that was idle goes on at the rate that it had
KEEP_RATE = "/proc/sys/net/ipv4/tcp_slow_start_after_idle"


class NotAllowed(Exception):
    """This machine does not let us make hosts; the text says why."""


@dataclass(frozen=True)
class Host:
    """One of the four."""

    number: int

    @property
    def namespace(self) -> str:
        """Its network namespace."""
        return f"host{self.number}"

    @property
    def address(self) -> str:
        """Its address on the bridge."""
        return f"10.78.0.{self.number + 1}"

    def start(self, words: tuple[object, ...], output: Path) -> subprocess.Popen:
        """Start a Python module there, whose gloo uses the shaped device."""
        own = {"GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
        command = ("ip", "netns", "exec", self.namespace, sys.executable, "-m", *map(str, words))
        with output.open("w") as file:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | own,
            )


def make_hosts(mbit: int) -> list[Host]:
    """Make them, and shape their links.

    Args:
        mbit: Mbit/s that a host sends, and that it receives.

    Raises:
        NotAllowed: the kernel refuses.
    """
    # names of namespaces are files, which the caller's own /run keeps from the machine's
    _run("mount", "-t", "tmpfs", "hosts", "/run")
    _run("ip", "link", "set", LOOPBACK, "up")
    _run("ip", "link", "add", "bridge", "type", "bridge")
    _run("ip", "link", "set", "bridge", "mtu", MTU, "up")
    hosts = [Host(number) for number in range(HOSTS)]
    shape = ("root", "tbf", "rate", f"{mbit}mbit", "burst", BURST, "limit", QUEUE)
    for host in hosts:
        inside, port = ("-n", host.namespace), f"port{host.number}"
        _run("ip", "netns", "add", host.namespace)
        cable = ("type", "veth", "peer", "name", DEVICE, "mtu", MTU, "netns", host.namespace)
        _run("ip", "link", "add", port, "mtu", MTU, *cable)
        _run("ip", "link", "set", port, "master", "bridge", "up")
        _run("ip", *inside, "addr", "add", f"{host.address}/24", "dev", DEVICE)
        for device in (LOOPBACK, DEVICE):
            _run("ip", *inside, "link", "set", device, "up")
        _run("tc", *inside, "qdisc", "add", "dev", DEVICE, *shape)
        _run("tc", "qdisc", "add", "dev", port, *shape)
        _run("ip", "netns", "exec", host.namespace, "sh", "-c", f"echo 0 >{KEEP_RATE}")
    return hosts


def _run(*words: object) -> None:
    command = [*map(str, words)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as missing:
        raise NotAllowed(f"there is no `{command[0]}`; install iproute2") from missing
    except subprocess.CalledProcessError as refused:
        said = refused.stderr.strip() or f"exit status {refused.returncode}"
        raise NotAllowed(f"`{' '.join(command)}` said: {said}") from refused


@contextlib.contextmanager
def ended(processes: list[subprocess.Popen]) -> Iterator[None]:
    """End the processes that still run at the end."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def host_of(rank: int) -> int:
    """The number of a rank's host."""
    return rank // RANKS_PER_HOST


def sent_bytes(table: str) -> dict[str, int]:
    """Read the bytes that every device has sent.

    Args:
        table: /proc/net/dev.

    Returns:
        Device -> bytes.
    """
    lines = (line.partition(":") for line in table.splitlines() if ":" in line)
    # eight numbers about what was received come first
    return {name.strip(): int(numbers.split()[8]) for name, _, numbers in lines}
