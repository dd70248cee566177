"""Lookups sorted by row: both forms against the reference, and the ops that sort with each form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megamem.kernels import choices
from megamem.kernels import row_gradient as gradient_kernels
from megamem.kernels.sort_lookups import SortedLookups, digits_of, sort_by_radix, sort_by_torch
from megamem.ops import add_value_gradient_, embedding_bag, row_dot, sparse_gradients
from megamem.ops.row_buffer import RowBuffer
from megamem.ops.sort_lookups import Known, sort_lookups
from megamem.reference.embedding_bag import embedding_bag as bag_reference
from megamem.reference.row_dot import row_dot as dot_reference
from megamem.reference.sort_lookups import sort_lookups as reference
from tests.helpers.closeness import assert_as_good_as_torch
from tests.ops.batches import BATCHES, Batch, make_batch
from tests.ops.test_properties import DEVICE, FEW

LARGEST = 2**31 - 1


@pytest.fixture
def small_tiles():
    """Several tiles, programs and digits even for a few lookups."""
    numbers = {"tile": 16, "max_programs": 4, "radix": 16, "num_warps": 1}
    with choices.using(choices.current().changed("sort_lookups", **numbers)):
        yield


@pytest.fixture
def radix(monkeypatch, small_tiles):
    monkeypatch.setenv("MEGAMEM_FORMS", "sort_lookups=radix")


def _lookups(
    bag_sizes: list[int], num_rows: int, absent: float, device: str, one_row: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Row ids, weights and offsets; the first and the last row are among the rows."""
    generator = torch.Generator().manual_seed(sum(bag_sizes))
    count = sum(bag_sizes)
    row_ids = torch.randint(num_rows, (count,), generator=generator)
    row_ids[torch.rand(count, generator=generator) < 0.2] = num_rows - 1
    row_ids[torch.rand(count, generator=generator) < 0.2] = 0
    if one_row:
        row_ids.fill_(num_rows - 1)
    row_ids[torch.rand(count, generator=generator) < absent] = -1
    weights = torch.randn(count, generator=generator)
    offsets = torch.tensor([0, *bag_sizes]).cumsum(0)
    return row_ids.to(device), weights.to(device), offsets.to(device)


def _assert_sorted(ours: SortedLookups, lookups: tuple[Tensor, Tensor, Tensor]) -> None:
    """The first entries are the reference's; the others read no row."""
    truth = reference(*lookups)
    present = len(truth[0])
    if ours.count is not None:
        assert ours.count.dtype == torch.int32 and ours.count.tolist() == [present]
    found = (ours.rows_M, ours.order_M, ours.bags_M, ours.weights_M)
    for x, expected in zip(found, truth, strict=True):
        assert len(x) == len(lookups[0])
        assert torch.equal(x[:present].to(expected.dtype), expected)
    rows_M = ours.rows_or_none()
    assert torch.equal(rows_M[:present], ours.rows_M[:present])
    assert (rows_M[present:] == ours.num_rows).all()


ROWS = [1, 2, 15, 16, 17, 2**15 - 1, 2**15, 2**15 + 1, 2**20, LARGEST]


@pytest.mark.parametrize("form", [sort_by_torch, sort_by_radix])
@pytest.mark.parametrize("num_rows", ROWS)
def test_any_number_of_rows(form, num_rows, device, small_tiles, poisoned_memory):
    for absent in (0.0, 0.6):
        lookups = _lookups([37, 0, 1, 60], num_rows, absent, device)
        _assert_sorted(form(*lookups, num_rows), lookups)


CASES = {
    "no lookups": {"bag_sizes": [0, 0]},
    "no bags": {"bag_sizes": []},
    "one lookup": {"bag_sizes": [1]},
    "one lookup, absent": {"bag_sizes": [1], "absent": 1.0},
    "all absent": {"bag_sizes": [20, 31], "absent": 1.0},
    "one row": {"bag_sizes": [100, 3], "one_row": True},
    "one row, some absent": {"bag_sizes": [100, 3], "one_row": True, "absent": 0.5},
    "a whole tile": {"bag_sizes": [16], "absent": 0.0},
    "whole tiles of every program": {"bag_sizes": [96, 96], "absent": 0.0},
    "one more than whole tiles": {"bag_sizes": [193]},
}


