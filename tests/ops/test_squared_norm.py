"""The gradient norm of a table: each form against float64, and which form is used."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megamem.kernels import squared_norm as kernels
from megamem.ops import squared_norm
from megamem.reference.squared_norm import squared_norm as reference
from megamem.row_gradient import RowGradient

FORMS = ("torch", "triton")
POISON = float("nan")


def _table(rows: int, width: int, dtype: torch.dtype, device, seed: int = 0) -> tuple[Tensor, ...]:
    """Gradients that are zero where no row was touched, and which rows were."""
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(rows, width, generator=generator) * 1e3
    touched = torch.rand(rows, generator=generator) < 0.4
    grads[~touched] = 0
    return grads.to(dtype).to(device), touched.to(device)


def _exact(grads: Tensor) -> float:
    return math.fsum(number**2 for number in grads.double().flatten().tolist())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 8), (63, 24), (65, 1000), (200, 40), (3, 2048), (130, 1032)]
)
def test_the_sum_is_that_of_float64(monkeypatch, device, form, dtype, rows, width) -> None:
    monkeypatch.setenv("MEGAMEM_FORMS", f"squared_norm={form}")
    grads, touched = _table(rows, width, dtype, device)
    exact = _exact(grads)
    for found in (
        squared_norm(grads, touched),
        squared_norm(grads, touched, few=True),
        reference(grads, touched),
        reference(grads),
    ):
        assert found.dtype == torch.float64 and found.shape == ()
        assert found.item() == pytest.approx(exact, rel=1e-13)


def test_rows_that_were_not_touched_are_not_read(monkeypatch, device) -> None:
    """Memory around the table is poisoned, too."""
    monkeypatch.setenv("MEGAMEM_FORMS", "squared_norm=triton")
    for width in (8, 24, 1000):
        around = torch.full((3, 70, width), POISON, device=device)
        grads, touched = _table(70, width, torch.float32, device, seed=width)
        around[1] = grads
        exact = _exact(grads)
        around[1][~touched] = POISON
        assert squared_norm(around[1], touched).item() == pytest.approx(exact, rel=1e-13)
        assert squared_norm(around[1], torch.zeros_like(touched)).item() == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_shows(monkeypatch, device, form, bad) -> None:
    monkeypatch.setenv("MEGAMEM_FORMS", f"squared_norm={form}")
    grads, touched = _table(129, 72, torch.float32, device)
    row = touched.nonzero()[-1]
    grads[row, 71] = bad
    assert not squared_norm(grads, touched).isfinite()


def test_runs_agree_bit_for_bit(monkeypatch, device) -> None:
    monkeypatch.setenv("MEGAMEM_FORMS", "squared_norm=triton")
    grads, touched = _table(300, 72, torch.float32, device)
    first = squared_norm(grads, touched)
    assert all(torch.equal(squared_norm(grads, touched), first) for _ in range(3))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 200), st.integers(1, 40), st.integers(0, 2**20))
def test_any_shape(rows: int, blocks: int, seed: int) -> None:
    grads, touched = _table(rows, 8 * blocks, torch.float32, "cpu", seed)
    found = kernels.squared_norm(grads, touched)
    assert found.item() == pytest.approx(_exact(grads), rel=1e-13)


def test_torch_is_the_form_until_the_kernel_has_run_on_a_gpu(monkeypatch, device) -> None:
    launched = []
    monkeypatch.setattr(kernels, "squared_norm", lambda *_: launched.append(1) or torch.zeros(()))
    gradient = RowGradient(torch.zeros(9, 8, device=device))
    gradient.squared_norm()
    assert not launched
    monkeypatch.setenv("MEGAMEM_FORMS", "squared_norm=triton")
    gradient.squared_norm()
    gradient.squared_norm(by_row=True)
    assert len(launched) == 2


@pytest.mark.parametrize(
    ("grads", "touched", "message"),
    [
        (torch.zeros(4), torch.zeros(4).bool(), r"of shape \[rows, width\], not .*\(4,\)"),
        (torch.zeros(4, 8).int(), torch.zeros(4).bool(), "floating point .* not torch.int32"),
        (torch.zeros(4, 8), torch.zeros(3).bool(), r"one entry per row, 4, .* has shape \(3,\)"),
    ],
)
def test_what_does_not_fit_is_named(grads, touched, message) -> None:
    with pytest.raises(ValueError, match=message):
        squared_norm(grads, touched)
