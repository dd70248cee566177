"""product_topk against its twin: ids exactly, scores and gradients as good as torch's."""

import pytest
import torch

from megamem.kernels import choices
from megamem.kernels import product_topk as kernels
from megamem.ops import forms, product_topk
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
        (1, 1, 130, 4, 128, 2),
        (0, 2, 16, 4, 5, 1),
    ],
)
def test_ids_are_the_twins(
    tokens, heads, num_keys, key_dim, topk, spread, form, device, poisoned_memory
):
    query, sub_keys = _integers(tokens, heads, num_keys, key_dim, spread, device)
    scores, rows = product_topk(query, sub_keys, topk)
    true_scores, true_rows = reference(query, sub_keys, topk)
    assert torch.equal(rows, true_rows)
    assert torch.equal(scores, true_scores)


@pytest.fixture(params=["two_looks", "torch", "fused"])
def form(request, monkeypatch) -> str:
    """Every form, whichever is the default on this device."""
    monkeypatch.setenv(forms.ENVIRONMENT, f"product_topk={request.param}")
    return request.param


def _with_scores(left, right=None):
    """A query and sub-keys of width 1 whose scores are these."""
    halves = torch.stack((left, left if right is None else right))
    return torch.ones(1, 1, 2, device=left.device), halves.view(2, 1, -1, 1)


@pytest.mark.parametrize("equal", [15, 16, 17, 40])
@pytest.mark.parametrize("above", [0, 1, 7])
def test_more_equal_scores_than_the_buffer_holds(equal, above, device, poisoned_memory):
    """2 KP = 16 candidates fit; the K-th best score stands among `equal` equals, anywhere."""
    torch.manual_seed(equal)
    scores = -1 - torch.rand(90, device=device)
    places = torch.randperm(90, device=device)
    scores[places[:equal]] = 2.0
    scores[places[equal : equal + above]] = 3 + torch.rand(above, device=device)
    # the other half has none: each half is decided apart
    query, sub_keys = _with_scores(scores, torch.randn(90, device=device))
    ours = kernels.product_topk(query, sub_keys, 8)
    truth = reference(query, sub_keys, 8)
    assert torch.equal(ours[0], truth[0]) and torch.equal(ours[1], truth[1])


@pytest.mark.parametrize("spread", [0, 1, 50], ids=["all equal", "many ties", "few ties"])
def test_one_read_a_program(spread, device, poisoned_memory):
    """As on a GPU; the interpreter takes sixteen."""
    query, sub_keys = _integers(3, 2, 100, 3, spread, device)
    ours, truth = kernels.product_topk(query, sub_keys, 9, reads=1), reference(query, sub_keys, 9)
    assert torch.equal(ours[0], truth[0]) and torch.equal(ours[1], truth[1])


def test_scores_that_all_but_tie(device, poisoned_memory):
    """Neighbouring numbers, more of them than the buffer holds: bisection ends at the right one."""
    bits = torch.tensor(1.0, device=device).view(torch.int32) + torch.arange(100, device=device)
    scores = bits.int().view(torch.float32)[torch.randperm(100, device=device)]
    for sign in (1, -1):
        query, sub_keys = _with_scores(sign * scores)
        ours = kernels.product_topk(query, sub_keys, 8)
        truth = reference(query, sub_keys, 8)
        assert torch.equal(ours[0], truth[0]) and torch.equal(ours[1], truth[1])


def test_pieces_of_tokens_are_the_whole(form, device, monkeypatch, own_choices, poisoned_memory):
    """Scores are formed for a few tokens at a time, the last time for fewer."""
    query, sub_keys = _integers(7, 2, 20, 4, 2, device)
    truth = reference(query, sub_keys, 4)
    choices.use(choices.current().changed("product_topk", score_bytes=3 * 8 * 2 * 20))
    assert kernels.tokens_of_a_piece(20, 2) == 3
    scored = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a, **k: (scored.append(a[0].shape), bmm(*a, **k))[1])
    ours = product_topk(query, sub_keys, 4)
    assert torch.equal(ours[0], truth[0]) and torch.equal(ours[1], truth[1])
    if form == "two_looks":
        assert [shape[1] for shape in scored] == [3, 3, 1]


