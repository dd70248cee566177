"""Runs a function on W local ranks: gloo on CPU, file rendezvous (no port to clash)."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# not Megatron, which some ranks must adapt before they import it
PRELOADED = ("megamem.layers.memory", "megamem.optimizer")

# a rank that waits this long waits for a peer that will never come
PATIENCE = timedelta(seconds=60)


def _worker(rank: int, fn: Callable, world_size: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=PATIENCE,
    )
    try:
        fn(*args)
    except BaseException:
        # time first, so that sorting the names finds who failed first: its peers fail after it,
        # with errors that only say that the connection was closed
        Path(folder, f"{time.monotonic_ns():020}.failed").write_text(
            f"rank {rank} of {world_size}:\n{traceback.format_exc()}"
        )
        raise
    finally:
        dist.destroy_process_group()


def run_distributed(fn: Callable, world_size: int, *args: Any) -> None:
    """Call fn(*args) on every rank; the first failing rank's traceback fails the test."""
    __tracebackhide__ = True
    first_failure = None
    with (
        tempfile.TemporaryDirectory() as folder,
        # ranks are about what travels; kernels, interpreted, would take most of the time
        mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}),
    ):
        try:
            # a server that has torch imported forks the ranks: importing it is most of a test
            multiprocessing.set_forkserver_preload(["tests.helpers.distributed", *PRELOADED])
            arguments = (fn, world_size, folder, args)
            mp.start_processes(_worker, arguments, world_size, start_method="forkserver")
        except (mp.ProcessRaisedException, mp.ProcessExitedException):
            failures = sorted(Path(folder).glob("*.failed"))
            if not failures:
                raise
            first_failure = failures[0].read_text()
    if first_failure:
        pytest.fail(first_failure, pytrace=False)
