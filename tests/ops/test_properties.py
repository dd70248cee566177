"""The ops on inputs that hypothesis thinks up: duplicates, empty bags, extreme weights, k = N."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megamem.ops import (
    AdamOptions,
    adamw_,
    embedding_bag,
    product_topk,
    sparse_gradients,
    touched_adamw_,
    tucker_topk,
    tuning,
)
from megamem.reference.embedding_bag import embedding_bag as bag_reference
from megamem.reference.product_topk import product_topk as topk_reference
from megamem.reference.tucker_topk import tucker_topk as tucker_reference
from tests.ops.batches import Batch

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
# the interpreter is slow; a GPU affords more
FEW = settings(
    max_examples=200 if DEVICE == "cuda" else 12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def batches(draw) -> Batch:
    bag_sizes = draw(st.lists(st.integers(0, 40), max_size=4))
    num_rows = draw(st.sampled_from([1, 2, 5, 40]))
    width = 8 * draw(st.integers(1, 6))
    # a small pool of rows makes duplicates; a pool of -1 alone, only absent lookups
    pool = draw(st.lists(st.integers(-1, num_rows - 1), min_size=1, max_size=6))
    scale = draw(st.sampled_from([0.0, 1.0, -1.0, 1e-30, 1e30]))
    num_lookups = sum(bag_sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    picks = torch.randint(len(pool), (num_lookups,), generator=generator)
    batch = Batch(
        torch.randn(num_rows, width, generator=generator),
        torch.tensor(pool)[picks],
        scale * torch.randn(num_lookups, generator=generator),
        torch.tensor([0, *bag_sizes]).cumsum(0),
        torch.randn(len(bag_sizes), width, generator=generator),
    )
    return Batch(*(x.to(DEVICE) for x in batch))


def _gradients(op, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, ...]:
    values, weights = (
        x.to(dtype, copy=True).requires_grad_() for x in (batch.values_rV, batch.weights_M)
    )
    out = op(values, batch.row_ids_M, weights, batch.offsets)
    return out.detach(), *torch.autograd.grad(out, (values, weights), batch.grad_GV.to(dtype))


@FEW
@given(batches())
def test_embedding_bag_errs_no_more_than_rounding_must(batch):
    """n roundings of a sum in any order: at most n * eps times the sum of its absolute values."""
    ours = _gradients(embedding_bag, batch, torch.float32)
    truth = _gradients(bag_reference, batch, torch.float64)
    absolute = _gradients(bag_reference, Batch(*(x.abs() for x in batch)), torch.float64)
    # ids lost their sign to abs(): an absent lookup only widens the bound
    roundings = len(batch.row_ids_M) + batch.values_rV.shape[1] + 2
    for a, b, bound in zip(ours, truth, absolute, strict=True):
        assert ((a.double() - b).abs() <= roundings * EPS * bound + 1e-45).all()

    rows_E, grads_EV, weight_grads_M = sparse_gradients(
        batch.values_rV, batch.grad_GV, batch.row_ids_M, batch.weights_M, batch.offsets
    )
    dense = torch.zeros_like(batch.values_rV)
    dense[rows_E[rows_E >= 0]] = grads_EV[rows_E >= 0]
    assert torch.equal(dense, ours[1]) and torch.equal(weight_grads_M, ours[2])


@st.composite
def splits(draw) -> tuple[Batch, dict[str, int]]:
    """Lookups with several weights, and a shard that begins anywhere in the table."""
    batch = draw(batches())
    core_width, first_column = 8 * draw(st.integers(1, 7)), 8 * draw(st.integers(0, 9))
    fewest = -(-(first_column + batch.values_rV.shape[1]) // core_width)
    num_cores = fewest + draw(st.integers(0, 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    factors = torch.randn(len(batch.row_ids_M), num_cores, generator=generator).to(DEVICE)
    several = batch._replace(weights_M=batch.weights_M.unsqueeze(-1) * factors)
    return several, {"first_column": first_column, "core_width": core_width}


@pytest.mark.parametrize("form", ["pieces", "triton"])
@FEW
@given(splits())
def test_bags_of_cores_err_no_more_than_rounding_must(form, split):
    batch, columns = split
    chosen = tuning.current()
    with tuning.using(replace(chosen, forms={**chosen.forms, "embedding_bag_cores": form})):
        ours = _gradients(partial(embedding_bag, **columns), batch, torch.float32)
    twin = partial(bag_reference, **columns)
    truth = _gradients(twin, batch, torch.float64)
    positive = Batch(*(x.abs() if x.is_floating_point() else x for x in batch))
    absolute = _gradients(twin, positive, torch.float64)
    roundings = len(batch.row_ids_M) + batch.values_rV.shape[1] + 2
    for a, b, bound in zip(ours, truth, absolute, strict=True):
        assert ((a.double() - b).abs() <= roundings * EPS * bound + 1e-45).all()


@FEW
@given(
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 3),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_product_topk_is_the_twin_id_for_id(tokens, heads, num_keys, key_dim, spread, share, seed):
    topk = max(1, min(num_keys, 8, round(share * num_keys)))
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-spread, spread + 1, shape, generator=generator).float().to(DEVICE)

    query, sub_keys = (
        integers(tokens, heads, 2 * key_dim),
        integers(2, heads, num_keys, key_dim),
    )
    scores, rows = product_topk(query, sub_keys, topk)
    true_scores, true_rows = topk_reference(query, sub_keys, topk)
    assert torch.equal(rows, true_rows) and torch.equal(scores, true_scores)


@st.composite
def tucker_inputs(draw) -> tuple[list[Tensor], int, int]:
    tokens, heads, num_keys, width = (
        draw(st.integers(*s)) for s in ((0, 3), (1, 2), (1, 30), (1, 5))
    )
    rank, cores, spread = (draw(st.integers(*s)) for s in ((1, 4), (1, 4), (0, 3)))
    topk = draw(st.integers(1, min(num_keys, 12)))
    final_topk = draw(st.integers(1, topk**2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def integers(*shape: int) -> Tensor:
        return torch.randint(-spread, spread + 1, shape, generator=generator).float().to(DEVICE)

    query = integers(tokens, 2, draw(st.sampled_from([1, rank])), width)
    keys = integers(2, heads, num_keys, rank, width)
    # in some a key that is NaN or infinite
    keys[0, 0, draw(st.integers(0, num_keys - 1)), 0, 0] = draw(
        st.sampled_from([0.0, 1.0, torch.nan, torch.inf, -torch.inf])
    )
    return (
        [query, keys, integers(cores, heads, rank, rank), integers(2, heads, rank)],
        topk,
        final_topk,
    )


@FEW
@given(tucker_inputs(), st.sampled_from(["torch", "triton"]))
def test_tucker_topk_is_the_twin_id_for_id(drawn, form):
    inputs, topk, final_topk = drawn
    leaves = [x.requires_grad_() for x in inputs[:3]]
    found = []
    for op, forms in ((tucker_topk, {"form": form, "backward_form": form}), (tucker_reference, {})):
        weights, row_ids = op(*inputs, topk, final_topk, **forms)
        grad = (torch.arange(weights.numel(), device=DEVICE) % 5 - 2.0).view_as(weights)
        gradients = torch.autograd.grad(weights, leaves, grad)
        # zeros times infinity add nothing in the reference, which leaves out what is not chosen
        found.append((row_ids, weights, *(gradients if inputs[1].isfinite().all() else ())))
    for ours, truth in zip(*found, strict=True):
        assert torch.equal(ours.isnan(), truth.isnan())
        assert torch.equal(ours.nan_to_num(), truth.nan_to_num())


@FEW
@given(
    st.integers(1, 12), st.integers(1, 5), st.floats(1e-4, 0.5), st.floats(0, 1), st.integers(1, 9)
)
def test_touching_every_row_at_every_step_is_adamw(num_rows, blocks, lr, decay, steps):
    torch.manual_seed(num_rows)
    shape = (num_rows, 8 * blocks)
    start = torch.randn(shape, device=DEVICE)
    states = []
    for touched in (False, True):
        state = [start.clone(), torch.zeros_like(start), torch.zeros_like(start)]
        counters = [torch.zeros(num_rows, dtype=torch.int32, device=DEVICE) for _ in range(2)]
        rows = torch.arange(num_rows, device=DEVICE)
        torch.manual_seed(steps)
        for step in range(1, steps + 1):
            grads = torch.randn(shape, device=DEVICE)
            weights, *moments = state
            options = AdamOptions(step=step, lr=lr, weight_decay=decay)
            if touched:
                touched_adamw_(weights, rows, grads, *moments, *counters, options)
            else:
                adamw_(weights, grads, *moments, options)
        states.append(state)
    for a, b in zip(*states, strict=True):
        # a few last places per step, of the largest number a weight passed through
        assert ((a - b).abs() <= 4 * steps * EPS * (1 + b.abs() + steps * lr)).all()
