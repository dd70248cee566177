"""product_topk against its twin: ids exactly, scores and gradients as good as torch's."""

import pytest
import torch

from megamem.ops import product_topk
from megamem.reference.product_topk import product_topk as reference
from tests.helpers.closeness import assert_as_good_as_torch


def _integers(tokens, heads, num_keys, key_dim, spread, device, seed=0):
    """Small integers: scores are exact, and ties are everywhere."""
    torch.manual_seed(seed)
    low, high = -spread, spread + 1
    query = torch.randint(low, high, (tokens, heads, 2 * key_dim), device=device).float()
    return query, torch.randint(low, high, (2, heads, num_keys, key_dim), device=device).float()


@pytest.mark.parametrize(
    ("tokens", "heads", "num_keys", "key_dim", "topk", "spread"),
    [
        (3, 2, 16, 4, 5, 1),
        (1, 1, 1, 1, 1, 1),
        (2, 1, 23, 3, 23, 1),  # k = N, not a power of two
        (18, 2, 40, 20, 4, 2),  # two programs of tokens, two blocks of width
        (3, 1, 300, 6, 8, 9),  # many blocks of keys
        (2, 1, 50, 4, 7, 0),  # all scores equal
        (1, 1, 70, 4, 64, 1),
        (0, 2, 16, 4, 5, 1),
    ],
)
def test_ids_are_the_twins(tokens, heads, num_keys, key_dim, topk, spread, device, poisoned_memory):
    query, sub_keys = _integers(tokens, heads, num_keys, key_dim, spread, device)
    scores, rows = product_topk(query, sub_keys, topk)
    true_scores, true_rows = reference(query, sub_keys, topk)
    assert torch.equal(rows, true_rows)
    assert torch.equal(scores, true_scores)


@pytest.mark.parametrize("kept", [7, 8, 9])
def test_a_buffer_filled_to_its_last_slot(kept, device, poisoned_memory):
    """A first block passes whole, of the second about half, the third whole, its last key best."""
    topk = 8 if device == "cpu" else 32
    block, kept = 2 * topk, kept * topk // 8
    scores = torch.ones(3 * block, device=device)
    scores[block : block + kept] = 2
    scores[block + kept : 2 * block] = 0
    scores[2 * block :] = torch.arange(3, 3 + block)
    sub_keys = scores.view(1, 1, -1, 1).repeat(2, 1, 1, 1)
    query = torch.ones(1, 1, 2, device=device)
    ours, truth = (op(query, sub_keys, topk) for op in (product_topk, reference))
    assert torch.equal(ours[0], truth[0]) and torch.equal(ours[1], truth[1])


