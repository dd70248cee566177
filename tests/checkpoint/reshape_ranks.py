"""Saves and loads a table on the ranks of a process group, in every mode.

Megatron is imported late: the CPU runtime must come before it.
"""

from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megamem.cpu import runtime as cpu_runtime
from megamem.optimizer.state import SLOTS
from megamem.parallel.collectives import group_rank
from megamem.parallel.memory_group import form, partition
from megamem.parallel.row_shard import TableShard
from megamem.spec import Grid

ROWS, WIDTH = 81, 40  # uneven over 2, 3 and 4 ranks, either way
# ranks -> grids, of one node and of two
GRIDS = {
    world: [Grid.parse(text) for text in texts.split()]
    for world, texts in {
        1: "1x1x1x1",
        2: "1x1x2x1 1x1x1x2 1x1x1x1",
        3: "1x1x3x1 1x1x1x3",
        4: "1x1x4x1 1x1x1x4 1x1x2x2 1x1x2x1 1x1x1x2 1x2x2x1 2x2x1x1",
    }.items()
}


def whole() -> dict[str, Tensor]:
    """A table in bf16, and all that any optimizer keeps of it."""
    generator = torch.Generator().manual_seed(11)
    tensors = {"weight": torch.randn(ROWS, WIDTH, generator=generator).bfloat16()}
    for name, slot in {n: s for slots in SLOTS.values() for n, s in slots.items()}.items():
        shape = (ROWS,) if slot.per_row else (ROWS, WIDTH)
        tensors[name] = (1000 * torch.randn(shape, generator=generator)).to(slot.dtype)
    tensors["per_row"] = torch.randn(ROWS, generator=generator)
    return tensors


def _pieces(name: str, grid: Grid, empty: bool) -> tuple[dict, TableShard]:
    """This rank's pieces of a table called `name`, cut by this grid."""
    from megamem.checkpoint import same_everywhere, sharded_piece

    group = form(partition([list(range(dist.get_world_size()))], grid))
    shard = TableShard.cut(
        (ROWS, WIDTH),
        (group_rank(group.rows), group.row_ranks),
        (group_rank(group.columns), group.column_ranks),
    )
    pieces = {}
    for key, tensor in whole().items():
        piece = _cut(tensor, shard)
        piece = torch.zeros_like(piece) if empty else piece.contiguous()
        per_row = tensor.dim() == 1
        pieces[key] = sharded_piece(f"{name}.{key}", piece, shard, group.replica, per_row)
    seed = torch.tensor([0 if empty else 7])
    pieces["placement"] = same_everywhere(f"{name}.placement", seed, shard, group.replica)
    return pieces, shard


def _cut(tensor: Tensor, shard: TableShard) -> Tensor:
    rows = tensor[shard.rows.local]
    return rows if tensor.dim() == 1 else rows[:, shard.columns]


def save_all(folder: Path) -> None:
    """One checkpoint of this many ranks, with a table for each grid."""
    cpu_runtime.install()
    from megatron.core import dist_checkpointing

    world = dist.get_world_size()
    tables = {str(grid): _pieces(str(grid), grid, False)[0] for grid in GRIDS[world]}
    path = folder / str(world)
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(tables, str(path))


def load_all(folder: Path) -> None:
    """Every table of every checkpoint, by every grid of these ranks."""
    cpu_runtime.install()
    from megatron.core import dist_checkpointing

    for grid, (world, saved) in product(GRIDS[dist.get_world_size()], GRIDS.items()):
        wanted = {str(other): _pieces(str(other), grid, True) for other in saved}
        tables = {name: pieces for name, (pieces, _) in wanted.items()}
        found = dist_checkpointing.load(tables, str(folder / str(world)))
        for name, (_, shard) in wanted.items():
            for key, tensor in whole().items():
                same = torch.equal(found[name][key], _cut(tensor, shard))
                assert same, f"{key} of {name} of {world} ranks, read by grid {grid}"
            assert found[name]["placement"].tolist() == [7]
