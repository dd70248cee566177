"""Runs a script as megamem.run does, and writes down which rows each step of each rank looked up.

$READS/STEP_RANK.pt holds all lookups, as rows of the table, of the batches that were learnt from;
they are seen where a layer asks, before anything travels or is counted.
"""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamem.layers.memory_pool import Lookups, MemoryPool
from megamem.megatron.launcher import main
from megamem.ops import place_rows
from megamem.optimizer import TableOptimizer

FOLDER = "READS"


def reads(folder: Path) -> list[Counter[int]]:
    """Lookups of every row, of each step, on all ranks together."""
    steps: dict[int, Counter[int]] = {}
    for path in folder.glob("*.pt"):
        step = int(path.stem.split("_")[0])
        steps.setdefault(step, Counter()).update(torch.load(path).tolist())
    return [steps[step] for step in sorted(steps)]


def _install() -> None:
    launch, step = MemoryPool.launch, TableOptimizer.step
    seen: list[Tensor] = []
    steps = 0

    def watched(self: MemoryPool, row_ids_TL: Tensor, *rest: Any) -> Lookups:
        if torch.is_grad_enabled():
            rows = place_rows(row_ids_TL.detach(), self.spec.num_keys, self.spec.placement_seed)
            seen.append(rows.flatten().clone())
        return launch(self, row_ids_TL, *rest)

    def counted(self: TableOptimizer, *rest: Any) -> None:
        nonlocal steps
        folder = Path(os.environ[FOLDER])
        torch.save(torch.cat(seen), folder / f"{steps}_{os.environ.get('RANK', 0)}.pt")
        seen.clear()
        steps += 1
        step(self, *rest)

    MemoryPool.launch = watched  # type: ignore[method-assign]
    TableOptimizer.step = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    _install()
    sys.exit(main())
