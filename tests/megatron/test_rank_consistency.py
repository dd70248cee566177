"""Ranks with different memory flags are found at start."""

import argparse
import os
from dataclasses import replace
from datetime import timedelta
from unittest import mock

import pytest
import torch.distributed as dist

from megamem.config import MemoryConfig
from megamem.megatron.startup.rank_consistency import (
    _settings,
    describe,
    differing_flags,
    node_problems,
)
from megamem.resolution import resolve
from megamem.spec import Grid, Layout, MemorySpec
from tests.helpers.distributed import run_distributed
from tests.helpers.megatron_runs import run_training
from tests.megatron.test_tiny_training import MEMORY


def test_agreement_says_nothing() -> None:
    assert describe([MemoryConfig(memory_layers=[1]).to_dict()] * 3) == []


def test_every_difference_is_told_with_its_ranks() -> None:
    base = MemoryConfig(memory_layers=[1, 2])
    others = [MemoryConfig(memory_layers=[1], memory_lr=0.5).to_dict()] * 6
    told = describe([base.to_dict(), *others])
    assert told == [
        "--memory-layers differs: 1 2 on rank 0, 1 on ranks 1, 2, 3, 4 and 2 more; "
        "start every rank with the same flags.",
        "--memory-lr differs: its default on rank 0, 0.5 on ranks 1, 2, 3, 4 and 2 more; "
        "start every rank with the same flags.",
    ]


def _spec_and_args(timeout: timedelta) -> tuple[MemorySpec, argparse.Namespace]:
    args = argparse.Namespace(memory_layers=[1])
    minutes = timeout.total_seconds() / 60
    return resolve(MemoryConfig.from_args(args), 16, timeout_minutes=minutes), args


def _disagree_about_the_mode() -> None:
    """With auto, nodes with different numbers of ranks resolve to different layouts."""
    spec, args = _spec_and_args(timedelta(seconds=60))
    spec = replace(spec, layout=Layout("column", 1, 1)) if dist.get_rank() == 1 else spec
    (found,) = differing_flags(spec, args)
    assert "--memory-mode differs: row on ranks 0, 2, column on rank 1" in found


def _learns_of(silent_rank: int) -> None:
    """All ranks but one compare flags; that one has no memory layers and does not take part."""
    rank = dist.get_rank()
    if rank != silent_rank:
        (found,) = differing_flags(*_spec_and_args(timedelta(seconds=3)))
        assert found == (
            f"--memory-layers is given on this rank, but rank {silent_rank} did not report memory "
            "flags within --distributed-timeout-minutes 0.05; start every rank with the same flags."
        )
    # the rank that holds the store must stay until all are done with it
    dist.barrier()


def _agree() -> None:
    assert differing_flags(*_spec_and_args(timedelta(seconds=60))) == []


@pytest.mark.gloo
@pytest.mark.parametrize("silent_rank", [0, 2])
def test_a_rank_without_memory_layers_is_found_by_its_silence(silent_rank: int) -> None:
    run_distributed(_learns_of, 3, silent_rank)


@pytest.mark.gloo
def test_what_auto_came_to_is_compared() -> None:
    run_distributed(_disagree_about_the_mode, 3)


def test_nodes_of_different_sizes_are_told_by_the_ranks_on_them() -> None:
    """Ranks 0 and 1 are on one node, rank 2 is on another."""

    def told(grid: Grid, *node_ranks: int) -> list[str]:
        layout = Layout.of_grid(grid)
        found = []
        for ranks in node_ranks:
            spec, args = _spec_and_args(timedelta(seconds=60))
            with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(ranks)}):
                found.append(_settings(replace(spec, layout=layout), args))
        problems = node_problems(found)
        # what is left are flags
        assert problems or describe(found) == []
        return problems

    (said,) = told(Grid(node_rows=2), 2, 2, 1)
    assert "2 on the node of ranks 0, 1, 1 on the node of rank 2" in said
    assert said.endswith("such as --memory-grid 1x1x2x1.")
    # a group inside one node, and nodes of one size
    assert told(Grid(local_rows=2), 2, 2, 1) == told(Grid(node_rows=2), 2, 2, 2) == []


@pytest.mark.gloo
def test_ranks_that_agree_go_on() -> None:
    run_distributed(_agree, 3)


@pytest.mark.gloo
def test_ranks_with_other_flags_end_with_one_line() -> None:
    log = run_training(
        "differing",
        2,
        *MEMORY,
        check=False,
        module="tests.helpers.faulty",
        environment={"FAULT": "flag 1 --memory-topk 2"},
    )
    assert log.returncode != 0
    said = [line for line in log.stdout.splitlines() if "megamem: error:" in line]
    assert len(said) == 1
    assert "--memory-topk differs: 4 on rank 0, 2 on rank 1" in said[0]
