"""Where the counters of rows read come from when a run starts.

--memory-background PATH    those of PATH
a checkpoint to load        its own; zero where it has none, as it was converted or is older
neither                     zero
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
    """Read the background's counters, and tell the tables which to look for in what is loaded next.

    Every rank must call it, before the checkpoint of --load is read; tables that find no counters
    there keep those that they have.
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
            "--memory-finetune-rows %d: no counts of rows read come with %s, and there is no "
            "--memory-background: rows are chosen by their share of a batch's lookups alone",
            spec.finetune_rows,
            f"--load {args.load}" if args.load else "a fresh model",
        )


def read_counters(tables: Mapping[str, ValueTable], folder: Path) -> None:
    """Take over the counters of a checkpoint of the same tables, cut in any way; all ranks."""
    wanted: dict[str, Any] = {}
    for name, table in tables.items():
        wanted |= {f"{name}.{key}": part for key, part in counters(table).items()}
    found = dist_checkpointing.load(wanted, str(folder))
    for name, table in tables.items():
        assert table.reads is not None
        table.reads.counts.copy_(found[f"{name}.read_counts"])
        table.reads.batches.copy_(found[f"{name}.batches"])
