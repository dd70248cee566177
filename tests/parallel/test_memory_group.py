"""Memory groups: which ranks share a table, its rows or its columns."""

import pytest
import torch.distributed as dist

from megamem.parallel.memory_group import MemoryGroup, form, partition
from megamem.parallel.row_shard import TableShard
from megamem.spec import Grid, Layout, Mode
from tests.helpers.distributed import run_distributed


def test_the_groups_of_the_picture() -> None:
    groups = partition([list(range(16))], Grid(2, 1, 2, 2)).groups

    def own(kind: str) -> list[int]:
        return next(ranks for ranks in groups[kind] if 13 in ranks)

    assert groups["members"] == [[*range(8)], [*range(8, 16)]]
    assert own("columns") == own("local_columns") == [12, 13]
    assert own("rows") == [9, 11, 13, 15] and own("local_rows") == [13, 15]
    assert own("node_rows") == own("across") == [9, 13] and own("node_columns") == [13]
    assert own("inside") == [12, 13, 14, 15] and own("replicas") == [5, 13]


def test_stages_that_share_a_table_hold_replicas_of_it() -> None:
    stages = [[0, 1], [2, 3], [4, 5]]
    groups = partition(stages, Grid(local_rows=2), joined=[0, 2]).groups
    assert groups["members"] == stages
    assert groups["replicas"] == [[0, 4], [1, 5], [2], [3]]
    alone = partition(stages, Grid(), joined=[0, 2]).groups
    assert alone["replicas"] == [[0, 1, 4, 5], [2, 3]]


GRIDS = [
    Grid(),
    Grid(1, 1, 2, 1),
    Grid(1, 1, 1, 2),
    Grid(2, 1, 1, 1),
    Grid(1, 2, 2, 3),
    Grid(2, 2, 3, 1),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_rank_is_in_one_group_of_each_kind(grid: Grid) -> None:
    for stages in ([[*range(24)]], [[*range(0, 24, 2)], [*range(1, 24, 2)]]):
        for kind, groups in partition(stages, grid).groups.items():
            assert sorted(rank for ranks in groups for rank in ranks) == [*range(24)], kind
            assert all(any(set(ranks) <= set(stage) for stage in stages) for ranks in groups)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_places_of_the_grid_are_those_of_the_shards(grid: Grid) -> None:
    """A rank's number among those of other rows is its shard of rows, and so for columns."""
    groups = partition([[*range(grid.size)]], grid).groups
    for rank in range(grid.size):
        node_row, node_column, local_row, local_column = grid.coordinates(rank)
        assert grid.member(grid.coordinates(rank)) == rank
        rows, columns = (
            next(ranks for ranks in groups[kind] if rank in ranks) for kind in ("rows", "columns")
        )
        assert rows.index(rank) == node_row * grid.local_rows + local_row
        assert columns.index(rank) == node_column * grid.local_columns + local_column
        assert (len(rows), len(columns)) == (grid.row_ranks, grid.column_ranks)


def test_modes_are_names_of_grids() -> None:
    def grid(mode: Mode, size: int, columns: int, ranks_per_node: int = 8) -> str:
        return str(Layout.of_mode(mode, size, columns, ranks_per_node).grid)

    assert grid("row", 16, 1) == "2x1x8x1" and grid("column", 16, 16) == "1x2x1x8"
    assert grid("2d", 32, 4) == "4x1x2x4" and grid("2d", 32, 16) == "2x2x1x8"
    assert grid("row", 4, 1) == "1x1x4x1" and grid("2d", 4, 2) == "1x1x2x2"
    # neither nodes nor sets of column ranks divide the other
    assert grid("2d", 24, 3) == "1x1x8x3" and grid("row", 12, 1) == "1x1x12x1"
    for text in ("1x16x8x1", "2x1x2x2"):
        assert str(Grid.parse(text)) == text
        assert Layout.of_grid(Grid.parse(text)).flags == f"--memory-grid {text}"
    for text in ("1x16x8", "1x0x8x1", "2x", "row"):
        with pytest.raises(ValueError):
            Grid.parse(text)


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
    group = form(partition([[0, 1, 2, 3]], Grid(local_columns=2)), token_ranks=[0, 1, 0, 1])
    pair = [rank // 2 * 2, rank // 2 * 2 + 1]
    assert _ranks(group.members) == _ranks(group.columns) == pair
    assert group.rows is None and (group.row_ranks, group.column_ranks) == (1, 2)
    assert _ranks(group.replicas) == [rank % 2, rank % 2 + 2] and group.replica == rank // 2
    assert group.split_counts([5, 6]) == [5, 6]
    group = form(
        partition([[0, 1, 2, 3]], Grid(local_rows=2, local_columns=2)), token_ranks=[0, 1, 0, 1]
    )
    assert _ranks(group.rows) == [rank % 2, rank % 2 + 2] and _ranks(group.columns) == pair
    assert group.replicas is None and group.world_size == 4
    assert group.split_counts([5, 6]) == [5, 6, 5, 6]
    assert MemoryGroup.of_rows(dist.group.WORLD).split_counts([1, 2, 3, 4]) == [1, 2, 3, 4]


def _replicas_by_node() -> None:
    rank = dist.get_rank()
    replicated = partition([[0, 1, 2, 3]], Grid())
    group = form(replicated, nodes=[0, 0, 1, 1])
    assert group.replica_nodes is not None and _ranks(group.replicas) == [0, 1, 2, 3]
    assert _ranks(group.replica_nodes.inside) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert _ranks(group.replica_nodes.across) == [rank % 2, rank % 2 + 2]
    # one on each node, all on one, another number on each, nodes that are not known
    pairs = partition([[0, 1, 2, 3]], Grid(local_rows=2))
    assert form(pairs, nodes=[0, 0, 1, 1]).replica_nodes is None
    for nodes in ([0, 0, 0, 0], [0, 0, 0, 1], None):
        assert form(replicated, nodes=nodes).replica_nodes is None


@pytest.mark.gloo
def test_process_groups_hold_the_ranks_they_should() -> None:
    run_distributed(_formed, 4)


@pytest.mark.gloo
def test_replicas_are_grouped_by_node() -> None:
    run_distributed(_replicas_by_node, 4)