@pytest.mark.parametrize("form", [sort_by_torch, sort_by_radix])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", CASES)
def test_any_lookups(form, ids, name, device, small_tiles, poisoned_memory):
    lookups = _lookups(**{"num_rows": 300, "absent": 0.3, "device": device, **CASES[name]})
    lookups = (lookups[0].to(ids), *lookups[1:])
    _assert_sorted(form(*lookups, 300), lookups)


def test_sizes_of_a_gpu(device, poisoned_memory):
    """The tiles and digits that a GPU uses, and more than one tile."""
    lookups = _lookups([2500, 1, 60], 2000, 0.4, device)
    _assert_sorted(sort_by_radix(*lookups, 2000), lookups)


@pytest.mark.parametrize("form", ["torch", "radix"])
def test_what_the_caller_knows(form, device, monkeypatch, small_tiles, poisoned_memory):
    """Without absent lookups and with bags of one size the result is the same."""
    monkeypatch.setenv("MEGAMEM_FORMS", f"sort_lookups={form}")
    lookups = _lookups([7] * 13, 50, 0.0, device)
    for equal_bags in (False, True):
        for may_skip in (False, True):
            ours = sort_lookups(*lookups, 50, Known(may_skip, equal_bags))
            assert (ours.count is None) == (form == "torch" or not may_skip)
            _assert_sorted(ours, lookups)
    # with absent lookups, bags of one size
    lookups = _lookups([7] * 13, 50, 0.5, device)
    _assert_sorted(sort_lookups(*lookups, 50, Known(equal_bags=True)), lookups)


@pytest.mark.parametrize("form", ["torch", "radix"])
def test_nothing_is_computed_about_absent_lookups_that_cannot_be(
    form, device, monkeypatch, small_tiles
):
    monkeypatch.setenv("MEGAMEM_FORMS", f"sort_lookups={form}")
    lookups = _lookups([7] * 3, 50, 0.0, device)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "where", None)
        if form == "radix":
            patch.setattr(torch, "repeat_interleave", None)
        ours = sort_lookups(*lookups, 50, Known(may_skip=False, equal_bags=True))
    _assert_sorted(ours, lookups)


def test_the_default_form_is_torchs(device):
    lookups = _lookups([7] * 3, 50, 0.5, device)
    assert sort_lookups(*lookups, 50).count is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_any_dtype_and_in_one_number_of_memory(dtype, device, small_tiles):
    row_ids, weights, offsets = _lookups([40, 3], 9, 0.3, device)
    for each in (weights.to(dtype), torch.ones((), device=device, dtype=dtype).expand(43)):
        ours = sort_by_radix(row_ids, each, offsets, 9)
        assert ours.weights_M.dtype == dtype
        _assert_sorted(ours, (row_ids, each, offsets))


@pytest.mark.parametrize(
    ("num_rows", "digits"),
    [
        (1, (1, 1)),
        (2, (1, 1)),
        (1024, (1, 10)),
        (1025, (2, 6)),
        (2**20, (2, 10)),
        (LARGEST, (4, 8)),
    ],
)
def test_digits_are_few_and_cover_all_rows(num_rows, digits):
    assert digits_of(num_rows, 1024) == digits
    assert 2 ** (digits[0] * digits[1]) >= num_rows


def test_runs_agree_bit_for_bit(device, small_tiles):
    lookups = _lookups([200], 5, 0.3, device)
    first = sort_by_radix(*lookups, 5)
    for _ in range(3):
        again = sort_by_radix(*lookups, 5)
        count = int(first.count)
        assert torch.equal(first.order_M[:count], again.order_M[:count])


