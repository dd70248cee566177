import torch

from megamem.layers.init import WeightFactory
from megamem.parallel.row_shard import TableShard

PLACES = [(row, column) for row in range(7) for column in range(2)]


def _make(**settings) -> WeightFactory:
    return WeightFactory(**{"seed": 3, "name": "layer_1", **settings})


def test_rows_do_not_depend_on_the_rows_around_them() -> None:
    whole = _make().normal("values", 100, 24, std=0.5)
    shards = [TableShard.cut((100, 24), (row, 7), (column, 2)) for row, column in PLACES]
    for shard in shards:
        part = _make().normal("values", *shard.shape, std=0.5, shard=shard)
        assert torch.equal(part, whole[shard.rows.local, shard.columns])
    assert sum(shard.shape[0] * shard.shape[1] for shard in shards) == whole.numel()


def test_a_row_is_drawn_for_the_number_it_is_mapped_to() -> None:
    whole = _make().normal("values", 100, 24, std=0.5)
    shard = TableShard.cut((100, 24), (1, 3))
    part = _make().normal("values", *shard.shape, std=0.5, shard=shard, drawn_as=lambda r: 99 - r)
    assert torch.equal(part, whole.flip(0)[shard.rows.local])


def test_blocks_leave_no_seam(monkeypatch) -> None:
    whole = _make().normal("values", 100, 24, std=0.5)
    monkeypatch.setattr("megamem.layers.init._BLOCK", 24 * 7)
    assert torch.equal(_make().normal("values", 100, 24, std=0.5), whole)


def test_seed_layer_and_name_each_give_other_numbers() -> None:
    draws = [
        make.normal(name, 50, 8, std=1).flatten()
        for make, name in [
            (_make(), "gate"),
            (_make(), "proj"),
            (_make(seed=4), "gate"),
            (_make(name="layer_2"), "gate"),
        ]
    ]
    for i, left in enumerate(draws):
        for right in draws[i + 1 :]:
            correlation = torch.corrcoef(torch.stack((left, right)))[0, 1]
            assert not torch.equal(left, right) and correlation.abs() < 0.2


def test_moments_and_bounds() -> None:
    normal = _make().normal("a", 2000, 40, std=0.3)
    assert abs(normal.mean()) < 5e-3 and abs(normal.std() - 0.3) < 5e-3
    uniform = _make().uniform("b", 2, 3, 400, 20, bound=0.1)
    assert uniform.abs().max() <= 0.1
    assert abs(uniform.std() - 0.1 / 3**0.5) < 2e-3 and abs(uniform.mean()) < 2e-3


def test_low_precision_is_the_rounded_fp32_table() -> None:
    fp32 = _make().normal("values", 64, 16, std=1)
    bf16 = _make(dtype=torch.bfloat16).normal("values", 64, 16, std=1)
    # drawn in fp64: rounding once to bf16 may differ from rounding twice by one place
    torch.testing.assert_close(bf16.float(), fp32, rtol=2**-7, atol=0)


def test_nothing_is_drawn_on_the_meta_device() -> None:
    table = _make(device="meta").normal("values", 2**26, 2048, std=1)
    assert table.is_meta and table.numel() == 2**37
