"""Lookups to test embedding_bag on, the awkward ones included."""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    values_rV: Tensor
    row_ids_M: Tensor
    weights_M: Tensor
    offsets: Tensor
    grad_GV: Tensor


def make_batch(
    bag_sizes: list[int],
    num_rows: int,
    width: int,
    absent: float = 0.0,
    one_row: bool = False,
    device: str = "cpu",
    seed: int = 42,
) -> Batch:
    """Random bags; a share of the lookups reads no row, or all of them read the same one."""
    torch.manual_seed(seed)
    num_lookups = sum(bag_sizes)
    row_ids_M = torch.randint(num_rows, (num_lookups,))
    if one_row:
        row_ids_M.fill_(num_rows // 2)
    row_ids_M[torch.rand(num_lookups) < absent] = -1
    batch = Batch(
        torch.randn(num_rows, width),
        row_ids_M,
        torch.randn(num_lookups),
        torch.tensor([0, *bag_sizes]).cumsum(0),
        torch.randn(len(bag_sizes), width),
    )
    return Batch(*(x.to(device) for x in batch))


BATCHES = {
    "one lookup": {"bag_sizes": [1], "num_rows": 1, "width": 8},
    "duplicates": {"bag_sizes": [40, 40, 9], "num_rows": 3, "width": 24},
    "ragged and empty bags": {"bag_sizes": [0, 7, 0, 0, 33, 1, 0], "num_rows": 50, "width": 40},
    "two blocks of columns": {"bag_sizes": [16] * 5, "num_rows": 16, "width": 264},
    "a width of no power of two": {"bag_sizes": [3, 0, 6], "num_rows": 7, "width": 1000},
    "a last block of eight": {"bag_sizes": [5, 1], "num_rows": 4, "width": 1032, "absent": 0.3},
    "most absent": {"bag_sizes": [70, 0, 200], "num_rows": 60, "width": 16, "absent": 0.85},
    "all absent": {"bag_sizes": [5, 3], "num_rows": 4, "width": 8, "absent": 1.0},
    # crosses many chunks, and more than one tile of the merge
    "one row takes all": {
        "bag_sizes": [300, 11, 40],
        "num_rows": 9,
        "width": 8,
        "one_row": True,
        "absent": 0.05,
    },
    "no lookups": {"bag_sizes": [0, 0], "num_rows": 4, "width": 8},
    "no bags": {"bag_sizes": [], "num_rows": 4, "width": 8},
}
