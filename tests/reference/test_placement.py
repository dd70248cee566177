"""Rows are placed by a bijection that scatters neighbours."""

import pytest
import torch

from megamem.ops import place_rows
from megamem.reference import placement


@pytest.mark.parametrize("num_keys", [1, 2, 9, 64, 100])
@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_every_row_is_read_by_one_pair(num_keys: int, seed: int) -> None:
    pairs = torch.arange(num_keys**2)
    rows = placement.place_rows(pairs, num_keys, seed)
    assert torch.equal(rows.sort().values, pairs)
    assert torch.equal(placement.unplace_rows(rows, num_keys, seed), pairs)


def test_large_tables_invert_too() -> None:
    pairs = torch.randint(16381**2, (10_000,), generator=torch.Generator().manual_seed(1))
    rows = placement.place_rows(pairs, 16381, 5)
    assert torch.equal(placement.unplace_rows(rows, 16381, 5), pairs)
    assert rows.min() >= 0 and rows.max() < 16381**2


@pytest.mark.parametrize("hot", ["one left sub-key", "one right sub-key", "a block of both"])
def test_pairs_that_share_a_sub_key_lie_on_all_ranks_alike(hot: str) -> None:
    num_keys, ranks = 512, 8
    i, j = torch.meshgrid(torch.arange(num_keys), torch.arange(num_keys), indexing="ij")
    picked = {"one left sub-key": i == 3, "one right sub-key": j == 3}.get(hot, (i < 23) & (j < 23))
    rows = placement.place_rows((i * num_keys + j)[picked], num_keys, 0)
    loads = torch.bincount(rows * ranks // num_keys**2, minlength=ranks).double()
    # as even as throwing them at random: 512 balls in 8 urns differ by three deviations at most
    assert loads.max() / loads.mean() < 1.5


def test_seeds_differ() -> None:
    pairs = torch.arange(64**2)
    same = placement.place_rows(pairs, 64, 0) == placement.place_rows(pairs, 64, 1)
    assert same.sum() < 12


@pytest.mark.parametrize(("num_keys", "count"), [(1, 3), (100, 1), (4096, 1025), (16384, 3000)])
def test_the_kernel_is_its_twin(num_keys: int, count: int, device: str) -> None:
    generator = torch.Generator().manual_seed(count)
    pairs = torch.randint(num_keys**2, (count,), generator=generator)
    for dtype in (torch.int64, torch.int32):
        rows = place_rows(pairs.to(device, dtype), num_keys, 7)
        assert rows.dtype == torch.int64
        assert torch.equal(rows.cpu(), placement.place_rows(pairs, num_keys, 7))
        narrow = place_rows(pairs.to(device, dtype), num_keys, 7, torch.int32)
        assert narrow.dtype == torch.int32 and torch.equal(narrow.long(), rows)
    assert place_rows(pairs[:0].to(device), num_keys, 7).shape == (0,)
