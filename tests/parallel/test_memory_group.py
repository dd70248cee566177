"""Memory groups: which ranks share a table, its rows or its columns."""

import pytest
import torch.distributed as dist

from megamem.parallel.memory_group import MemoryGroup, form, partition
from megamem.parallel.row_shard import TableShard
from tests.helpers.distributed import run_distributed


def test_the_groups_of_the_picture() -> None:
    groups = partition([list(range(8))], 4, 2)
    assert groups.members == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups.columns == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups.rows == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert groups.replicas == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_stages_that_share_a_table_hold_replicas_of_it() -> None:
    stages = [[0, 1], [2, 3], [4, 5]]
    groups = partition(stages, 2, 1, joined=[0, 2])
    assert groups.members == stages
    assert groups.replicas == [[0, 4], [1, 5], [2], [3]]
    assert partition(stages, 1, 1, joined=[0, 2]).replicas == [[0, 1, 4, 5], [2, 3]]


@pytest.mark.parametrize("stages", [[[0, 1, 2, 3, 4, 5]], [[0, 2, 4, 6], [1, 3, 5, 7]]])
@pytest.mark.parametrize("size", [1, 2])
def test_every_rank_is_in_one_group_of_each_kind(stages: list[list[int]], size: int) -> None:
    for columns in (c for c in (1, 2) if size % c == 0):
        groups = partition(stages, size, columns)
        for kind in (groups.members, groups.rows, groups.columns, groups.replicas):
            assert sorted(rank for ranks in kind for rank in ranks) == sorted(sum(stages, []))
        for ranks in groups.members:
            assert any(set(ranks) <= set(stage) for stage in stages)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 1), (1, 2), (3, 2), (5, 3)])
def test_pieces_tile_the_table(rows: int, columns: int) -> None:
    seen = set()
    for row in range(rows):
        for column in range(columns):
            shard = TableShard.cut((7, 40), (row, rows), (column, columns))
            assert shard.shape[1] % 8 == 0 and sum(shard.widths) == 40
            assert shard.shape[1] == shard.widths[column]
            cells = {
                (r, c)
                for r in range(shard.rows.local.start, shard.rows.local.stop)
                for c in range(shard.columns.start, shard.columns.stop)
            }
            assert len(cells) == shard.shape[0] * shard.shape[1] and not seen & cells
            assert not cells or min(cells) == shard.offset
            seen |= cells
    assert len(seen) == 7 * 40


def _ranks(group) -> list[int]:
    return [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)


def _formed() -> None:
    rank = dist.get_rank()
    group = form(partition([[0, 1, 2, 3]], 2, 2), token_ranks=[0, 1, 0, 1])
    pair = [rank // 2 * 2, rank // 2 * 2 + 1]
    assert _ranks(group.members) == _ranks(group.columns) == pair
    assert group.rows is None and (group.row_ranks, group.column_ranks) == (1, 2)
    assert _ranks(group.replicas) == [rank % 2, rank % 2 + 2] and group.replica == rank // 2
    assert group.split_counts([5, 6]) == [5, 6]
    group = form(partition([[0, 1, 2, 3]], 4, 2), token_ranks=[0, 1, 0, 1])
    assert _ranks(group.rows) == [rank % 2, rank % 2 + 2] and _ranks(group.columns) == pair
    assert group.replicas is None and group.world_size == 4
    assert group.split_counts([5, 6]) == [5, 6, 5, 6]
    assert MemoryGroup.of_rows(dist.group.WORLD).split_counts([1, 2, 3, 4]) == [1, 2, 3, 4]


@pytest.mark.gloo
def test_process_groups_hold_the_ranks_they_should() -> None:
    run_distributed(_formed, 4)
