"""What any ranks saved by any grid, any other ranks load by any other: the same bits."""

from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader

from tests.checkpoint.reshape_ranks import GRIDS, load_all, save_all, whole
from tests.helpers.distributed import run_distributed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for world in GRIDS:
        run_distributed(save_all, world, folder)
    return folder


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", GRIDS)
def test_every_layout_reads_every_other(saved: Path, world_size: int) -> None:
    run_distributed(load_all, world_size, saved)


def test_nothing_is_written_twice_or_padded(saved: Path) -> None:
    for world, grids in GRIDS.items():
        metadata = FileSystemReader(str(saved / str(world))).read_metadata()
        for grid in grids:
            for key, tensor in whole().items():
                entry = metadata.state_dict_metadata[f"{grid}.{key}"]
                assert entry.size == tensor.shape
                assert sum(chunk.sizes.numel() for chunk in entry.chunks) == tensor.numel()
