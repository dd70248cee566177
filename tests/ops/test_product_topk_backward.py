"""The backward of product_topk by a dense gradient of the scores, in bf16 and fp32."""

import pytest
import torch
from torch import Tensor

from megamem.kernels import choices
from megamem.kernels import product_topk_backward as dense
from megamem.ops import forms, product_topk
from megamem.reference.product_topk import product_topk as reference
from tests.helpers.closeness import assert_as_good_as_torch


@pytest.fixture(autouse=True)
def _dense(monkeypatch) -> None:
    monkeypatch.setenv(forms.ENVIRONMENT, "product_topk_backward=dense")


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Numbers of tokens of the dense gradients that were made."""
    made: list[int] = []
    real = dense.score_gradient

    def counted(grad: Tensor, *rest) -> Tensor:  # type: ignore[no-untyped-def]
        made.append(len(grad))
        return real(grad, *rest)

    monkeypatch.setattr(dense, "score_gradient", counted)
    return made


def _gradients(op, query: Tensor, sub_keys: Tensor, topk: int, grad: Tensor, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (query, sub_keys)]
    scores, _ = op(*leaves, topk)
    return torch.autograd.grad(scores, leaves, grad.to(scores.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "num_keys", "key_dim", "topk"),
    [
        (5, 2, 21, 12, 6),
        (1, 1, 1, 1, 1),
        (70, 1, 100, 24, 8),
        (3, 3, 40, 7, 40),
        (2, 1, 530, 5, 33),
    ],
)
def test_as_good_as_torch(
    tokens, heads, num_keys, key_dim, topk, dtype, calls, device, poisoned_memory
):
    """Of torch's backward of the reference in the same dtype, and of float64."""
    torch.manual_seed(tokens)
    query = torch.randn(tokens, heads, 2 * key_dim, device=device).to(dtype)
    sub_keys = torch.randn(2, heads, num_keys, key_dim, device=device).to(dtype)
    grad = torch.randn(tokens, heads, topk, device=device)
    ours, twin, truth = (
        _gradients(op, query, sub_keys, topk, grad, kind)
        for op, kind in ((product_topk, dtype), (reference, dtype), (reference, torch.float64))
    )
    assert calls == [tokens]
    for name, *gradients in zip(("query", "sub-keys"), ours, twin, truth, strict=True):
        assert_as_good_as_torch(name, *gradients)


