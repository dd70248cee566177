"""embedding_bag against its twin and float64, outputs and all gradients."""

import pytest
import torch
from torch import Tensor

from megamem.ops import Known, add_value_gradient_, embedding_bag, sparse_gradients
from megamem.ops.row_buffer import RowBuffer
from megamem.reference.embedding_bag import embedding_bag as reference
from tests.helpers.closeness import assert_as_good_as_torch
from tests.ops.batches import BATCHES, Batch, make_batch

HALF = [torch.bfloat16, torch.float16]


def _run(op, batch: Batch, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """The table is rounded to `dtype` for every op alike, so that float64 sees the same numbers."""
    accumulate = torch.promote_types(dtype, torch.float32)
    values = batch.values_rV.to(dtype, copy=True).requires_grad_()
    weights = batch.weights_M.to(accumulate, copy=True).requires_grad_()
    out = op(values, batch.row_ids_M, weights, batch.offsets, **options)
    out.backward(batch.grad_GV.to(dtype))
    return {"out": out.detach(), "dvalues": values.grad, "dweights": weights.grad}


def _rounded(batch: Batch, dtype: torch.dtype) -> Batch:
    return batch._replace(
        values_rV=batch.values_rV.to(dtype).float(), grad_GV=batch.grad_GV.to(dtype).float()
    )


CASES = [(name, torch.float32) for name in BATCHES]
# the dtype changes loads and stores only
CASES += [(name, dtype) for name in ("most absent", "one row takes all") for dtype in HALF]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_against_twin(name, dtype, device, poisoned_memory):
    batch = _rounded(make_batch(**BATCHES[name], device=device), dtype)
    ours = _run(embedding_bag, batch, dtype)
    same_dtype = _run(reference, batch, dtype)
    truth = _run(reference, batch, torch.float64)
    for key in truth:
        assert_as_good_as_torch(key, ours[key], same_dtype[key], truth[key])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("width", [8, 16, 24, 72, 128, 200, 256, 384, 520, 768, 1288, 2048, 2056])
def test_any_width_in_any_dtype(width, dtype, device, poisoned_memory):
    batch = make_batch([0, 37, 3, 0, 60], num_rows=13, width=width, absent=0.1, device=device)
    batch = _rounded(batch, dtype)
    ours, same_dtype = (_run(op, batch, dtype) for op in (embedding_bag, reference))
    truth = _run(reference, batch, torch.float64)
    for key in truth:
        assert_as_good_as_torch(key, ours[key], same_dtype[key], truth[key])


def test_narrow_ids_and_weights(device, poisoned_memory):
    """int32 ids and offsets, as ranks exchange them, and weights of the table's dtype."""
    batch = make_batch([9, 0, 5], num_rows=6, width=16, absent=0.2, device=device)
    batch = batch._replace(weights_M=batch.weights_M.bfloat16().float())
    wide = _run(embedding_bag, batch, torch.float32)
    weights = batch.weights_M.bfloat16().requires_grad_()
    values = batch.values_rV.clone().requires_grad_()
    out = embedding_bag(values, batch.row_ids_M.int(), weights, batch.offsets.int())
    out.backward(batch.grad_GV)
    assert torch.equal(out, wide["out"]) and torch.equal(values.grad, wide["dvalues"])
    assert weights.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weights.grad, wide["dweights"].bfloat16())


@pytest.mark.parametrize("one_row", [False, True])
def test_five_runs_agree_bit_for_bit(one_row, device):
    batch = make_batch([50, 20], num_rows=9, width=8, absent=0.2, one_row=one_row, device=device)
    first, *others = (_run(embedding_bag, batch, torch.float32) for _ in range(5))
    for other in others:
        for key in first:
            assert torch.equal(first[key], other[key]), key


def test_promise_of_no_absent_lookups(device, poisoned_memory):
    batch = make_batch([9, 0, 5], num_rows=6, width=16, device=device)
    ours = _run(embedding_bag, batch, torch.float32, known=Known(may_skip=False))
    assert torch.equal(ours["out"], _run(embedding_bag, batch, torch.float32)["out"])
    with pytest.raises(ValueError, match="may_skip=False"):
        absent = batch._replace(row_ids_M=batch.row_ids_M - 1)
        _run(embedding_bag, absent, torch.float32, known=Known(may_skip=False), check_row_ids=True)


