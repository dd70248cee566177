"""Loads the read counts that a run starts with.

with --memory-background PATH    those in the checkpoint of PATH
with a checkpoint to load        those in it; zero if it has none, as converted and older ones do
with neither                     zero
"""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megamem.layers.value_table import ValueTable
from megamem.megatron.model.memory_mlp import counters
from megamem.megatron.startup.rank_consistency import broadcast_from_rank0
from megamem.megatron.startup.saved_model import has_counters, latest_folder
from megamem.spec import MemorySpec

logger = logging.getLogger("megamem")


def load_background(
    spec: MemorySpec, args: argparse.Namespace, tables: Mapping[str, ValueTable]
) -> None:
    """Load the read counts of --memory-background, and decide whether --load supplies them instead.

    All ranks must call it before the checkpoint of --load is read. Tables for which that checkpoint
    has no read counts keep those that they have.
    """
    given = spec.background
    counted, folder = broadcast_from_rank0(
        lambda: (has_counters(spec, args), str(latest_folder(given)) if given else None)
    )
    for table in tables.values():
        assert table.reads is not None
        table.reads.in_checkpoint = counted is None or (counted and folder is None)
    if folder is not None:
        read_counters(tables, Path(folder))
    elif spec.finetune_rows and not counted and dist.get_rank() == 0:
        logger.warning(
            "--memory-finetune-rows %d: %s has no read counts and --memory-background is not "
            "given, so rows are chosen only by their share of a batch's lookups",
            spec.finetune_rows,
            f"--load {args.load}" if args.load else "a new model",
        )


def read_counters(tables: Mapping[str, ValueTable], folder: Path) -> None:
    """Load the read counts of the same tables from a checkpoint of any sharding; collective."""
    wanted: dict[str, Any] = {}
    for name, table in tables.items():
        wanted |= {f"{name}.{key}": part for key, part in counters(table).items()}
    found = dist_checkpointing.load(wanted, str(folder))
    for name, table in tables.items():
        assert table.reads is not None
        table.reads.counts.copy_(found[f"{name}.read_counts"])
        table.reads.batches.copy_(found[f"{name}.batches"])
