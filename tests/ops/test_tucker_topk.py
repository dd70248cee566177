"""tucker_topk against its twin: ids exactly, weights and gradients as good as torch's."""

import pytest
import torch

from megamem.kernels import choices
from megamem.kernels import tucker_topk as kernels
from megamem.ops import forms, leading_directions, tucker_topk
from megamem.reference.tucker_topk import tucker_topk as reference
from tests.helpers.closeness import assert_as_good_as_torch


@pytest.fixture(params=["torch", "triton"])
def form(request, monkeypatch) -> str:
    """Every form of forward and backward, whichever is the default on this device."""
    selected = f"tucker_topk={request.param},tucker_topk_backward={request.param}"
    monkeypatch.setenv(forms.ENVIRONMENT, selected)
    return request.param


def _integers(tokens, heads, num_keys, rank, width, cores, queries, spread, device, seed=0):
    """Small integers: scores are exact, and ties are everywhere."""
    torch.manual_seed(seed)

    def draw(*shape):
        return torch.randint(-spread, spread + 1, shape, device=device).float()

    return (
        draw(tokens, 2, queries, width),
        draw(2, heads, num_keys, rank, width),
        draw(cores, heads, rank, rank),
        draw(2, heads, rank),
    )


def test_the_unit_oracle(form, device, poisoned_memory):
    """Computed by hand; product_topk's staircase of pairs would return the ids 0 and 1."""
    scores = torch.tensor([[2.0, 2.0], [4.0, -1.0], [0.0, 1.0]], device=device)
    cores = torch.tensor([[[[2.0, 0.0], [0.0, 2.0]]], [[[0.0, 1.0], [1.0, 0.0]]]], device=device)
    directions = leading_directions(cores.sum(0), torch.zeros(2, 1, 2, device=device))
    query, keys = _with_scores(scores, scores)
    weights, row_ids = tucker_topk(query, keys, cores, directions, 2, 2)
    assert row_ids.flatten().tolist() == [4, 0]
    assert weights.flatten(0, 2).tolist() == [[34, -8], [16, 8]]
    values = torch.tensor([[1.0, 2.0], [0, 0], [0, 0], [0, 0], [1, 1]], device=device)
    assert (weights * values[row_ids]).sum(2).flatten().tolist() == [50, 8]


@pytest.mark.parametrize(
    ("tokens", "heads", "num_keys", "rank", "cores", "queries", "topk", "final", "spread"),
    [
        (3, 2, 16, 2, 2, 1, 5, 7, 1),
        (2, 1, 23, 3, 1, 3, 23, 40, 2),  # k = N, not a power of two; F > K
        (1, 1, 1, 1, 1, 1, 1, 1, 1),
        (3, 2, 40, 2, 2, 2, 16, 3, 3),  # F < K
        (2, 1, 300, 2, 2, 1, 32, 200, 5),  # many blocks of keys, several tiles of pairs
        (2, 1, 50, 4, 4, 4, 7, 49, 0),  # all scores equal, and all pairs
        (1, 1, 60, 1, 3, 1, 20, 33, 0),  # all scores equal, more than the candidates hold
        (1, 1, 130, 2, 2, 1, 128, 768, 3),
        (0, 2, 16, 2, 2, 1, 5, 4, 1),
    ],
)
def test_ids_are_the_twins(
    tokens, heads, num_keys, rank, cores, queries, topk, final, spread, form, device,
    poisoned_memory,
):  # fmt: skip
    sizes = (tokens, heads, num_keys, rank, 5, cores, queries, spread)
    inputs = _integers(*sizes, device)
    weights, row_ids = tucker_topk(*inputs, topk, final)
    true_weights, true_row_ids = reference(*inputs, topk, final)
    assert weights.shape == (tokens, heads, final, cores) and row_ids.dtype == torch.int64
    assert torch.equal(row_ids, true_row_ids)
    assert torch.equal(weights, true_weights)
    if form == "triton" and 0 < topk < 100:
        # as on a GPU; the interpreter takes more reads at once
        one = kernels.tucker_topk(*inputs, topk, final, reads=1)
        assert torch.equal(one[1], true_row_ids) and torch.equal(one[0], true_weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_keys", "topk", "final", "heads"),
    [
        (1138, 32, 32, 1),
        (808, 42, 80, 2),
        (3578, 42, 42, 2),
        (1138, 128, 256, 1),
        (964, 128, 768, 1),
    ],
)
@pytest.mark.parametrize("queries", [1, 2], ids=["one query", "a query per rank"])
def test_ids_are_the_twins_at_the_sizes_of_the_papers(
    num_keys, topk, final, heads, queries, form, device, poisoned_memory
):
    """pytest -m slow tests/ops/test_tucker_topk.py"""
    tokens = 2 if device == "cpu" else 257
    inputs = _integers(tokens, heads, num_keys, 2, 24, 2, queries, 3, device, seed=num_keys)
    for ours, truth in zip(
        tucker_topk(*inputs, topk, final), reference(*inputs, topk, final), strict=True
    ):
        assert torch.equal(ours, truth)