@pytest.mark.parametrize("wanted", ["values", "weights", "neither"])
def test_only_wanted_gradients(wanted, device, poisoned_memory):
    batch = make_batch([12, 3], num_rows=7, width=16, device=device)
    values = batch.values_rV.clone().requires_grad_(wanted == "values")
    weights = batch.weights_M.clone().requires_grad_(wanted == "weights")
    out = embedding_bag(values, batch.row_ids_M, weights, batch.offsets)
    assert out.requires_grad == (wanted != "neither")
    if out.requires_grad:
        # an expanded gradient is not contiguous
        out.backward(batch.grad_GV[:1].expand(2, -1))
    truth = _run(reference, batch._replace(grad_GV=batch.grad_GV[:1].expand(2, -1)), torch.float32)
    for key, x in (("values", values), ("weights", weights)):
        if wanted == key:
            torch.testing.assert_close(x.grad, truth[f"d{key}"])
        else:
            assert x.grad is None


@pytest.mark.parametrize("name", ["duplicates", "most absent", "one row takes all", "no lookups"])
def test_sparse_gradient_is_the_dense_one(name, device, poisoned_memory):
    batch = make_batch(**BATCHES[name], device=device)
    rows_E, grads_EV, weight_grads_M = sparse_gradients(
        batch.values_rV, batch.grad_GV, batch.row_ids_M, batch.weights_M, batch.offsets
    )
    touched = batch.row_ids_M[batch.row_ids_M >= 0].unique()
    assert torch.equal(rows_E[: len(touched)], touched)
    assert (rows_E[len(touched) :] == -1).all()
    dense = torch.zeros_like(batch.values_rV)
    dense[touched] = grads_EV[: len(touched)]
    by_autograd = _run(embedding_bag, batch, torch.float32)
    assert torch.equal(dense, by_autograd["dvalues"])
    assert torch.equal(weight_grads_M, by_autograd["dweights"])


@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ragged and empty bags", "one row takes all"])
def test_gradient_added_to_a_buffer(name, buffer_dtype, device, poisoned_memory):
    batch = make_batch(**BATCHES[name], device=device)
    start = torch.randn_like(batch.values_rV).to(buffer_dtype)
    truth = start.double() + _run(reference, batch, torch.float64)["dvalues"]
    in_torch = (start + _run(reference, batch, torch.float32)["dvalues"]).to(buffer_dtype)

    direct = start.clone()
    lookups = (batch.row_ids_M, batch.weights_M, batch.offsets)
    add_value_gradient_(direct, batch.grad_GV, *lookups)
    by_backward = start.clone()
    result = _run(embedding_bag, batch, torch.float32, add_value_grad_to=by_backward)
    assert result["dvalues"] is None
    assert torch.equal(direct, by_backward)
    assert_as_good_as_torch("buffer", direct, in_torch, truth)
    untouched = torch.ones(len(start), dtype=torch.bool, device=device)
    untouched[batch.row_ids_M[batch.row_ids_M >= 0]] = False
    assert torch.equal(direct[untouched], start[untouched])


@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ragged and empty bags", "one row takes all", "most absent"])
@pytest.mark.parametrize("interpreted", [True, False])
def test_the_first_touch_of_a_row_overwrites(
    name, buffer_dtype, interpreted, device, poisoned_memory, monkeypatch
):
    """The sums of several batches are those of a buffer that began at zero, bit for bit."""
    if not interpreted and device == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    batches = [make_batch(**BATCHES[name], device=device, seed=seed) for seed in range(3)]
    num_rows = len(batches[0].values_rV)
    cleared = RowBuffer(
        torch.zeros_like(batches[0].values_rV, dtype=buffer_dtype),
        torch.zeros(num_rows + 1, dtype=torch.bool, device=device),
    )
    undefined = RowBuffer(
        torch.full_like(cleared.buffer_rV, torch.nan),
        torch.zeros_like(cleared.flags),
        overwrites=True,
    )
    seen: list[Tensor] = []
    for batch in batches:
        dweights = [
            _run(embedding_bag, batch, torch.float32, add_value_grad_to=buffer)["dweights"]
            for buffer in (cleared, undefined)
        ]
        assert torch.equal(*dweights)
        seen.append(batch.row_ids_M)
        read = torch.cat(seen)
        touched = torch.zeros(num_rows, dtype=torch.bool, device=device)
        touched[read[read >= 0]] = True
        for buffer in (cleared, undefined):
            assert torch.equal(buffer.touched_r, touched)
        assert torch.equal(undefined.buffer_rV[touched], cleared.buffer_rV[touched])
        assert undefined.buffer_rV[~touched].isnan().all()
        assert not cleared.buffer_rV[~touched].any()


def test_float64_takes_the_twin(device):
    batch = make_batch([4, 2], num_rows=5, width=8, device=device)
    ours, truth = (_run(op, batch, torch.float64) for op in (embedding_bag, reference))
    for key in truth:
        assert torch.equal(ours[key], truth[key])


