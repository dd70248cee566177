"""embedding_bag with a weight for each core, against its twin and float64."""

import importlib

import pytest
import torch

from megamem.ops import embedding_bag, forms
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
