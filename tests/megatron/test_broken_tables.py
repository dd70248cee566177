"""Rows that are not finite are found block by block."""

import pytest
import torch

from megamem.megatron.reports import broken_tables


@pytest.mark.parametrize("block_bytes", [1, 3 * 8 * 4, 1 << 20])
def test_rows_are_found_wherever_blocks_end(monkeypatch, block_bytes: int) -> None:
    monkeypatch.setattr(broken_tables, "BLOCK_BYTES", block_bytes)
    values_rv = torch.randn(10, 8)
    assert len(broken_tables.broken_rows(values_rv)) == 0
    values_rv[2, 7] = float("nan")
    values_rv[3, 0] = float("inf")
    values_rv[9, 1] = float("-inf")
    assert broken_tables.broken_rows(values_rv).tolist() == [2, 3, 9]


def test_a_rank_without_rows_has_none_broken() -> None:
    assert len(broken_tables.broken_rows(torch.empty(0, 8))) == 0