def test_too_many_lookups_for_positions_of_4_bytes():
    row_ids = torch.empty(2**31, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="2,147,483,648 lookups are more than the form radix"):
        sort_by_radix(row_ids, row_ids.float(), row_ids[:2], 5)


@FEW
@given(st.lists(st.integers(0, 50), max_size=4), st.integers(1, LARGEST), st.data())
def test_any_lookups_in_any_sizes(bag_sizes, num_rows, data):
    count = sum(bag_sizes)
    pool = data.draw(st.lists(st.integers(-1, num_rows - 1), min_size=1, max_size=8))
    picks = data.draw(st.lists(st.sampled_from(pool), min_size=count, max_size=count))
    row_ids = torch.tensor(picks, dtype=torch.int32, device=DEVICE)
    weights = torch.arange(count, device=DEVICE).float()
    lookups = (row_ids, weights, torch.tensor([0, *bag_sizes], device=DEVICE).cumsum(0))
    drawn = {n: 2 ** data.draw(st.integers(1, 6)) for n in ("tile", "max_programs", "radix")}
    with choices.using(choices.current().changed("sort_lookups", **drawn)):
        _assert_sorted(sort_by_radix(*lookups, num_rows), lookups)


# the ops that sort --------------------------------------------------------------------------------


def _bag_gradients(op, batch: Batch, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    values = batch.values_rV.to(dtype, copy=True).requires_grad_()
    weights = batch.weights_M.to(dtype, copy=True).requires_grad_()
    out = op(values, batch.row_ids_M, weights, batch.offsets, **options)
    out.backward(batch.grad_GV.to(dtype))
    return {"out": out.detach(), "dvalues": values.grad, "dweights": weights.grad}


def _dot_gradients(op, batch: Batch, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    values = batch.values_rV.to(dtype, copy=True).requires_grad_()
    vectors = batch.grad_GV.to(dtype, copy=True).requires_grad_()
    out = op(values, vectors, batch.row_ids_M, batch.offsets, **options)
    out.backward(batch.weights_M.to(dtype))
    return {"out": out.detach(), "dvalues": values.grad, "dvectors": vectors.grad}


OPS = {
    "embedding_bag": (_bag_gradients, embedding_bag, bag_reference),
    "row_dot": (_dot_gradients, row_dot, dot_reference),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", BATCHES)
def test_gradients_with_absent_lookups_left_out(op, name, device, radix, poisoned_memory):
    run, ours, twin = OPS[op]
    batch = make_batch(**BATCHES[name], device=device)
    found = run(ours, batch, torch.float32)
    same_dtype, truth = (run(twin, batch, dtype) for dtype in (torch.float32, torch.float64))
    for key in truth:
        assert_as_good_as_torch(key, found[key], same_dtype[key], truth[key])


@pytest.mark.parametrize("op", OPS)
def test_gradients_with_more_chunks_than_lookups_and_with_long_chunks(
    op, device, radix, poisoned_memory
):
    """Whatever share of the lookups is present: chunks are as long as the device decides."""
    run, ours, twin = OPS[op]
    for chunks, shortest in ((2, 4), (8, 1), (64, 4)):
        numbers = {"target_chunks": chunks, "min_chunk": shortest}
        for absent in (0.0, 0.5, 0.97):
            batch = make_batch([30, 0, 83], num_rows=4, width=8, absent=absent, device=device)
            with choices.using(choices.current().changed("row_gradient", **numbers)):
                found = run(ours, batch, torch.float32)
            same_dtype, truth = (run(twin, batch, x) for x in (torch.float32, torch.float64))
            for key in truth:
                assert_as_good_as_torch(key, found[key], same_dtype[key], truth[key])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("expected", [0, 1, 20, 200])
def test_more_lookups_than_were_expected(op, expected, device, radix, monkeypatch, poisoned_memory):
    """They are computed in another way, to the same bits."""
    monkeypatch.setattr(gradient_kernels, "LATE_PROGRAMS", 5)
    run, ours, _ = OPS[op]
    for width in (8, 264):
        batch = make_batch([70, 0, 30], num_rows=6, width=width, absent=0.3, device=device)
        with choices.using(choices.current().changed("row_gradient", block_m=16)):
            truth = run(ours, batch, torch.float32)
            found = run(ours, batch, torch.float32, known=Known(expected=expected))
        assert all(torch.equal(found[key], truth[key]) for key in truth)


def test_room_follows_the_lookups_that_are_expected():
    chunks_and_room = gradient_kernels.chunks_and_room
    million = 2**20
    assert chunks_and_room(million) == (8192, million)
    assert chunks_and_room(8 * million) == (16384, 8 * million)
    assert chunks_and_room(8 * million, counted=True) == (8192, 8 * million)
    assert chunks_and_room(8 * million, counted=True, expected=million) == (8192, 2 * million)
    assert chunks_and_room(100, counted=True, expected=99) == (4, 100)


@pytest.mark.parametrize("op", OPS)
def test_gradients_where_all_lookups_are_present(op, device, radix, poisoned_memory):
    """may_skip=False and equal_bags=True change nothing, and there is no count."""
    run, ours, _ = OPS[op]
    batch = make_batch([9] * 5, num_rows=6, width=16, device=device)
    plain = run(ours, batch, torch.float32)
    known = run(ours, batch, torch.float32, known=Known(may_skip=False, equal_bags=True))
    for key in plain:
        torch.testing.assert_close(known[key], plain[key])


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("name", ["most absent", "all absent", "one row takes all", "no lookups"])
def test_gradient_added_to_a_buffer_with_flags(name, overwrites, device, radix, poisoned_memory):
    batch = make_batch(**BATCHES[name], device=device)
    num_rows = len(batch.values_rV)
    buffer = torch.full_like(batch.values_rV, torch.nan if overwrites else 0.0)
    flags = torch.zeros(num_rows + 1, dtype=torch.bool, device=device)
    rows = RowBuffer(buffer, flags, overwrites)
    lookups = (batch.row_ids_M, batch.weights_M, batch.offsets)
    for _ in range(2):
        add_value_gradient_(rows, batch.grad_GV, *lookups)
    touched = torch.zeros_like(flags[:-1])
    touched[batch.row_ids_M[batch.row_ids_M >= 0]] = True
    assert torch.equal(flags[:-1], touched)
    truth, same_dtype = (
        2 * _bag_gradients(bag_reference, batch, dtype)["dvalues"]
        for dtype in (torch.float64, torch.float32)
    )
    assert_as_good_as_torch("buffer", buffer[touched], same_dtype[touched], truth[touched])


@pytest.mark.parametrize("name", ["duplicates", "most absent", "all absent", "no lookups"])
def test_sparse_gradients_of_both_forms(name, device, monkeypatch, small_tiles, poisoned_memory):
    batch = make_batch(**BATCHES[name], device=device)
    found = {}
    for form in ("torch", "radix"):
        monkeypatch.setenv("MEGAMEM_FORMS", f"sort_lookups={form}")
        found[form] = sparse_gradients(
            batch.values_rV, batch.grad_GV, batch.row_ids_M, batch.weights_M, batch.offsets
        )
    (rows, grads, by_weight), (true_rows, true_grads, true_by_weight) = (
        found["radix"],
        found["torch"],
    )
    assert torch.equal(rows, true_rows)
    torch.testing.assert_close(grads[rows >= 0], true_grads[rows >= 0])
    torch.testing.assert_close(by_weight, true_by_weight)


def test_bags_of_different_sizes_are_refused(device):
    batch = make_batch([4, 2], num_rows=5, width=8, device=device)
    with pytest.raises(ValueError, match="bags have 2 to 4 lookups"):
        _bag_gradients(
            embedding_bag, batch, torch.float32, known=Known(equal_bags=True), check_row_ids=True
        )
