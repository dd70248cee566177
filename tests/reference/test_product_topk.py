"""The search over pairs of halves against a search over all N*N product keys."""

import pytest
import torch

from megamem.reference.product_topk import product_topk, staircase


def exhaustive(query_THQ, sub_keys_2HNC, topk):
    """Every product key scored; a stable sort lets the smaller row id win a tie."""
    left_THC, right_THC = query_THQ.chunk(2, dim=-1)
    left_THN = torch.einsum("thc,hnc->thn", left_THC, sub_keys_2HNC[0])
    right_THN = torch.einsum("thc,hnc->thn", right_THC, sub_keys_2HNC[1])
    scores_THR = (left_THN.unsqueeze(-1) + right_THN.unsqueeze(-2)).flatten(-2)
    scores, rows = scores_THR.sort(dim=-1, descending=True, stable=True)
    return scores[..., :topk], rows[..., :topk]


@pytest.mark.parametrize("num_keys", [1, 2, 7, 12])
@pytest.mark.parametrize("spread", [1, 3], ids=["many ties", "some ties"])
def test_exhaustive_search_id_for_id(num_keys, spread):
    torch.manual_seed(num_keys)
    # small integers: sums are exact and ties are everywhere
    query = torch.randint(-spread, spread + 1, (5, 3, 6)).float()
    sub_keys = torch.randint(-spread, spread + 1, (2, 3, num_keys, 3)).float()
    for topk in range(1, num_keys + 1):
        scores, rows = product_topk(query, sub_keys, topk)
        true_scores, true_rows = exhaustive(query, sub_keys, topk)
        assert torch.equal(scores, true_scores)
        assert torch.equal(rows, true_rows)


def test_all_equal_scores_take_the_smallest_rows():
    scores, rows = product_topk(torch.zeros(1, 1, 4), torch.zeros(2, 1, 9, 2), topk=5)
    assert rows.flatten().tolist() == [0, 1, 2, 3, 4]
    assert (scores == 0).all()


def test_gradients_of_real_scores():
    torch.manual_seed(0)
    query = torch.randn(4, 2, 10, dtype=torch.float64, requires_grad=True)
    sub_keys = torch.randn(2, 2, 11, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 2, 6, dtype=torch.float64)
    ours = torch.autograd.grad(product_topk(query, sub_keys, 6)[0], (query, sub_keys), grad)
    truth = torch.autograd.grad(exhaustive(query, sub_keys, 6)[0], (query, sub_keys), grad)
    torch.testing.assert_close(ours, truth)


def test_half_precision_is_scored_in_fp32():
    torch.manual_seed(0)
    query, sub_keys = torch.randn(3, 2, 8).bfloat16(), torch.randn(2, 2, 16, 4).bfloat16()
    scores, rows = product_topk(query, sub_keys, 4)
    assert scores.dtype == torch.float32 and rows.dtype == torch.int64
    in_fp32 = product_topk(query.float(), sub_keys.float(), 4)
    assert torch.equal(scores, in_fp32[0]) and torch.equal(rows, in_fp32[1])


@pytest.mark.parametrize(("topk", "num_pairs"), [(1, 1), (8, 20), (16, 50), (32, 119), (64, 280)])
def test_staircase_is_short(topk, num_pairs):
    left, right = staircase(topk)
    assert len(left) == len(right) == num_pairs
    assert ((left + 1) * (right + 1) <= topk).all()