@pytest.mark.slow
@pytest.mark.parametrize("topk", [1, 16, 33, 64])
@pytest.mark.parametrize("num_keys", [64, 1000, 4096, 16384])
def test_ids_are_the_twins_at_every_size(num_keys, topk, device, poisoned_memory):
    tokens = 2 if device == "cpu" else 257
    query, sub_keys = _integers(tokens, 2, num_keys, 24, 3, device, seed=num_keys)
    scores, rows = product_topk(query, sub_keys, topk)
    true_scores, true_rows = reference(query, sub_keys, topk)
    assert torch.equal(rows, true_rows)
    assert torch.equal(scores, true_scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_and_gradients(dtype, device, poisoned_memory):
    torch.manual_seed(1)
    query = torch.randn(5, 2, 24, device=device).to(dtype)
    sub_keys = torch.randn(2, 2, 21, 12, device=device).to(dtype)
    grad = torch.randn(5, 2, 6, device=device)

    def run(op, dtype):
        q, k = (x.to(dtype, copy=True).requires_grad_() for x in (query, sub_keys))
        scores, rows = op(q, k, 6)
        scores.backward(grad.to(scores.dtype))
        return {"scores": scores.detach(), "dquery": q.grad, "dkeys": k.grad}, rows

    (ours, rows), (twin, _), (truth, true_rows) = (
        run(*case)
        for case in ((product_topk, dtype), (reference, dtype), (reference, torch.float64))
    )
    assert torch.equal(rows, true_rows)
    for name in truth:
        assert_as_good_as_torch(name, ours[name], twin[name], truth[name])


def test_mixed_dtypes_meet_in_the_wider(device):
    query, sub_keys = _integers(3, 2, 12, 4, 2, device)
    query.requires_grad_()
    sub_keys = sub_keys.bfloat16().requires_grad_()
    scores, _ = product_topk(query, sub_keys, 3)
    scores.sum().backward()
    assert query.grad.dtype == torch.float32 and sub_keys.grad.dtype == torch.bfloat16


def test_only_wanted_gradients(device):
    query, sub_keys = _integers(3, 2, 12, 4, 2, device)
    sub_keys.requires_grad_()
    scores, rows = product_topk(query, sub_keys, 3)
    assert not rows.requires_grad
    scores.sum().backward()
    assert query.grad is None and sub_keys.grad is not None


def test_five_runs_agree_bit_for_bit(device):
    torch.manual_seed(2)
    query = torch.randn(3, 1, 16, device=device, requires_grad=True)
    sub_keys = torch.randn(2, 1, 12, 8, device=device, requires_grad=True)

    def run():
        scores, rows = product_topk(query, sub_keys, 4)
        return scores, rows, *torch.autograd.grad(scores.square().sum(), (query, sub_keys))

    first, *others = (run() for _ in range(5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_extreme_scores(device):
    """Infinities keep their order, -0 equals 0, and NaN leads to no row that does not exist."""
    sub_keys = torch.zeros(2, 1, 20, 1, device=device)
    sub_keys[0, 0, :4, 0] = torch.tensor([-float("inf"), 3e38, float("inf"), -0.0])
    query = torch.ones(2, 1, 2, device=device)
    scores, rows = product_topk(query, sub_keys, 3)
    assert rows[0, 0].tolist() == [40, 41, 42] and scores.isinf().all()
    finite = sub_keys.clone()
    finite[0, 0, 2] = 0.0
    _, rows = product_topk(query, finite, 5)
    assert torch.equal(rows, reference(query, finite, 5)[1])
    _, rows = product_topk(query * float("nan"), sub_keys, 5)
    assert ((rows >= 0) & (rows < 400)).all()


@pytest.mark.parametrize(
    ("query", "sub_keys", "topk", "message"),
    [
        ((2, 1, 8), (2, 1, 100, 4), 65, "at most 64"),
        ((2, 1, 8), (2, 1, 6, 4), 7, "topk 7 of 6"),
        ((2, 1, 8), (2, 1, 6, 4), 0, "topk 0 of 6"),
        ((2, 1, 10), (2, 1, 6, 4), 2, "1 heads of width 8"),
        ((2, 8), (2, 1, 6, 4), 2, "are needed"),
    ],
)
def test_errors_for_people(query, sub_keys, topk, message, device):
    with pytest.raises(ValueError, match=message):
        product_topk(torch.zeros(query, device=device), torch.zeros(sub_keys, device=device), topk)


def test_inputs_that_do_not_fit_each_other():
    query, sub_keys = torch.zeros(2, 1, 8), torch.zeros(2, 1, 6, 4)
    with pytest.raises(ValueError, match="use one device"):
        product_topk(query, sub_keys.to("meta"), 2)
    for pair in ((query.long(), sub_keys), (query, sub_keys.int())):
        with pytest.raises(ValueError, match="must be floating point"):
            product_topk(*pair, 2)
    with pytest.raises(ValueError, match="at most 46340"):
        product_topk(query, torch.zeros(2, 1, 46341, 4), 2)


def test_a_cpu_trains_on_the_twin_at_any_topk(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query, sub_keys = _integers(2, 1, 80, 4, 2, "cpu")
    ours, truth = (op(query, sub_keys, 70) for op in (product_topk, reference))
    assert torch.equal(ours[0], truth[0]) and torch.equal(ours[1], truth[1])
