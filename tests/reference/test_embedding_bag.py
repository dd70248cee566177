import torch
from torch.nn import functional as F

from megamem.reference.embedding_bag import embedding_bag


def test_equals_torch():
    torch.manual_seed(42)
    values, weights = torch.randn(9, 8, dtype=torch.float64), torch.randn(14, dtype=torch.float64)
    row_ids, offsets = torch.randint(9, (14,)), torch.tensor([0, 5, 5, 14])
    truth = F.embedding_bag(row_ids, values, offsets[:-1], mode="sum", per_sample_weights=weights)
    torch.testing.assert_close(embedding_bag(values, row_ids, weights, offsets), truth)


def test_absent_lookups_add_nothing_whatever_their_weight():
    values, offsets = torch.ones(2, 8), torch.tensor([0, 3])
    weights = torch.tensor([1.0, float("inf"), 2.0], requires_grad=True)
    out = embedding_bag(values, torch.tensor([0, -1, 1]), weights, offsets)
    assert torch.equal(out, torch.full((1, 8), 3.0))
    out.sum().backward()
    assert weights.grad.tolist() == [8.0, 0.0, 8.0]


def test_bf16_tables_sum_in_fp32_both_ways():
    # 1 + 256 times 2**-9 is 1.5; summed in bf16 it stays 1
    values = torch.cat((torch.ones(1, 8), torch.full((256, 8), 2.0**-9))).bfloat16()
    out = embedding_bag(values, torch.arange(257), torch.ones(257), torch.tensor([0, 257]))
    assert out.dtype == torch.bfloat16 and (out == 1.5).all()

    row = torch.zeros(1, 8, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.cat((torch.ones(1), torch.full((256,), 2.0**-9)))
    out = embedding_bag(row, torch.zeros(257, dtype=torch.int64), weights, torch.arange(258))
    out.backward(torch.ones_like(out))
    assert row.grad.dtype == torch.bfloat16 and (row.grad == 1.5).all()
