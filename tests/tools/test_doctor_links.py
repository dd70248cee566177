"""megamem doctor: the links that it measures between ranks, and the layout that suits them."""

import os
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megamem.tools import doctor, doctor_links, support
from megamem.tools.doctor_finding import Finding
from megamem.tools.doctor_links import (
    Rates,
    TableSize,
    advice,
    links_check,
    node_lists,
    suitable_layout,
    table_size,
)
from tests.helpers.commands import parser_of
from tests.helpers.distributed import run_distributed
from tests.helpers.megatron_runs import ROOT

CPU = torch.device("cpu")
SIZE = 2**16
SMALL = TableSize(width=64, lookups=8, number_bytes=4)
ROWS = [
    "all-gather inside a node",
    "all-to-all inside a node",
    "all-gather between nodes",
    "all-to-all between nodes",
]


def test_nodes_are_told_apart_by_the_launcher_or_by_their_hosts() -> None:
    assert node_lists([2, 2, 2, 2], ["a"] * 4) == [[0, 1], [2, 3]]
    # without a launcher that says so, also where ranks are dealt to hosts in turn
    assert node_lists([None] * 4, ["a", "b", "a", "b"]) == [[0, 2], [1, 3]]
    assert node_lists([2, 2, None, None], ["a", "a", "b", "b"]) == [[0, 1], [2, 3]]


def test_a_slow_network_gets_another_layout() -> None:
    table = TableSize()
    fast, slow = (suitable_layout(Rates(350e9, across), 16, 8, table) for across in (3.5e12, 10e9))
    assert fast != slow and fast.group_size == slow.group_size == 128
    said = advice(Rates(350e9, 10e9), 16, 8, table)
    assert said.is_line and said.found.startswith(slow.flags)
    assert "suits 350 GB/s inside a node and 10 GB/s between nodes" in said.found
    assert "rows of 2048 numbers of 2 bytes and 128 lookups per token, over 128 ranks" in said.found


def test_one_link_may_be_missing() -> None:
    alone = advice(Rates(2e9, None), 1, 4, SMALL)
    assert "suits 2 GB/s inside a node, for" in alone.found
    apart = advice(Rates(None, 2e9), 4, 1, SMALL)
    assert "suits 2 GB/s between nodes, for" in apart.found
    other = suitable_layout(Rates(1e9, 1e9), 2, 4, TableSize(group_size=3))
    assert other.group_size == 8
    assert suitable_layout(Rates(1e9, 1e9), 2, 4, TableSize(group_size=2)).group_size == 2
    whole = suitable_layout(Rates(1e9, 1e9), 2, 4, TableSize(cuts_rows=False))
    assert (whole.mode, whole.group_size) == ("row", 8)


def test_the_size_of_the_tables_is_that_of_the_flags() -> None:
    def size(flags: str) -> TableSize:
        return table_size(support.parse([flags], parser_of("doctor"))[0])

    usual = size("--memory-layers 1")
    assert (usual.width, usual.number_bytes, usual.group_size) == (2048, 4, None)
    assert size("--hidden-size 512 --bf16 --memory-layers 1").width == 512
    given = size(
        "--hidden-size 512 --bf16 --memory-layers 1 --memory-value-dim 1024 --memory-heads 2 "
        "--memory-topk 8 --memory-wire allgather --memory-group-size 4 --memory-variant peer"
    )
    assert given == TableSize(1024, 16, 2, "allgather", 4, cuts_rows=False)


def _check(local_sizes: list[int]) -> tuple[list[Finding], list[list[int]]]:
    """The findings on emulated nodes, and the groups that were made."""
    made: list[list[int]] = []
    new_group = dist.new_group

    def noted(ranks: list[int], timeout: Any) -> Any:
        made.append(ranks)
        return new_group(ranks, timeout)

    size = {"LOCAL_WORLD_SIZE": str(local_sizes[dist.get_rank()])}
    with mock.patch.dict(os.environ, size), mock.patch.object(dist, "new_group", noted):
        return links_check(CPU, SIZE, 30, SMALL), made


