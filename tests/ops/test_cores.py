"""embedding_bag with a weight for each core, against its twin and float64."""

import importlib
from itertools import pairwise

import pytest
import torch

from megamem.kernels import choices
from megamem.ops import Known, add_value_gradient_, embedding_bag, forms, sparse_gradients
from megamem.ops.row_buffer import Deferred, RowBuffer
from megamem.reference.embedding_bag import embedding_bag as reference
from tests.helpers.closeness import assert_as_good_as_torch
from tests.ops.batches import BATCHES, Batch, make_batch
from tests.ops.test_sort_lookups import small_tiles

__all__ = ["small_tiles"]

# batch -> number of cores, first column of the shard, width of a core; ragged ends of pieces
SPLITS = {
    "one lookup": (2, 8, 8),
    "duplicates": (1, 0, 24),
    "ragged and empty bags": (4, 8, 16),
    "two blocks of columns": (2, 0, 136),
    "a width of no power of two": (4, 48, 264),
    "a last block of eight": (2, 16, 528),
    "most absent": (2, 0, 8),
    "all absent": (2, 0, 8),
    "one row takes all": (2, 0, 8),
    "no lookups": (2, 0, 8),
    "no bags": (2, 0, 8),
}


def _with_cores(batch: Batch, num_cores: int, seed: int = 7) -> Batch:
    torch.manual_seed(seed)
    weights = torch.randn(len(batch.row_ids_M), num_cores).to(batch.weights_M.device)
    return batch._replace(weights_M=weights)


def _run(op, batch, dtype, **options):
    accumulate = torch.promote_types(dtype, torch.float32)
    values = batch.values_rV.to(dtype, copy=True).requires_grad_()
    weights = batch.weights_M.to(accumulate, copy=True).requires_grad_()
    out = op(values, batch.row_ids_M, weights, batch.offsets, **options)
    out.backward(batch.grad_GV.to(dtype))
    return {"out": out.detach(), "dvalues": values.grad, "dweights": weights.grad}


@pytest.fixture(params=["pieces", "triton"])
def form(request, monkeypatch):
    monkeypatch.setenv(forms.ENVIRONMENT, f"embedding_bag_cores={request.param}")
    return request.param


def test_read_out_of_the_unit_oracle(form, device):
    """Two rows of two columns, here of two pieces of eight, and the single cores' scores."""
    values = torch.zeros(5, 16, device=device)
    values[4], values[0, :8], values[0, 8:] = 1, 1, 2
    weights = torch.tensor([[34.0, -8.0], [16.0, 8.0]], device=device)
    lookups = (torch.tensor([4, 0], device=device), weights, torch.tensor([0, 2], device=device))
    for op in (embedding_bag, reference):
        assert op(values, *lookups).tolist() == [[50.0] * 8 + [8.0] * 8]


@pytest.mark.parametrize("name", BATCHES)
def test_against_twin(name, form, device, poisoned_memory):
    num_cores, first_column, core_width = SPLITS[name]
    batch = _with_cores(make_batch(**BATCHES[name], device=device), num_cores)
    split = {"first_column": first_column, "core_width": core_width}
    ours, twin = (_run(op, batch, torch.float32, **split) for op in (embedding_bag, reference))
    truth = _run(reference, batch, torch.float64, **split)
    for key in truth:
        assert_as_good_as_torch(key, ours[key], twin[key], truth[key])


FORMS_OF_BUFFERS = {"add": (False, None), "first_touch": (True, None), "merged": (True, 2)}


