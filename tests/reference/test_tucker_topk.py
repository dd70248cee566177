"""The two stages against a search over all pairs, and the leading directions against LAPACK."""

import torch

from megamem.reference.tucker_topk import leading_directions, tucker_topk

# S_row = S_col of the unit oracle, for keys of width 1 and a query of 1
SCORES_NA = torch.tensor([[2.0, 2.0], [4.0, -1.0], [0.0, 1.0]], dtype=torch.float64)
CORES_OHAA = torch.tensor([[[[2.0, 0.0], [0.0, 2.0]]], [[[0.0, 1.0], [1.0, 0.0]]]]).double()


def test_the_unit_oracle():
    """Two stages by hand: the staircase of product_topk would return the ids 0 and 1."""
    query = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    keys = SCORES_NA[None, None, :, :, None].expand(2, -1, -1, -1, -1)
    directions = leading_directions(CORES_OHAA.sum(0), torch.zeros(2, 1, 2).double())
    torch.testing.assert_close(directions, torch.full((2, 1, 2), 0.5).double().sqrt())
    weights, row_ids = tucker_topk(query, keys, CORES_OHAA, directions, topk=2, final_topk=2)
    assert row_ids.flatten().tolist() == [4, 0]
    assert weights.flatten(0, 2).tolist() == [[34, -8], [16, 8]]
    assert weights.sum(-1).flatten().tolist() == [26, 24]
    all_four = tucker_topk(query, keys, CORES_OHAA, directions, topk=2, final_topk=4)
    assert all_four[1].flatten().tolist() == [4, 0, 1, 3]
    assert all_four[0].sum(-1).flatten().tolist() == [26, 24, 18, 18]
    # a value row is two pieces, each weighted by its core
    values = torch.tensor([[1.0, 2.0], [0, 0], [0, 0], [0, 0], [1, 1]]).double()
    assert (weights * values[row_ids]).sum(2).flatten().tolist() == [50, 8]
