"""The other row optimizers: plain SGD, one moment per row, gradients of few rows; bad input."""

from dataclasses import replace

import pytest
import torch

from megamem.ops import (
    AdamOptions,
    adamw_,
    rowwise_adamw_,
    sgd_,
    touched_adamw_,
    touched_sgd_,
)
from megamem.reference import row_adam as reference
from tests.helpers.closeness import assert_as_good_as_torch

OPTIONS = AdamOptions(step=2, lr=0.25, weight_decay=0.5)


def _counters(num_rows, device):
    return [torch.zeros(num_rows, dtype=torch.int32, device=device) for _ in range(2)]


@pytest.mark.parametrize("touched", [False, True], ids=["all rows", "touched"])
@pytest.mark.parametrize("shape", [(6, 8), (5, 1000)], ids=str)
def test_sgd(shape, touched, device):
    torch.manual_seed(0)
    start, grads = torch.randn(shape, device=device), torch.randn(shape, device=device)
    rows = torch.tensor([3, -1, 0], device=device) if touched else torch.arange(len(start))
    rows_there = rows[rows >= 0]
    scale = torch.tensor([0.5], device=device)
    truth = start.double()
    truth[rows_there] = truth[rows_there] * 0.875 - 0.125 * grads[rows_there].double()

    copy = start.bfloat16()
    results = []
    for dense, sparse in ((sgd_, touched_sgd_), (reference.adamw_, reference.touched_sgd_)):
        weights = start.clone()
        options = replace(OPTIONS, grad_scale=scale, copy_rV=copy)
        if touched:
            sparse(weights, rows, grads[rows], options)
        elif dense is sgd_:
            dense(weights, grads, options)
        else:
            dense(weights, grads, None, None, options)
        results.append(weights)
        assert ((copy.float() - weights).abs() <= 2**-7 * weights.abs()).all()
    assert_as_good_as_torch("weights", *results, truth)
    idle = torch.ones(len(start), dtype=torch.bool, device=device)
    idle[rows_there] = False
    assert torch.equal(results[0][idle], start[idle])


def test_sgd_rounds_bf16_at_random(device):
    """The mean over many rows that started alike is the number that bf16 cannot hold."""
    weights = torch.ones(512, 8, dtype=torch.bfloat16, device=device)
    grads = torch.full((512, 8), 2.0**-9, device=device)
    rows = torch.arange(512, device=device)
    options = AdamOptions(step=1, lr=1.0, seed=3)
    touched_sgd_(weights, rows, grads, options)
    # between 1 - 2**-8 and 1, half way: a standard error of 2**-8 / 2 / 64
    assert abs(weights.double().mean().item() - (1 - 2.0**-9)) < 5 * 2**-8 / 2 / 64
    assert len(weights.unique()) == 2
    dense = torch.ones_like(weights)
    sgd_(dense, grads, options)
    assert torch.equal(dense, weights)


def test_one_moment_per_row_by_name(device):
    torch.manual_seed(1)
    start, grads = torch.randn(4, 16, device=device), torch.randn(4, 16, device=device)
    rows = torch.tensor([2, 0], device=device)
    states = []
    for op in (rowwise_adamw_, adamw_):
        state = [start.clone(), torch.zeros_like(start), torch.zeros(4, device=device)]
        weights, *moments = state
        op(weights, grads, *moments, OPTIONS)
        states.append(state)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    # for touched rows, the shape of the moment decides that it is one per row
    weights, *moments = start.clone(), torch.zeros_like(start), torch.zeros(4, device=device)
    touched_adamw_(weights, rows, grads[rows], *moments, *_counters(4, device), OPTIONS)
    torch.testing.assert_close(moments[1][rows], states[0][2][rows])
    # the moment is the mean of squares, times 1 - beta2
    torch.testing.assert_close(states[0][2], 1e-3 * grads.square().mean(-1))


@pytest.mark.parametrize("row_moment", [False, True])
@pytest.mark.parametrize("flags", [torch.bool, torch.uint8, torch.int32], ids=str)
def test_gradients_of_untouched_rows_are_neither_read_nor_cleared(row_moment, flags, device):
    torch.manual_seed(2)
    start, grads = torch.randn(5, 24, device=device), torch.randn(5, 24, device=device)
    touched = torch.tensor([0, 1, 0, 1, 0], device=device)
    zeros = grads.where(touched.bool().unsqueeze(-1), 0)
    stale = grads.where(touched.bool().unsqueeze(-1), float("nan"))

    def run(op, grads, **options):
        second = torch.ones(5, device=device) if row_moment else torch.ones_like(start)
        state = [start.clone(), torch.ones_like(start), second]
        weights, *moments = state
        op(weights, grads, *moments, replace(OPTIONS, **options))
        return state

    truth = run(adamw_, zeros.clone())
    for op in (adamw_, reference.adamw_):
        seen = stale.clone()
        ours = run(op, seen, touched_r=touched.to(flags), clear_grads=True)
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert (seen[touched.bool()] == 0).all() and seen[~touched.bool()].isnan().all()
    every = grads.clone()
    run(adamw_, every, clear_grads=True)
    assert (every == 0).all()


