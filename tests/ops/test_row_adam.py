"""Row optimizers against torch.optim.AdamW and against their twins."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from megamem.ops import AdamOptions, adamw_, row_adam, touched_adamw_
from megamem.reference import row_adam as reference
from megamem.reference.row_adam import round_randomly
from tests.helpers.closeness import assert_as_good_as_torch

HYPER = {"lr": 0.03, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
SHAPES = [(5, 8), (3, 40), (2, 1032)]


def _gradients(shape, steps, device, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(shape, device=device) for _ in range(steps)]


def _torch_adamw(start, grads, dtype):
    weights = start.to(dtype, copy=True).requires_grad_()
    optimizer = torch.optim.AdamW([weights], **HYPER)
    for grad in grads:
        weights.grad = grad.to(dtype)
        optimizer.step()
    state = optimizer.state[weights]
    return weights.detach(), state["exp_avg"], state["exp_avg_sq"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("touched", [False, True], ids=["all rows", "every row touched"])
def test_equals_torch(shape, touched, device):
    grads = _gradients(shape, 4, device)
    weights = torch.randn(shape, device=device)
    truth = _torch_adamw(weights, grads, torch.float64)
    in_torch = _torch_adamw(weights, grads, torch.float32)
    copy = torch.empty(shape, dtype=torch.bfloat16, device=device)
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    counters = [torch.zeros(shape[0], dtype=torch.int32, device=device) for _ in range(2)]
    for step, grad in enumerate(grads, 1):
        # half the gradient, scaled back on the device, as clipping does
        scale = torch.tensor([2.0], device=device)
        options = AdamOptions(step=step, grad_scale=scale, copy_rV=copy, **HYPER)
        if touched:
            rows = torch.randperm(shape[0], device=device)
            state = (weights, rows, grad[rows] / 2, first, second, *counters)
            touched_adamw_(*state, options)
        else:
            adamw_(weights, grad / 2, first, second, options)
    for ours, torchs, true in zip((weights, first, second), in_torch, truth, strict=True):
        torch_error = (torchs.double() - true).abs().max()
        last_place = torch.finfo(torch.float32).eps * true.abs().max()
        assert (ours.double() - true).abs().max() <= 2 * torch_error + 2 * last_place
    # the interpreter truncates, a GPU rounds
    gap = (copy.float() - weights).abs()
    assert (gap <= torch.finfo(torch.bfloat16).eps * weights.abs()).all()


def _state(num_rows, width, second, device):
    torch.manual_seed(3)
    moments = {
        "both": (torch.zeros(num_rows, width), torch.zeros(num_rows, width)),
        "one per row": (torch.zeros(num_rows, width), torch.zeros(num_rows)),
        "first only": (torch.zeros(num_rows, width), None),
        "none": (None, None),
    }[second]
    counters = [torch.zeros(num_rows, dtype=torch.int32) for _ in range(2)]
    state = (torch.randn(num_rows, width), *moments, *counters)
    return [None if x is None else x.to(device) for x in state]


@pytest.mark.parametrize("second", ["both", "one per row", "first only", "none"])
@pytest.mark.parametrize("touched", [False, True], ids=["all rows", "touched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_twin(second, touched, dtype, device):
    """Weights in bf16 are rounded at random, by kernel and twin from the same bits."""
    num_rows, width = 6, 24
    start = _state(num_rows, width, second, device)
    start[0] = start[0].to(dtype)
    seed = -5 if dtype == torch.bfloat16 else None

    def run(op, compute, seed):
        state = [
            x if x is None else x.to(compute if x.is_floating_point() else x.dtype, copy=True)
            for x in start
        ]
        if seed is not None:
            state[0] = start[0].clone()
        torch.manual_seed(4)
        for step in (1, 2, 5):
            rows = torch.tensor([4, -1, 0, step % 2 + 2, -1], device=device)
            grads = torch.randn(len(rows) if touched else num_rows, width, device=device)
            weights, first, second_moment, *counters = state
            options = AdamOptions(step=step, seed=seed, row_offset=2**33, **HYPER)
            if touched:
                op(weights, rows, grads, first, second_moment, *counters, options)
            else:
                op(weights, grads, first, second_moment, options)
        return state

    ours_op, twin_op = (
        (touched_adamw_, reference.touched_adamw_) if touched else (adamw_, reference.adamw_)
    )
    ours, twin = run(ours_op, torch.float32, seed), run(twin_op, torch.float32, seed)
    for a, b in zip(ours[3:], twin[3:], strict=True):
        assert torch.equal(a, b)
    if seed is None:
        truth = run(twin_op, torch.float64, None)
        for n in range(3):
            if ours[n] is not None:
                assert_as_good_as_torch(f"state {n}", ours[n], twin[n], truth[n])
    else:
        # a last place of fp32 decides few roundings
        assert (ours[0] == twin[0]).double().mean() > 0.97
        assert ((ours[0] - twin[0]).abs() <= 2**-7 * twin[0].abs()).all()
    if touched:
        assert torch.equal(ours[0][1], start[0][1])
        assert ours[3].tolist() == [3, 0, 1, 2, 3, 0] and ours[4].tolist() == [5, 0, 2, 5, 5, 0]


def test_idle_rows_decay_when_next_touched(device):
    """Six idle steps, then one touch: the weights decayed as if every step had done it."""
    weights = torch.ones(1, 8, device=device)
    counters = [torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2)]
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    zero = torch.zeros(1, 8, device=device)
    options = AdamOptions(step=7, lr=0.1, weight_decay=0.5)
    touched_adamw_(weights, rows, zero, None, None, *counters, options)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.95**7))


def test_decays_and_corrections_are_as_exact_as_torchs(device):
    """Rows of every age in one call: what exp and 1 - exp cost in digits."""
    num_rows = 512
    gaps = torch.logspace(0, 5.5, num_rows, device=device).int().unique()
    rows = torch.arange(len(gaps), device=device)
    step = int(gaps.max())
    grads = torch.ones(len(gaps), 8, device=device)

    options = AdamOptions(step=step, lr=1e-2, weight_decay=5e-3, betas=(0.9, 0.9999), eps=1e-6)
    results = []
    for op, compute in (
        (touched_adamw_, torch.float32),
        (reference.touched_adamw_, torch.float32),
        (reference.touched_adamw_, torch.float64),
    ):
        state = [torch.ones(len(gaps), 8, dtype=compute, device=device) for _ in range(3)]
        counters = [gaps - 1, step - gaps]
        op(state[0], rows, grads.to(compute), *state[1:], *counters, options)
        results.append(state[0])
    ours, torchs, truth = (x[:, 0].double() for x in results)
    # one rounding of the weight, one of the decay, two of the update
    assert ((ours - truth).abs() <= 2 * (torchs - truth).abs().max() + 2**-23).all()
    assert ((ours - truth).abs() <= 2**-22 * truth.abs() + 2**-24).all()


def test_rounding_is_unbiased(device):
    """The mean of many roundings is the number, far closer than one rounding gets."""
    x = torch.tensor([1.0 + 2**-10, -3.1415926, 1e-30, 65504.0, 0.3, 7e8, -1e-3, 0.0])
    rows = torch.arange(4096)
    rounded = round_randomly(x.expand(4096, 8), rows, step=3, seed=11).double()
    spacing = (rounded.max(0).values - rounded.min(0).values).clamp(min=1e-300)
    # the standard error of the mean is at most spacing / 2 / 64
    assert ((rounded.mean(0) - x.double()).abs() / spacing < 5 / 128).all()
    assert (rounded[:, -1] == 0).all()
    for column in range(7):
        low, high = rounded[:, column].min(), rounded[:, column].max()
        assert low < x[column].double() < high
    exact = torch.tensor([[1.0, -2.5, float("inf"), -float("inf"), float("nan")]])
    kept = round_randomly(exact, rows[:1], step=1, seed=0).float()
    torch.testing.assert_close(kept, exact, rtol=0, atol=0, equal_nan=True)


def test_kernel_rounds_with_the_bits_of_the_twin(device):
    """No moments and no gradient: only the decay and the rounding, bit for bit."""
    torch.manual_seed(0)
    weights = torch.randn(7, 16, device=device).bfloat16()
    zero = torch.zeros(7, 16, device=device)
    # halving and quartering make every product exact
    options = AdamOptions(step=9, lr=0.5, weight_decay=2**-9, seed=1, row_offset=3)
    results = []
    for op, seed in product((adamw_, reference.adamw_), (1, 2**63 + 5)):
        x = weights.clone()
        op(x, zero, None, None, replace(options, seed=seed))
        results.append(x)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])
    # a shard rounds its rows as the whole table does
    shard = weights[4:].clone()
    adamw_(shard, zero[4:], None, None, replace(options, row_offset=7))
    assert torch.equal(shard, results[0][4:])


def test_no_rows(device):
    weights = torch.ones(3, 8, device=device)
    counters = [torch.zeros(3, dtype=torch.int32, device=device) for _ in range(2)]
    rows = torch.zeros(0, dtype=torch.int64, device=device)
    options = AdamOptions(step=1, lr=0.1)
    touched_adamw_(weights, rows, weights[:0], None, None, *counters, options)
    assert (weights == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg_sq": torch.zeros(8)}, "one number per row"),
        ({"exp_avg_rV": torch.zeros(3, 16)[:, ::2]}, "contiguous"),
        ({"grads_rV": torch.zeros(2, 8)}, "gradients have shape"),
        (
            {"options": AdamOptions(step=1, lr=0.1, seed=1)},
            "must be bf16 to be rounded stochastically",
        ),
    ],
)
def test_errors_for_people(change, message):
    good = {
        "weights_rV": torch.zeros(3, 8),
        "grads_rV": torch.zeros(3, 8),
        "exp_avg_rV": torch.zeros(3, 8),
        "exp_avg_sq": torch.zeros(3),
        "options": AdamOptions(step=1, lr=0.1),
    }
    adamw_(**good)
    with pytest.raises(ValueError, match=message):
        adamw_(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0}, "step is 0, but steps are counted from 1"),
        ({"weight_decay": 10.0}, "lr 0.1 times weight_decay 10.0 must be below 1"),
        ({"betas": (1.0, 0.9)}, r"betas are \(1.0, 0.9\), but each must be at least 0 and below 1"),
        ({"betas": (0.9, -0.1)}, "each must be at least 0 and below 1"),
        ({"column_offset": 12}, "column_offset is 12, but it must be a multiple of 8"),
    ],
)
def test_options_out_of_range(change, message):
    good = {"step": 1, "lr": 0.1, "weight_decay": 9.0, "betas": (0.0, 0.9), "column_offset": 16}
    AdamOptions(**good)
    with pytest.raises(ValueError, match=message):
        AdamOptions(**{**good, **change})


@pytest.mark.parametrize("row_moment", [False, True], ids=["a moment each", "a moment per row"])
def test_columns_of_a_table_step_as_the_table_does(row_moment, device):
    """Bit for bit with random rounding: what a column rank needs is in its arguments."""
    rows, width, cut = 6, 40, 16
    grads = _gradients((rows, width), 3, device)
    start = torch.randn(rows, width, device=device).bfloat16()

    def fresh(columns: slice) -> list:
        weights = start[:, columns].clone()
        second = (
            torch.zeros(rows, device=device) if row_moment else torch.zeros_like(weights).float()
        )
        return [weights, torch.zeros_like(weights).float(), second]

    whole, left, right = fresh(slice(None)), fresh(slice(0, cut)), fresh(slice(cut, None))
    scale = torch.tensor([0.5], device=device)
    for step, grad in enumerate(grads, 1):
        squares = grad.square().mean(-1) if row_moment else None
        options = AdamOptions(
            step=step, seed=5, row_offset=11, grad_scale=scale, row_squares_r=squares, **HYPER
        )
        adamw_(whole[0], grad, *whole[1:], options)
        for part, columns in ((left, slice(0, cut)), (right, slice(cut, None))):
            of_part = replace(options, column_offset=columns.start)
            adamw_(part[0], grad[:, columns].contiguous(), *part[1:], of_part)
    assert torch.equal(torch.cat((left[0], right[0]), 1), whole[0])
    assert torch.equal(torch.cat((left[1], right[1]), 1), whole[1])
    if row_moment:
        assert torch.equal(left[2], whole[2]) and torch.equal(right[2], whole[2])


def test_given_squares_are_those_that_would_be_taken(device):
    (grad,) = _gradients((4, 24), 1, device)
    states = []
    for squares in (None, grad.square().mean(-1)):
        state = [torch.ones_like(grad), torch.zeros_like(grad), torch.zeros(4, device=device)]
        scale = torch.tensor([3.0], device=device)
        options = AdamOptions(step=1, grad_scale=scale, row_squares_r=squares, **HYPER)
        adamw_(state[0], grad, *state[1:], options)
        states.append(state)
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("is_cut", [False, True], ids=["one block", "blocks of two rows"])
@pytest.mark.parametrize("marked", [False, True], ids=["all rows", "touched rows marked"])
@pytest.mark.parametrize("clear", [False, True], ids=["kept", "cleared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_on_a_cpu_torch_takes_the_step_of_the_twin(is_cut, marked, clear, dtype, monkeypatch):
    """What a run without a GPU computes: the interpreter is for tests."""
    monkeypatch.setattr(row_adam, "use_triton", lambda x: False)
    monkeypatch.setattr(row_adam, "CACHED", 2 * 24 if is_cut else 2**18)
    taken = []
    real = row_adam.torch_adamw
    monkeypatch.setattr(row_adam, "torch_adamw", lambda *a, **k: (taken.append(a), real(*a, **k)))
    torch.manual_seed(6)
    ours = [torch.rand(7, 24, dtype=dtype) for _ in range(4)]
    touched = torch.tensor([1, 0, 0, 1, 0, 0, 1], dtype=torch.bool) if marked else None
    if touched is not None:
        ours[1][~touched] = torch.nan
    twin = [x.clone() for x in ours]
    scale = torch.tensor([0.3], dtype=dtype)
    options = AdamOptions(step=3, touched_r=touched, clear_grads=clear, grad_scale=scale, **HYPER)
    adamw_(*ours, options)
    reference.adamw_(*twin, options)
    assert len(taken) == (4 if is_cut else 1)
    for a, b in zip(ours, twin, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert not ours[0].isnan().any() and (not clear or (ours[1] == 0).any())


def test_what_torch_lacks_stays_with_the_twin(monkeypatch):
    monkeypatch.setattr(row_adam, "use_triton", lambda x: False)
    monkeypatch.setattr(row_adam, "torch_adamw", None)
    weights, grads = torch.randn(3, 8), torch.randn(3, 8)
    for second, copy in ((torch.zeros(3), None), (None, None), (torch.zeros(3, 8), weights.half())):
        options = AdamOptions(copy_rV=copy, step=1, **HYPER)
        adamw_(weights, grads, torch.zeros(3, 8), second, options)
    rounded = weights.bfloat16()
    options = AdamOptions(seed=1, step=1, **HYPER)
    adamw_(rounded, grads, torch.zeros(3, 8), torch.zeros(3, 8), options)
    assert rounded.isfinite().all()