def test_bf16_stays_in_the_bound_of_the_docstring(device, poisoned_memory):
    """Per number: 2^-8 of the sum of absolute terms, and the rounding of the result."""
    torch.manual_seed(0)
    query = torch.randn(64, 1, 32, device=device).bfloat16()
    sub_keys = torch.randn(2, 1, 30, 16, device=device).bfloat16()
    grad = torch.randn(64, 1, 8, device=device)
    ours = _gradients(product_topk, query, sub_keys, 8, grad, torch.bfloat16)
    truth = _gradients(reference, query, sub_keys, 8, grad, torch.float64)
    _, rows = reference(query.double(), sub_keys.double(), 8)
    halves = torch.stack((rows // 30, rows % 30))[:, :, 0]
    scattered = torch.zeros(2, 64, 30, dtype=torch.float64, device=device)
    scattered.scatter_add_(2, halves, grad[:, 0].double().abs().expand(2, -1, -1))
    terms_query = torch.einsum("ztn,znc->tzc", scattered, sub_keys[:, 0].double().abs())
    split = query.double().abs().view(64, 2, 16)
    terms_keys = torch.einsum("ztn,tzc->znc", scattered, split)
    # the interpreter truncates to bf16, which errs twice as much as rounding to nearest
    unit = 2.0**-7 if device == "cpu" else 2.0**-8
    for mine, exact, terms in zip(ours, truth, (terms_query, terms_keys), strict=True):
        bound = unit * terms.reshape(exact.shape) + 2.0**-8 * exact.abs() + 1e-6
        assert ((mine.double() - exact).abs() <= bound).all()


def test_sub_keys_that_occur_in_many_pairs(calls, device, poisoned_memory):
    """One left sub-key is in all pairs of a read; sums are exact, and rounded once."""
    query = torch.ones(2, 1, 2, device=device)
    sub_keys = torch.zeros(2, 1, 20, 1, device=device)
    sub_keys[0, 0, 3] = 100.0
    sub_keys[1, 0, :, 0] = torch.arange(20.0, device=device)
    grad = torch.arange(1.0, 17.0, device=device).view(2, 1, 8)
    for dtype in (torch.float32, torch.bfloat16):
        ours, truth = (
            _gradients(op, query, sub_keys, 8, grad, kind)
            for op, kind in ((product_topk, dtype), (reference, torch.float64))
        )
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(ours, truth, strict=True))
    assert ours[1][0, 0, 3].item() == 136.0 and len(calls) == 2


def test_pieces_of_tokens_are_the_whole(own_choices, calls, device, poisoned_memory):
    torch.manual_seed(3)
    low, high = -2, 3
    query = torch.randint(low, high, (7, 2, 8), device=device).float()
    sub_keys = torch.randint(low, high, (2, 2, 20, 4), device=device).float()
    grad = torch.randint(low, high, (7, 2, 4), device=device).float()
    truth = _gradients(reference, query, sub_keys, 4, grad, torch.float64)
    choices.use(choices.current().changed("product_topk_backward", dense_bytes=3 * 2 * 2 * 20 * 4))
    ours = _gradients(product_topk, query, sub_keys, 4, grad, torch.float32)
    assert calls == [3, 3, 1]
    assert all(torch.equal(a.double(), b) for a, b in zip(ours, truth, strict=True))


def test_no_dense_gradient_is_large():
    for num_keys in (128, 1024, 2048):
        tokens = dense.tokens_of_a_piece(num_keys, 4, torch.bfloat16)
        assert tokens * 8 * num_keys * 2 <= 2**26


def test_five_runs_agree_bit_for_bit(device):
    torch.manual_seed(2)
    query = torch.randn(9, 1, 16, device=device).bfloat16()
    sub_keys = torch.randn(2, 1, 12, 8, device=device).bfloat16()
    grad = torch.randn(9, 1, 10, device=device)
    runs = [_gradients(product_topk, query, sub_keys, 10, grad, torch.bfloat16) for _ in range(5)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_only_wanted_gradients(calls, device):
    query = torch.randn(3, 2, 8, device=device)
    sub_keys = torch.randn(2, 2, 12, 4, device=device)
    for wanted in (query, sub_keys):
        wanted.requires_grad_()
        product_topk(query, sub_keys, 3)[0].sum().backward()
        assert wanted.grad is not None
        wanted.requires_grad_(False)
    assert sub_keys.grad.shape == sub_keys.shape and len(calls) == 2
    # neither call has touched the other's
    first = query.grad.clone()
    sub_keys.requires_grad_()
    product_topk(query, sub_keys, 3)[0].sum().backward()
    assert torch.equal(query.grad, first)


def test_no_tokens(device):
    query = torch.randn(0, 2, 8, device=device)
    sub_keys = torch.randn(2, 2, 12, 4, device=device)
    ours = _gradients(product_topk, query, sub_keys, 3, torch.zeros(0, 2, 3), torch.float32)
    assert ours[0].shape == query.shape and not ours[1].any()


@pytest.mark.parametrize(
    ("num_keys", "dtype"),
    [(2049, torch.bfloat16), (20, torch.float16), (20, torch.float64)],
    ids=str,
)
def test_other_inputs_go_to_the_bags(num_keys, dtype, calls, device):
    query = torch.ones(1, 1, 4, device=device)
    sub_keys = torch.arange(4.0 * num_keys, device=device).view(2, 1, num_keys, 2) % 7
    grad = torch.ones(1, 1, 2, device=device)
    ours = _gradients(product_topk, query, sub_keys, 2, grad, dtype)
    truth = _gradients(reference, query, sub_keys, 2, grad, torch.float64)
    assert calls == []
    assert all(torch.equal(a.double(), b) for a, b in zip(ours, truth, strict=True))