def _with_scores(row_NA, column_NA):
    """A query and keys of width 1 with these scores."""
    keys = torch.stack((row_NA, column_NA))[:, None, :, :, None]
    return torch.ones(1, 2, 1, 1, device=row_NA.device), keys


@pytest.mark.parametrize(("equal", "above"), [(16, 0), (17, 3), (60, 3)])
def test_more_equal_scores_than_the_buffer_holds(equal, above, device, poisoned_memory):
    """2 KP = 16 candidates fit; the last score stands among `equal` equals, anywhere."""
    torch.manual_seed(equal)
    scores = 1 - torch.rand(90, 1, device=device)
    places = torch.randperm(90, device=device)
    scores[places[:equal]] = 2.0
    scores[places[equal : equal + above]] = 3 + torch.rand(above, 1, device=device)
    query, keys = _with_scores(scores, scores.flip(0))
    ones = torch.ones(1, 1, 1, 1, device=device)
    for topk, final in ((8, 9), (20, 8)):  # in the first stage, then in the second
        ours = kernels.tucker_topk(query, keys, ones, ones.expand(2, 1, 1, 1)[..., 0], topk, final)
        truth = reference(query, keys, ones, ones.expand(2, 1, 1, 1)[..., 0], topk, final)
        assert torch.equal(ours[1], truth[1]) and torch.equal(ours[0], truth[0])


def test_scores_that_all_but_tie(device, poisoned_memory):
    """Neighbouring numbers, more of them than the buffer holds: bisection ends at the right one."""
    bits = torch.tensor(1.0, device=device).view(torch.int32) + torch.arange(100, device=device)
    scores = bits.int().view(torch.float32)[torch.randperm(100, device=device)].unsqueeze(-1)
    ones = torch.ones(1, 1, 1, 1, device=device)
    for sign in (1, -1):
        query, keys = _with_scores(sign * scores, torch.ones_like(scores))
        given = (query, keys, ones, ones[0].expand(2, 1, 1), 8, 20)
        ours, truth = kernels.tucker_topk(*given), reference(*given)
        assert torch.equal(ours[1], truth[1]) and torch.equal(ours[0], truth[0])


