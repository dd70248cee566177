import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamem.parallel.row_shard import RowShard, even_counts


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_shards_partition_the_rows(num_rows: int, world_size: int) -> None:
    shards = [RowShard(num_rows, rank, world_size) for rank in range(world_size)]
    assert shards[0].start == 0
    for shard, following in zip(shards, shards[1:], strict=False):
        assert shard.start + shard.num_local == following.start
    assert shards[-1].start + shards[-1].num_local == num_rows
    sizes = {shard.num_local for shard in shards}
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 3_000), st.integers(1, 64))
def test_owner_and_local_agree_with_the_shards(num_rows: int, world_size: int) -> None:
    row_ids = torch.arange(num_rows)
    shard = RowShard(num_rows, 0, world_size)
    owners = shard.owner(row_ids)
    expected = [
        (rank, local)
        for rank in range(world_size)
        for local in range(RowShard(num_rows, rank, world_size).num_local)
    ]
    found = list(zip(owners.tolist(), shard.local_on(owners, row_ids).tolist(), strict=True))
    assert found == expected


def test_the_largest_tables_do_not_overflow() -> None:
    num_rows, world_size = 16384**2, 4096
    shard = RowShard(num_rows, world_size - 1, world_size)
    last = torch.tensor([num_rows - 1])
    assert shard.owner(last).item() == world_size - 1
    assert shard.local_on(shard.owner(last), last).item() == shard.num_local - 1


@pytest.mark.parametrize(("total", "parts"), [(5, 3), (2, 4), (0, 2), (12, 4)])
def test_even_counts(total: int, parts: int) -> None:
    counts = even_counts(total, parts)
    assert sum(counts) == total and len(counts) == parts and max(counts) - min(counts) <= 1