def test_a_cpu_trains_on_the_twin(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    batch = make_batch([6, 2], num_rows=5, width=8)
    ours, twin = (_run(op, batch, torch.float32) for op in (embedding_bag, reference))
    assert all(torch.equal(ours[key], twin[key]) for key in twin)
    buffer = torch.zeros_like(batch.values_rV)
    by_buffer = _run(embedding_bag, batch, torch.float32, add_value_grad_to=buffer)
    torch.testing.assert_close(buffer, twin["dvalues"])
    torch.testing.assert_close(by_buffer["dweights"], twin["dweights"])
    rows_E, grads_EV, weight_grads_M = sparse_gradients(
        batch.values_rV, batch.grad_GV, batch.row_ids_M, batch.weights_M, batch.offsets
    )
    torch.testing.assert_close(weight_grads_M, twin["dweights"])
    present = rows_E >= 0
    torch.testing.assert_close(grads_EV[present], twin["dvalues"][rows_E[present]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values_rV": torch.zeros(5, 12)}, "multiple of 8"),
        ({"values_rV": torch.zeros(5, 8, dtype=torch.int32)}, "fp32, bf16, fp16"),
        ({"row_ids_M": torch.tensor([0, 5])}, "row id 5 is out of range for a table of 5 rows"),
        ({"row_ids_M": torch.tensor([0.0, 1.0])}, "int64 or int32"),
        ({"row_ids_M": torch.tensor([0, 1, 2])}, r"\[lookups\]"),
        ({"weights": torch.tensor([1, 2])}, "floating point"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, r"\[bags \+ 1\]"),
        ({"weights": torch.zeros(2, device="meta")}, "use one device"),
        ({"add_value_grad_to": torch.zeros(4, 8)}, "shape of the table"),
        ({"add_value_grad_to": torch.zeros(5, 8, dtype=torch.int64)}, "must be fp32 or bf16, not"),
        (
            {"add_value_grad_to": torch.zeros(5, 8, device="meta")},
            "add_value_grad_to must be on cpu",
        ),
        (
            {"row_ids_M": torch.tensor([0, -2])},
            "row id -2 is out of range: rows are counted from 0",
        ),
        (
            {"row_ids_M": torch.tensor([0, -1]), "known": Known(may_skip=False)},
            "row id -1 is negative",
        ),
        ({"offsets": torch.tensor([0, 3])}, "offsets go from 0 to 3 for 2 lookups"),
        ({"offsets": torch.tensor([1, 2])}, "offsets go from 1 to 2"),
        ({"offsets": torch.tensor([0, 2, 1, 2])}, "must rise"),
    ],
)
def test_errors_for_people(change, message):
    good = {
        "values_rV": torch.zeros(5, 8),
        "row_ids_M": torch.tensor([0, 4]),
        "weights": torch.ones(2),
        "offsets": torch.tensor([0, 2]),
    }
    embedding_bag(**good)
    with pytest.raises(ValueError, match=message):
        embedding_bag(**{**good, **change})


def test_the_check_can_be_turned_off(device, monkeypatch):
    """On request, and on a GPU by default, nobody looks at the ids and nobody waits for them."""
    batch = make_batch([4, 2], num_rows=5, width=8, device=device)
    lookups = (batch.row_ids_M, batch.weights_M, batch.offsets)
    looks = []
    aminmax = Tensor.aminmax
    monkeypatch.setattr(Tensor, "aminmax", lambda x: looks.append(x) or aminmax(x))
    embedding_bag(batch.values_rV, *lookups, check_row_ids=False)
    assert not looks
    embedding_bag(batch.values_rV, *lookups, check_row_ids=True)
    assert len(looks) == 1
    embedding_bag(batch.values_rV, *lookups)
    assert len(looks) == (1 if device == "cuda" else 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_ids_M": torch.tensor([0, 1, 2])}, r"\[lookups\]"),
        ({"weights": torch.zeros(2, device="meta")}, "use one device"),
        ({"grad_GV": torch.zeros(2, 8)}, "the gradient has shape"),
        ({"grad_GV": torch.zeros(1, 8, device="meta")}, "the gradient must be on cpu"),
        ({"buffer_rV": torch.zeros(5, 12), "grad_GV": torch.zeros(1, 12)}, "multiple of 8"),
    ],
)
def test_errors_of_the_gradient_forms(change, message):
    good = {
        "buffer_rV": torch.zeros(5, 8),
        "grad_GV": torch.zeros(1, 8),
        "row_ids_M": torch.tensor([0, 4]),
        "weights": torch.ones(2),
        "offsets": torch.tensor([0, 2]),
    }
    for op in (add_value_gradient_, sparse_gradients):
        op(*good.values())
        with pytest.raises(ValueError, match=message):
            op(*{**good, **change}.values())