def test_pieces_of_tokens_are_the_whole(form, device, monkeypatch, own_choices, poisoned_memory):
    """Scores are formed for a few tokens at a time, the last time for fewer."""
    inputs = _integers(7, 2, 20, 2, 3, 2, 1, 2, device)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    weights, row_ids = reference(*inputs, 4, 6)
    grad = torch.randint(-3, 4, weights.shape, device=device).float()
    truth = (weights, row_ids, *torch.autograd.grad(weights, leaves, grad))
    choices.use(choices.current().changed("product_topk", score_bytes=3 * 8 * 2 * 20 * 2))
    assert kernels.tokens_of_a_piece(20, 2, 2) == 3
    monkeypatch.setattr("megamem.reference.tucker_topk.PIECE", 3 * 2 * 2 * 20 * 2)
    scored = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a, **k: (scored.append(a[0].shape), bmm(*a, **k))[1])
    weights, row_ids = tucker_topk(*inputs, 4, 6)
    if form == "triton":
        assert [shape[1] for shape in scored] == [3, 3, 1]
    ours = (weights, row_ids, *torch.autograd.grad(weights, leaves, grad))
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize(
    ("dtype", "queries"),
    [(torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 2), (torch.float16, 2)],
    ids=str,
)
def test_weights_and_gradients(dtype, queries, form, device, poisoned_memory):
    torch.manual_seed(1)
    query = torch.randn(5, 2, queries, 12, device=device).to(dtype)
    keys = torch.randn(2, 2, 21, 2, 12, device=device).to(dtype)
    cores = torch.rand(2, 2, 2, 2, device=device)
    directions = torch.rand(2, 2, 2, device=device)
    grad = torch.randn(5, 2, 11, 2, device=device)

    def run(op, dtype):
        q, k = (x.to(dtype, copy=True).requires_grad_() for x in (query, keys))
        c = cores.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
        weights, rows = op(q, k, c, directions, 6, 11)
        weights.backward(grad.to(weights.dtype))
        gradients = {"dquery": q.grad, "dkeys": k.grad, "dcores": c.grad}
        return {"weights": weights.detach(), **gradients}, rows

    (ours, rows), (twin, _), (truth, true_rows) = (
        run(*case)
        for case in ((tucker_topk, dtype), (reference, dtype), (reference, torch.float64))
    )
    assert torch.equal(rows, true_rows)
    for name in truth:
        assert_as_good_as_torch(name, ours[name], twin[name], truth[name])


@pytest.mark.parametrize(
    ("rank", "cores", "topk", "final"), [(1, 1, 3, 2), (3, 3, 9, 70), (2, 2, 12, 140)]
)
def test_gradients_of_whole_numbers(rank, cores, topk, final, form, device, poisoned_memory):
    """Exact sums, with several blocks of pairs and a core that is no power of two."""
    inputs = _integers(2, 2, 15, rank, 4, cores, rank, 2, device)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    found = []
    for op in (tucker_topk, reference):
        weights, row_ids = op(*inputs, topk, final)
        torch.manual_seed(3)
        grad = torch.randint(-2, 3, weights.shape, device=device).float()
        found.append((row_ids, *torch.autograd.grad(weights, leaves, grad)))
    for name, a, b in zip(("ids", "dquery", "dkeys", "dcores"), *found, strict=True):
        assert torch.equal(a, b), name


def test_only_wanted_gradients(form, device):
    query, keys, cores, directions = _integers(3, 2, 12, 2, 4, 2, 1, 2, device)
    keys.requires_grad_()
    weights, row_ids = tucker_topk(query, keys, cores, directions, 3, 5)
    assert not row_ids.requires_grad
    weights.sum().backward()
    assert query.grad is None and keys.grad is not None and cores.grad is None


def test_mixed_dtypes_meet_in_the_wider(form, device):
    query, keys, cores, directions = _integers(3, 2, 12, 2, 4, 2, 1, 2, device)
    keys, cores = keys.bfloat16().requires_grad_(), cores.bfloat16().requires_grad_()
    query.requires_grad_()
    weights, _ = tucker_topk(query, keys, cores, directions, 3, 5)
    weights.sum().backward()
    assert weights.dtype == query.grad.dtype == torch.float32
    assert keys.grad.dtype == cores.grad.dtype == torch.bfloat16