def _both_links() -> None:
    findings, groups = _check([2] * 4)
    assert [finding.what for finding in findings] == [*ROWS, "layout"]
    assert {finding.status for finding in findings} == {"ok"}
    assert groups == [[0, 1], [2, 3], [0, 2], [1, 3]]
    for finding in findings[:-1]:
        assert finding.found.endswith("0 MiB per rank, 2 groups of 2 ranks at once")
        assert float(finding.found.split()[3]) > 0
    assert "over 4 ranks." in findings[-1].found

    one_node, groups = _check([4] * 4)
    assert [finding.what for finding in one_node] == [*ROWS[:2], "between nodes", "layout"]
    assert one_node[2].found == "not measured, as all ranks are on one node"
    assert one_node[2].status == "note" and groups == [[0, 1, 2, 3]]
    one_each, groups = _check([1] * 4)
    assert [finding.what for finding in one_each] == ["inside a node", *ROWS[2:], "layout"]
    assert one_each[0].found == "not measured, as each node has one rank"
    assert groups == [[0, 1, 2, 3]]
    (uneven,), groups = _check([3, 3, 3, 1])
    assert "nodes have 1 and 3 ranks; start equally many" in uneven.found and not groups

    # rank 3 alone receives nothing from other nodes, and all ranks must report it
    truly = dist.all_to_all_single

    def lost(out: Any, sent: Any, group: Any) -> None:
        across = dist.get_process_group_ranks(group) == [1, 3]
        truly(torch.empty_like(out) if across and dist.get_rank() == 3 else out, sent, group=group)

    with mock.patch.object(dist, "all_to_all_single", lost):
        findings, _ = _check([2] * 4)
    assert [finding.what for finding in findings] == ROWS
    assert [finding.status for finding in findings] == ["ok", "ok", "ok", "problem"]


def _slowest_counts() -> None:
    """A rank that sends late lowers the rate that all ranks report, on its link alone."""
    truly = dist.all_gather_into_tensor

    def late(out: Any, sent: Any, group: Any) -> None:
        if dist.get_process_group_ranks(group) == [1, 3]:
            time.sleep(0.2)
        truly(out, sent, group=group)

    with mock.patch.object(dist, "all_gather_into_tensor", late):
        findings, _ = _check([2] * 4)
    rates = [float(finding.found.split()[3]) for finding in findings[:-1]]
    # each of two ranks sends half of the bytes
    assert rates[2] <= SIZE / 2 / 0.2 / 1e9 < rates[3]
    assert f"and {rates[2]:.3g} GB/s between nodes" in findings[-1].found


def _measured() -> None:
    _both_links()
    _slowest_counts()


@pytest.mark.gloo
def test_both_links_are_measured() -> None:
    run_distributed(_measured, 4)


def _one_rank_fails() -> None:
    rank, measured = dist.get_rank(), doctor_links.measured_rate

    def fails(name: str, device: Any, size: int, group: Any = None) -> float | None:
        if group is not None and rank == 1:
            raise RuntimeError("no memory")
        return measured(name, device, size, group)

    started = time.monotonic()
    with (
        mock.patch.dict(os.environ, {"RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}),
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
        mock.patch.object(doctor_links, "measured_rate", fails),
    ):
        findings, is_first = doctor.with_all_ranks([], CPU, SIZE, 3)
    assert is_first
    assert findings[-1].what == "collectives" and findings[-1].status == "problem"
    assert ("no memory" in findings[-1].found) == (rank == 1)
    # until then the rank that failed has not ended, which the others would notice
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["rank 0 reports"])
    store.set(f"rank {rank} reports", "")
    # not the minute for which the world waits
    assert time.monotonic() - started < 40


@pytest.mark.gloo
def test_no_rank_waits_longer_than_asked_for_one_that_failed() -> None:
    run_distributed(_one_rank_fails, 2)


@pytest.mark.slow
@pytest.mark.gloo
def test_under_torchrun_on_two_nodes() -> None:
    """Two launchers on one host, each of which starts two ranks.

    pytest -m slow tests/tools/test_doctor_links.py
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    port = 20000 + os.getpid() % 10000
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    doctor_words = ["-m", "megamem", "doctor", "--light", "--mib", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    nodes = [
        subprocess.Popen(
            [*command, f"--node-rank={node}", *doctor_words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for node in range(2)
    ]
    try:
        said = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    for row in ROWS:
        assert f"\u2502 {row} " in said[0]
    assert said[0].count("2 groups of 2 ranks at once") == 4
    assert "over 4 ranks." in said[0] and "Ready:" not in said[1]
