"""row_dot against its twin and float64, outputs and all gradients."""

import pytest
import torch
from hypothesis import given
from torch import Tensor

from megamem.ops import row_dot
from megamem.reference.row_dot import row_dot as reference
from tests.helpers.closeness import assert_as_good_as_torch
from tests.ops.batches import BATCHES, Batch, make_batch
from tests.ops.test_properties import EPS, FEW, batches


def _run(op, batch: Batch, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """`grad_GV` serves as the vectors of the bags, `weights_M` as the gradient of the dots."""
    values, vectors = (
        x.to(dtype, copy=True).requires_grad_() for x in (batch.values_rV, batch.grad_GV)
    )
    dots = op(values, vectors, batch.row_ids_M, batch.offsets, **options)
    dots.backward(batch.weights_M.to(dots.dtype))
    return {"dots": dots.detach(), "dvalues": values.grad, "dvectors": vectors.grad}


def _rounded(batch: Batch, dtype: torch.dtype) -> Batch:
    return batch._replace(
        values_rV=batch.values_rV.to(dtype).float(), grad_GV=batch.grad_GV.to(dtype).float()
    )


def test_the_twin_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    vectors = torch.tensor([[1.0, 10.0], [float("nan"), 1.0], [2.0, 1.0]], dtype=torch.bfloat16)
    # two bags and an empty one between; the absent lookup of a NaN bag reads nothing
    dots = reference(values, vectors, torch.tensor([1, 0, -1, 1]), torch.tensor([0, 2, 3, 4]))
    assert dots.dtype == torch.float32 and dots.tolist() == [43, 21, 0, 10]


CASES = [(name, torch.float32) for name in BATCHES]
CASES += [("most absent", dtype) for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_against_twin(name, dtype, device, poisoned_memory):
    batch = _rounded(make_batch(**BATCHES[name], device=device), dtype)
    ours, same_dtype = (_run(op, batch, dtype) for op in (row_dot, reference))
    truth = _run(reference, batch, torch.float64)
    assert (ours["dots"][batch.row_ids_M < 0] == 0).all()
    for key in truth:
        assert_as_good_as_torch(key, ours[key], same_dtype[key], truth[key])


@FEW
@given(batches())
def test_row_dot_errs_no_more_than_rounding_must(batch):
    """n roundings of a sum in any order: at most n * eps times the sum of its absolute values."""
    ours = _run(row_dot, batch, torch.float32)
    truth = _run(reference, batch, torch.float64)
    # ids keep their sign, so absent lookups stay absent
    absolute = Batch(*(x.abs() if x.is_floating_point() else x for x in batch))
    bounds = _run(reference, absolute, torch.float64)
    roundings = len(batch.row_ids_M) + batch.values_rV.shape[1] + 2
    for key, bound in bounds.items():
        assert ((ours[key].double() - truth[key]).abs() <= roundings * EPS * bound + 1e-45).all()


@pytest.mark.parametrize(
    ("name", "buffer_dtype"),
    [("ragged and empty bags", torch.float32), ("duplicates", torch.bfloat16)],
    ids=str,
)
def test_gradient_added_to_a_buffer(name, buffer_dtype, device, poisoned_memory):
    """Even where nothing else wants a gradient; rows that were not read stay as they are."""
    batch = make_batch(**BATCHES[name], device=device)
    start = torch.randn_like(batch.values_rV).to(buffer_dtype)
    truth = start.double() + _run(reference, batch, torch.float64)["dvalues"]
    in_torch = (start + _run(reference, batch, torch.float32)["dvalues"]).to(buffer_dtype)
    for wanted in (True, False):
        buffer, vectors = start.clone(), batch.grad_GV.clone().requires_grad_(wanted)
        dots = row_dot(
            batch.values_rV, vectors, batch.row_ids_M, batch.offsets, add_value_grad_to=buffer
        )
        dots.backward(batch.weights_M)
        assert_as_good_as_torch("buffer", buffer, in_torch, truth)
        idle = torch.ones(len(start), dtype=torch.bool, device=device)
        idle[batch.row_ids_M[batch.row_ids_M >= 0]] = False
        assert torch.equal(buffer[idle], start[idle])
    expected = _run(row_dot, batch, torch.float32)["dvectors"]
    vectors = batch.grad_GV.clone().requires_grad_()
    dots = row_dot(
        batch.values_rV, vectors, batch.row_ids_M, batch.offsets, add_value_grad_to=start
    )
    dots.backward(batch.weights_M)
    assert torch.equal(vectors.grad, expected)


def test_five_runs_agree_bit_for_bit(device):
    batch = make_batch([50, 20], num_rows=9, width=8, absent=0.2, device=device)
    first, *others = (_run(row_dot, batch, torch.float32) for _ in range(5))
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


@pytest.mark.parametrize("wanted", ["values", "vectors", "neither"])
def test_only_wanted_gradients(wanted, device, poisoned_memory):
    batch = make_batch([12, 3], num_rows=7, width=16, device=device)
    values = batch.values_rV.clone().requires_grad_(wanted == "values")
    vectors = batch.grad_GV.clone().requires_grad_(wanted == "vectors")
    dots = row_dot(values, vectors, batch.row_ids_M, batch.offsets)
    assert dots.requires_grad == (wanted != "neither")
    truth = _run(reference, batch._replace(weights_M=torch.ones(15, device=device)), torch.float32)
    if dots.requires_grad:
        # an expanded gradient is not contiguous
        dots.sum().backward()
    for key, x in (("values", values), ("vectors", vectors)):
        if wanted == key:
            torch.testing.assert_close(x.grad, truth[f"d{key}"])
        else:
            assert x.grad is None


def test_a_cpu_trains_on_the_twin(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    batch = make_batch([6, 2], num_rows=5, width=8, absent=0.2)
    ours, twin = (_run(op, batch, torch.float32) for op in (row_dot, reference))
    assert all(torch.equal(ours[key], twin[key]) for key in twin)
    buffer = torch.zeros_like(batch.values_rV)
    by_buffer = _run(row_dot, batch, torch.float32, add_value_grad_to=buffer)
    torch.testing.assert_close(buffer, twin["dvalues"])
    assert torch.equal(by_buffer["dvectors"], twin["dvectors"]) and by_buffer["dvalues"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values_rV": torch.zeros(5, 12)}, "multiple of 8"),
        ({"row_ids_M": torch.tensor([0, 5])}, "row id 5 is out of range for a table of 5 rows"),
        ({"row_ids_M": torch.tensor([0, -2])}, "row id -2"),
        ({"row_ids_M": torch.tensor([0, 5]), "check_row_ids": True}, "row id 5"),
        ({"offsets": torch.tensor([0, 3])}, "offsets go from 0 to 3 for 2 lookups"),
        ({"vectors_GV": torch.zeros(2, 8)}, "1 bags and rows of width 8 need one"),
        ({"vectors_GV": torch.zeros(1, 16)}, "vectors have shape"),
        ({"vectors_GV": torch.zeros(1, 8, dtype=torch.int32)}, "floating point"),
        ({"vectors_GV": torch.zeros(1, 8, device="meta")}, "vectors must be on cpu"),
        ({"add_value_grad_to": torch.zeros(4, 8)}, "shape of the table"),
    ],
)
def test_errors_for_people(change, message):
    good = {
        "values_rV": torch.zeros(5, 8),
        "vectors_GV": torch.ones(1, 8),
        "row_ids_M": torch.tensor([0, 4]),
        "offsets": torch.tensor([0, 2]),
    }
    row_dot(**good)
    with pytest.raises(ValueError, match=message):
        row_dot(**{**good, **change})