def test_five_runs_agree_bit_for_bit(form, device):
    torch.manual_seed(2)
    query = torch.randn(3, 2, 1, 8, device=device, requires_grad=True)
    keys = torch.randn(2, 1, 12, 2, 8, device=device, requires_grad=True)
    cores = torch.rand(2, 1, 2, 2, device=device, requires_grad=True)
    directions = torch.rand(2, 1, 2, device=device)
    grad = torch.randn(3, 1, 7, 2, device=device)

    def run():
        weights, row_ids = tucker_topk(query, keys, cores, directions, 4, 7)
        return weights, row_ids, *torch.autograd.grad(weights, (query, keys, cores), grad)

    first, *others = (run() for _ in range(5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_nan_and_infinities(form, device):
    """NaN is the highest score, as torch orders it; -0 equals 0."""
    row = torch.arange(20.0, device=device)[:, None]
    row[[3, 11, 7, 15], 0] = torch.tensor([torch.nan, torch.nan, -0.0, torch.inf], device=device)
    column = torch.arange(20.0, device=device).flip(0)[:, None] - 10
    column[5] = -torch.inf
    ones = torch.ones(1, 1, 1, 1, device=device)
    for pair in ((row, column), (column, row)):
        for sign in (1, -1):
            given = (*_with_scores(*pair), ones, sign * ones[0].expand(2, 1, 1), 7, 12)
            (weights, row_ids), (true_weights, true_row_ids) = (
                tucker_topk(*given),
                reference(*given),
            )
            assert weights.isnan().any() and torch.equal(row_ids, true_row_ids)
            torch.testing.assert_close(weights, true_weights, rtol=0, atol=0, equal_nan=True)
    query, keys = _with_scores(row, column)
    weights, row_ids = tucker_topk(query * torch.nan, keys, ones, ones[0].expand(2, 1, 1), 2, 3)
    assert weights.isnan().all() and row_ids.flatten().tolist() == [0, 1, 20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 7}, "topk is 7, but it must be between 1 and the 6 keys"),
        ({"topk": 0}, "topk is 0, but"),
        ({"final": 5}, "final_topk is 5, but 2 rows and 2 columns have 1 to 4 pairs"),
        ({"final": 0}, "final_topk is 0, but"),
        ({"query": (3, 2, 3, 4)}, "need .tokens, 2, 2 or 1, 4."),
        ({"query": (3, 2, 8)}, "they must be"),
        ({"cores": (2, 1, 2, 3)}, "need .cores, 1, 2, 2."),
        ({"cores": (0, 1, 2, 2)}, "need .cores, 1, 2, 2."),
        ({"directions": (2, 2)}, "need .2, 1, 2."),
        ({"keys": (2, 1, 46341, 2, 4)}, "at most 46340"),
    ],
)
def test_errors_for_people(change, message, device):
    shapes = {"query": (3, 2, 1, 4), "keys": (2, 1, 6, 2, 4), "cores": (2, 1, 2, 2)}
    shapes |= {"directions": (2, 1, 2), "topk": 2, "final": 4} | change
    topk, final = shapes.pop("topk"), shapes.pop("final")
    inputs = [torch.zeros(1, device=device).expand(shape) for shape in shapes.values()]
    with pytest.raises(ValueError, match=message):
        tucker_topk(*inputs, topk, final)


def test_inputs_that_do_not_fit_each_other():
    inputs = _integers(3, 1, 6, 2, 4, 2, 1, 2, "cpu")
    for place, name in enumerate(("queries", "keys", "cores", "directions")):
        given = [x.long() if i == place else x for i, x in enumerate(inputs)]
        with pytest.raises(ValueError, match=f"{name} must be floating point"):
            tucker_topk(*given, 2, 4)
    with pytest.raises(ValueError, match="use one device"):
        tucker_topk(*inputs[:3], inputs[3].to("meta"), 2, 4)


def test_more_rows_than_the_kernel_keeps(device, monkeypatch):
    """torch computes them by default; the kernel refuses, if it was asked for by name."""
    inputs = _integers(1, 1, 140, 2, 2, 1, 1, 2, device)
    for topk, final in ((129, 3), (33, 1025)):
        monkeypatch.delenv(forms.ENVIRONMENT, raising=False)
        ours, truth = (op(*inputs, topk, final) for op in (tucker_topk, reference))
        assert torch.equal(ours[0], truth[0]) and torch.equal(ours[1], truth[1])
        monkeypatch.setenv(forms.ENVIRONMENT, "tucker_topk=triton")
        with pytest.raises(ValueError, match="at most 128 rows .* drop tucker_topk=triton"):
            tucker_topk(*inputs, topk, final)
