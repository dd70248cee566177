"""The value table's own learning rate and weight decay, in Megatron's optimizer.

The table rides in Megatron's gradient buffers and is stepped by Megatron's optimizer, as a
parameter group of its own.
"""

import argparse
from typing import Any

from megatron.core.optimizer import ParamGroupOverride, ParamKey

from megamem.checkpoint import TABLES
from megamem.config import MemoryConfig

TABLE_PARAMETERS = f"*{TABLES}.*"


def table_overrides(args: argparse.Namespace, memory: MemoryConfig) -> dict[Any, Any]:
    """What Megatron's optimizer takes as overrides of a parameter group; empty if nothing differs.

    A scheduled rate runs from --memory-lr to the same fraction of it that --min-lr is of --lr. A
    constant one is its own minimum, so that no decay style can lower it.
    """
    override: dict[str, float] = {}
    if memory.memory_lr is not None:
        floor = 1.0
        if memory.memory_lr_schedule == "scheduled":
            floor = (args.min_lr or 0) / args.lr if args.lr else 0.0
        override |= {"max_lr": memory.memory_lr, "min_lr": memory.memory_lr * floor}
    if memory.memory_weight_decay is not None:
        decay = memory.memory_weight_decay
        override |= {"start_wd": decay, "end_wd": decay, "wd_mult": 1.0}
    if not override:
        return {}
    return {ParamKey(name=TABLE_PARAMETERS): ParamGroupOverride(**override)}