def test_no_score_tensor_is_large():
    """64 MB at every size of real runs; a token's own scores where even one is more."""
    for num_keys in (128, 1024, 16384, 46340):
        for heads in (1, 4, 16):
            tokens = kernels.tokens_of_a_piece(num_keys, heads)
            assert tokens == 1 or tokens * 2 * heads * num_keys * 4 <= 2**26


@pytest.mark.slow
@pytest.mark.parametrize("topk", [1, 16, 33, 64, 128])
@pytest.mark.parametrize("num_keys", [128, 1000, 4096, 16384, 46340])
def test_ids_are_the_twins_at_every_size(num_keys, topk, form, device, poisoned_memory):
    tokens = 2 if device == "cpu" else 257
    query, sub_keys = _integers(tokens, 2, num_keys, 24, 3, device, seed=num_keys)
    scores, rows = product_topk(query, sub_keys, topk)
    true_scores, true_rows = reference(query, sub_keys, topk)
    assert torch.equal(rows, true_rows)
    assert torch.equal(scores, true_scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_and_gradients(dtype, form, device, poisoned_memory):
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


def test_five_runs_agree_bit_for_bit(form, device):
    torch.manual_seed(2)
    query = torch.randn(3, 1, 16, device=device, requires_grad=True)
    sub_keys = torch.randn(2, 1, 12, 8, device=device, requires_grad=True)

    def run():
        scores, rows = product_topk(query, sub_keys, 4)
        return scores, rows, *torch.autograd.grad(scores.square().sum(), (query, sub_keys))

    first, *others = (run() for _ in range(5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_extreme_scores(form, device):
    """Infinities keep their order, and -0 equals 0."""
    sub_keys = torch.zeros(2, 1, 20, 1, device=device)
    sub_keys[0, 0, :4, 0] = torch.tensor([-float("inf"), 3e38, float("inf"), -0.0])
    query = torch.ones(2, 1, 2, device=device)
    scores, rows = product_topk(query, sub_keys, 3)
    assert rows[0, 0].tolist() == [40, 41, 42] and scores.isinf().all()
    finite = sub_keys.clone()
    finite[0, 0, 2] = 0.0
    _, rows = product_topk(query, finite, 5)
    assert torch.equal(rows, reference(query, finite, 5)[1])


def test_nan_is_the_highest_score(form, device):
    """As torch orders it; of several the smaller row comes first."""
    left = torch.arange(40.0, device=device)
    left[[7, 31]] = torch.nan
    query, sub_keys = _with_scores(left, torch.arange(40.0, device=device).flip(0))
    for keys in (sub_keys, sub_keys.flip(0)):
        scores, rows = product_topk(query, keys, 3)
        assert scores.isnan().all()
        true_scores, true_rows = reference(query, keys, 3)
        assert torch.equal(rows, true_rows) and true_scores.isnan().all()
    assert product_topk(query, sub_keys, 3)[1].flatten().tolist() == [280, 281, 282]
    scores, rows = product_topk(query * torch.nan, sub_keys, 5)
    assert scores.isnan().all() and rows.flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("query", "sub_keys", "topk", "message"),
    [
        ((2, 1, 8), (2, 1, 6, 4), 7, "topk is 7, but it must be between 1 and the 6 sub-keys"),
        ((2, 1, 8), (2, 1, 6, 4), 0, "topk is 0, but"),
        ((2, 1, 10), (2, 1, 6, 4), 2, "1 heads of width 8"),
        ((2, 8), (2, 1, 6, 4), 2, "they must be"),
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


def test_more_rows_a_head_than_the_kernel_keeps(device, monkeypatch):
    """torch takes over, unless the kernel was asked for by name."""
    query, sub_keys = _integers(1, 1, 140, 4, 2, device)
    ours, truth = (op(query, sub_keys, 129) for op in (product_topk, reference))
    assert torch.equal(ours[0], truth[0]) and torch.equal(ours[1], truth[1])
    monkeypatch.setenv(forms.ENVIRONMENT, "product_topk=two_looks")
    with pytest.raises(ValueError, match="at most 128 .* drop product_topk=two_looks from MEGAMEM"):
        product_topk(query, sub_keys, 129)


def test_a_cpu_trains_on_the_twin_at_any_topk(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query, sub_keys = _integers(2, 1, 80, 4, 2, "cpu")
    ours, truth = (op(query, sub_keys, 70) for op in (product_topk, reference))
    assert torch.equal(ours[0], truth[0]) and torch.equal(ours[1], truth[1])