@pytest.mark.parametrize("clears", [True, False])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "row moment", "bf16 rounded randomly"])
@pytest.mark.parametrize("interpreted", [True, False])
def test_rows_with_flags_step_as_those_of_a_list(kind, clears, interpreted, device, monkeypatch):
    """Bit for bit; nothing else is read, although it is NaN, or written."""
    if not interpreted and device == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dtype = torch.bfloat16 if kind == "bf16 rounded randomly" else torch.float32
    options = replace(OPTIONS, seed=5 if dtype == torch.bfloat16 else None)
    torch.manual_seed(0)
    num_rows, width = 9, 1032
    touched = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 1], dtype=torch.bool, device=device)
    rows = touched.nonzero().squeeze(1)
    start = torch.randn(num_rows, width, device=device).to(dtype)
    grads = torch.randn(num_rows, width, device=device)
    grads[~touched] = torch.nan

    def run(listed: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
        weights, seen = start.clone(), grads.clone()
        second = torch.ones(num_rows) if kind == "row moment" else torch.ones(num_rows, width)
        state = [weights]
        if listed:
            steps = (rows, grads[rows], options)
        else:
            steps = (None, seen, replace(options, touched_r=touched, clear_grads=clears))
        if kind == "sgd":
            touched_sgd_(weights, *steps)
        else:
            moments = (torch.ones_like(grads), second.to(device))
            counters = _counters(num_rows, device)
            touched_adamw_(weights, *steps[:2], *moments, *counters, steps[2])
            state += [*moments, *counters]
        return state, seen

    listed, _ = run(listed=True)
    flagged, seen = run(listed=False)
    for a, b in zip(flagged, listed, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(flagged[0][~touched], start[~touched])
    assert torch.equal(seen[touched], torch.zeros_like(grads[rows]) if clears else grads[rows])
    assert seen[~touched].isnan().all()


def test_a_cpu_steps_on_the_twin(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weights, grads = torch.ones(3, 8), torch.ones(3, 8)
    rows = torch.tensor([1, -1])
    options = AdamOptions(step=1, lr=0.5)
    sgd_(weights, grads, options)
    touched_sgd_(weights, rows, grads[:2], options)
    assert weights[:, 0].tolist() == [0.5, 0.0, 0.5]
    moments = (None, torch.zeros(3))
    touched_adamw_(weights, rows, grads[:2], *moments, *_counters(3, "cpu"), options)
    torch.testing.assert_close(weights[:, 0], torch.tensor([0.5, -0.5, 0.5]))


GOOD = {
    "weights_rV": torch.zeros(3, 8),
    "rows_E": torch.tensor([1, 2]),
    "grads_EV": torch.zeros(2, 8),
    "exp_avg_rV": torch.zeros(3, 8),
    "exp_avg_sq": torch.zeros(3),
    "touches_r": torch.zeros(3, dtype=torch.int32),
    "last_steps_r": torch.zeros(3, dtype=torch.int32),
    "options": AdamOptions(step=1, lr=0.1),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows_E": torch.tensor([1.0, 2.0])}, "rows_E .* integers"),
        ({"rows_E": torch.tensor([1])}, "there are 1 rows"),
        ({"touches_r": torch.zeros(3)}, "touches_r .* integers"),
        ({"last_steps_r": torch.zeros(2, dtype=torch.int32)}, "2 last steps for 3 rows"),
        (
            {"last_steps_r": torch.zeros(3, dtype=torch.int32, device="meta")},
            "last_steps_r must be on cpu",
        ),
        ({"grads_EV": torch.zeros(2, 8, device="meta")}, "the gradients must be on cpu"),
        ({"grads_EV": torch.zeros(2, 8, dtype=torch.int32)}, "floating point"),
        ({"weights_rV": torch.zeros(3, 12), "exp_avg_rV": None}, "multiple of 8"),
    ],
)
def test_errors_for_people(change, message):
    touched_adamw_(**GOOD)
    with pytest.raises(ValueError, match=message):
        touched_adamw_(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_scale": torch.ones(2)}, "the gradient scale must be one number"),
        ({"grad_scale": torch.ones(1, device="meta")}, "the gradient scale must be on cpu"),
        ({"copy_rV": torch.zeros(2, 8)}, "the copy has shape"),
        ({"touched_r": torch.ones(3, dtype=torch.bool)}, "options of steps without a list"),
        ({"clear_grads": True}, "options of steps without a list"),
        ({"row_squares_r": torch.ones(3)}, "an option of steps on every row"),
    ],
)
def test_errors_about_options_of_touched_rows(change, message):
    options = replace(GOOD["options"], **change)
    with pytest.raises(ValueError, match=message):
        touched_adamw_(**{**GOOD, "options": options})
    with pytest.raises(ValueError, match=message):
        touched_sgd_(GOOD["weights_rV"], GOOD["rows_E"], GOOD["grads_EV"], options)


def test_errors_of_rows_with_flags():
    good = {**GOOD, "rows_E": None, "grads_EV": torch.zeros(3, 8)}
    with pytest.raises(ValueError, match="needs a list of them, or touched_r"):
        touched_adamw_(**good)
    few = replace(GOOD["options"], touched_r=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="touched_r .* integers or booleans"):
        touched_adamw_(**{**good, "options": few})
    marked = replace(GOOD["options"], touched_r=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="there are 3 rows"):
        touched_adamw_(**{**good, "grads_EV": torch.zeros(2, 8), "options": marked})
    touched_adamw_(**{**good, "options": marked})


def test_errors_of_the_dense_forms():
    weights, grads = torch.zeros(3, 8), torch.zeros(3, 8)
    with pytest.raises(ValueError, match="touched_r .* integers"):
        sgd_(weights, grads, replace(OPTIONS, touched_r=torch.zeros(2, dtype=torch.bool)))
    with pytest.raises(ValueError, match="need one number per row"):
        rowwise_adamw_(weights, grads, None, torch.zeros(3, 8), OPTIONS)
    with pytest.raises(ValueError, match="rows_E"):
        touched_sgd_(weights, torch.zeros(2, 1, dtype=torch.int64), grads[:2], OPTIONS)