@pytest.mark.parametrize("buffer_form", FORMS_OF_BUFFERS)
@pytest.mark.parametrize("path", ["pieces", "triton", "radix", "torch"])
def test_buffer_over_several_passes(
    buffer_form, path, device, poisoned_memory, monkeypatch, small_tiles
):
    """Four passes, of which each reads rows that others have read and rows that none has."""
    path_forms = {
        "pieces": "embedding_bag_cores=pieces",
        "triton": "embedding_bag_cores=triton",
        "radix": "embedding_bag_cores=triton,sort_lookups=radix",
    }
    monkeypatch.setenv(forms.ENVIRONMENT, path_forms.get(path, ""))
    if path == "torch":
        if device != "cpu":
            pytest.skip("a GPU runs the kernels")
        for module in ("embedding_bag", "value_gradient"):
            module = importlib.import_module(f"megamem.ops.{module}")
            monkeypatch.setattr(module, "use_triton", lambda _: False)
    overwrites, every = FORMS_OF_BUFFERS[buffer_form]
    dtype = torch.float32 if path == "radix" else torch.bfloat16
    sizes, rows, width, split = [9, 0, 17], 23, 40, {"first_column": 8, "core_width": 16}
    batches = [
        _with_cores(make_batch(sizes, rows, width, absent=0.2, device=device, seed=seed), 3, seed)
        for seed in range(4)
    ]
    # where the first gradient overwrites, what was there before is undefined
    buffer_rV = torch.full((rows, width), float("nan") if overwrites else 0.0, device=device)
    buffer = RowBuffer(
        buffer_rV,
        torch.zeros(rows + 1, dtype=torch.bool, device=device),
        overwrites,
        None if every is None else Deferred(every),
    )
    values = batches[0].values_rV.to(dtype)
    truth = torch.zeros(rows, width, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch._replace(values_rV=values.float(), grad_GV=batch.grad_GV.to(dtype).float())
        expected = _run(reference, batch, torch.float64, **split)
        truth += expected["dvalues"]
        weights = batch.weights_M.clone().requires_grad_()
        lookups = (batch.row_ids_M, weights, batch.offsets)
        out = embedding_bag(values, *lookups, add_value_grad_to=buffer, **split)
        out.backward(batch.grad_GV.to(dtype))
        torch.testing.assert_close(
            weights.grad.double(), expected["dweights"], rtol=1e-4, atol=1e-5
        )
    touched = torch.cat([b.row_ids_M[b.row_ids_M >= 0] for b in batches]).unique()
    assert torch.equal(torch.where(buffer.touched_r)[0], touched)
    torch.testing.assert_close(buffer_rV[touched].double(), truth[touched], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_cores", [1, 2, 4])
def test_gradients_of_the_reference_are_right(num_cores):
    """gradcheck in float64, for a shard that begins and ends within a piece."""
    batch = _with_cores(make_batch([3, 0, 4], num_rows=5, width=24, absent=0.2), num_cores)
    split = {"first_column": 8, "core_width": 32 if num_cores == 1 else 16}
    values, weights = (
        x.double().requires_grad_() for x in (batch.values_rV, batch.weights_M.double())
    )

    def bags(values, weights):
        return reference(values, batch.row_ids_M, weights, batch.offsets, **split)

    assert torch.autograd.gradcheck(bags, (values, weights))


@pytest.mark.parametrize("edges", [(0, 16, 48), (0, 8, 40, 48), (0, 24, 48), (0, 48)])
def test_slices_of_columns_are_the_whole(edges, form, device, poisoned_memory):
    """Column ranks get slices that end with a piece, within one, and that lie within one."""
    batch = _with_cores(make_batch([9, 4], 7, 48, absent=0.2, device=device), 2)
    whole = _run(embedding_bag, batch, torch.float32, core_width=24)
    slices = [
        _run(
            embedding_bag,
            batch._replace(
                values_rV=batch.values_rV[:, start:end].contiguous(),
                grad_GV=batch.grad_GV[:, start:end].contiguous(),
            ),
            torch.float32,
            first_column=start,
            core_width=24,
        )
        for start, end in pairwise(edges)
    ]
    for key in ("out", "dvalues"):
        assert torch.equal(torch.cat([x[key] for x in slices], 1), whole[key])
    # ranks sum what the weights get from their columns
    together = torch.stack([x["dweights"] for x in slices]).sum(0)
    torch.testing.assert_close(together, whole["dweights"])
    for piece, (start, end) in zip(slices, pairwise(edges), strict=True):
        for core in range(2):
            outside = end <= core * 24 or start >= (core + 1) * 24
            assert (piece["dweights"][:, core] == 0).all() == outside


def test_equal_weights_are_one_weight(form, device, poisoned_memory):
    """Bit for bit, as every sum has the same terms in the same order."""
    batch = make_batch([30, 0, 55], num_rows=6, width=48, absent=0.3, device=device)
    one = _run(embedding_bag, batch, torch.bfloat16)
    same = batch._replace(weights_M=batch.weights_M.unsqueeze(-1).expand(-1, 3).contiguous())
    three = _run(embedding_bag, same, torch.bfloat16)
    assert torch.equal(three["out"], one["out"]) and torch.equal(three["dvalues"], one["dvalues"])
    torch.testing.assert_close(three["dweights"].sum(1), one["dweights"])


def test_both_forms_agree_bit_for_bit(device, monkeypatch, poisoned_memory):
    batch = _with_cores(make_batch([80, 3], 5, 544, absent=0.1, device=device), 2)
    found = []
    for name in ("pieces", "triton", "triton"):
        monkeypatch.setenv(forms.ENVIRONMENT, f"embedding_bag_cores={name}")
        found.append(_run(embedding_bag, batch, torch.bfloat16))
    for other in found[1:]:
        assert all(torch.equal(other[key], found[0][key]) for key in other)


@pytest.mark.parametrize("known", [Known(may_skip=False, equal_bags=True), Known(expected=1)])
@pytest.mark.parametrize("sort", ["torch", "radix"])
def test_hints_change_nothing(known, sort, device, monkeypatch, small_tiles, poisoned_memory):
    """With room for fewer products than there are lookups, the late ones are computed apart."""
    split = {"first_column": 8, "core_width": 24}
    absent = 0.5 if known.may_skip else 0.0
    batch = _with_cores(make_batch([40, 40], 7, 48, absent=absent, device=device), 4)
    expected = _run(reference, batch, torch.float64, **split)
    few = choices.current().changed("row_gradient", block_m=2)
    for name in ("pieces", "triton"):
        selected = f"embedding_bag_cores={name},sort_lookups={sort}"
        monkeypatch.setenv(forms.ENVIRONMENT, selected)
        with choices.using(few):
            ours = _run(embedding_bag, batch, torch.float32, known=known, **split)
        for key, x in ours.items():
            torch.testing.assert_close(x.double(), expected[key], rtol=1e-4, atol=1e-5)


def test_sparse_gradients_are_the_dense_ones(form, device, poisoned_memory):
    split = {"first_column": 16, "core_width": 24}
    batch = _with_cores(make_batch([20, 9], 31, 40, absent=0.2, device=device), 3)
    dense = _run(embedding_bag, batch, torch.float32, **split)
    rows_E, grads_EV, weight_grads = sparse_gradients(
        batch.values_rV, batch.grad_GV, batch.row_ids_M, batch.weights_M, batch.offsets, **split
    )
    scattered = torch.zeros_like(batch.values_rV)
    scattered[rows_E[rows_E >= 0]] = grads_EV[rows_E >= 0]
    assert torch.equal(scattered, dense["dvalues"])
    assert torch.equal(weight_grads, dense["dweights"])


@pytest.mark.parametrize("wanted", ["values", "weights"])
def test_only_wanted_gradients(wanted, form, device, poisoned_memory):
    batch = _with_cores(make_batch([12, 3], 7, 16, device=device), 2)
    truth = _run(reference, batch, torch.float32)
    values = batch.values_rV.clone().requires_grad_(wanted == "values")
    weights = batch.weights_M.clone().requires_grad_(wanted == "weights")
    # weights of all cores in one tensor of which every second is ours
    strided = torch.stack((weights, weights), -1)[..., 0]
    out = embedding_bag(values, batch.row_ids_M.int(), strided, batch.offsets.int())
    out.backward(batch.grad_GV)
    for key, x in (("values", values), ("weights", weights)):
        if wanted == key:
            torch.testing.assert_close(x.grad, truth[f"d{key}"])
        else:
            assert x.grad is None


@pytest.mark.parametrize(
    ("split", "num_cores", "message"),
    [
        ({"core_width": 8}, 2, "columns 0 to 24 .* 2 weights .* 8 columns each cover 16"),
        ({"first_column": 16, "core_width": 16}, 2, "columns 16 to 40 .* cover 32"),
        ({"first_column": -8, "core_width": 16}, 2, "columns -8 to 16"),
        ({"first_column": 4, "core_width": 16}, 2, "begins with column 4, .* multiples of 8"),
        ({}, 2, "columns of one weight are 12, .* multiples of 8"),
        ({}, 5, "columns 0 to 24"),
        ({}, 0, "0 weights a lookup"),
        ({"first_column": 8, "core_width": 24}, 1, "columns 8 to 32 .* cover 24"),
    ],
)
def test_errors_for_people(split, num_cores, message):
    lookups = (torch.tensor([0, 4]), torch.ones(2, num_cores), torch.tensor([0, 2]))
    for op in (
        lambda **given: embedding_bag(torch.zeros(5, 24), *lookups, **given),
        lambda **given: sparse_gradients(torch.zeros(5, 24), torch.zeros(1, 24), *lookups, **given),
        lambda **given: add_value_gradient_(
            torch.zeros(5, 24), torch.zeros(1, 24), *lookups, **given
        ),
    ):
        with pytest.raises(ValueError, match=message):
            op(**split)
    with pytest.raises(ValueError, match="cores"):
        embedding_bag(torch.zeros(5, 24), lookups[0], torch.ones(2, 2, 2), lookups[2])
