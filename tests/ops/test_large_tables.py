"""Tables beyond 2**31 numbers: the right rows are met, and no other row costs anything."""

import mmap

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megamem.kernels.sort_lookups import sort_by_torch
from megamem.ops import (
    AdamOptions,
    add_value_gradient_,
    embedding_bag,
    sparse_gradients,
    touched_adamw_,
    touched_sgd_,
)
from megamem.reference.embedding_bag import embedding_bag as reference

# of Linux, which Python 3.12 does not name
MAP_NORESERVE = 0x4000
WIDTH = 8
NUM_ROWS = 2**28 + 9
# number 2**31 lies in row 2**28; an address that wraps would hit one of the low rows
ROWS = torch.tensor([NUM_ROWS - 1, 0, 2**28, 2**27, 2**28 + 3, 5])


def _table(dtype: torch.dtype, device: str, *, width: int = WIDTH) -> torch.Tensor:
    """Zeros; on a CPU, memory that is not there before somebody writes to it."""
    if device == "cuda":
        return torch.zeros(NUM_ROWS, width, dtype=dtype, device=device).squeeze(-1)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, NUM_ROWS * width * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(NUM_ROWS, width).squeeze(-1)


class _Sizes(TorchDispatchMode):
    """The largest tensor that an op made, in numbers; views and what was there do not count."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.numel())
        return result


@pytest.fixture(scope="module")
def lookups():
    """Every row twice, and one lookup of none; row_ids index a compact table of the rows above."""
    torch.manual_seed(0)
    small_ids = torch.tensor([0, 1, 2, 3, 4, 5, -1, 5, 4, 3, 2, 1, 0])
    weights, offsets = torch.randn(13), torch.tensor([0, 4, 4, 13])
    return small_ids, weights, offsets, torch.randn(len(ROWS), WIDTH), torch.randn(3, WIDTH)


def test_lookups_and_gradients(device, lookups):
    small_ids, weights, offsets, rows, grad = (x.to(device) for x in lookups)
    at = ROWS.to(device)
    large_ids = torch.where(small_ids < 0, -1, at[small_ids])
    table, buffer = _table(torch.float16, device), _table(torch.bfloat16, device)
    table[at] = rows.half()
    small = table[at].float()
    per_lookup = weights.clone().requires_grad_()
    small_leaf, small_weights = small.clone().requires_grad_(), weights.clone().requires_grad_()
    truth = reference(small_leaf, small_ids, small_weights, offsets)
    truth.backward(grad.half().float())

    with _Sizes(table, buffer) as made:
        out = embedding_bag(table, large_ids, per_lookup, offsets, add_value_grad_to=buffer)
        out.backward(grad.half())
        add_value_gradient_(buffer, grad.half(), large_ids, weights, offsets)
        touched, grads, by_weight = sparse_gradients(
            table, grad.half(), large_ids, weights, offsets
        )
    assert 0 < made.largest < 1000
    half, brain = (torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16))
    torch.testing.assert_close(out.float(), truth.detach(), rtol=half, atol=half)
    torch.testing.assert_close(per_lookup.grad, small_weights.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_weight, small_weights.grad, rtol=1e-5, atol=1e-5)
    order = at.argsort()
    assert torch.equal(touched[:6], at[order]) and (touched[6:] == -1).all()
    true_grads = small_leaf.grad[order]
    torch.testing.assert_close(grads[:6].float(), true_grads, rtol=half, atol=half)
    # added twice, rounded twice
    torch.testing.assert_close(
        buffer[at[order]].float(), 2 * true_grads, rtol=2 * brain, atol=brain
    )
    # what a wrapped address would have written to
    assert not buffer[[1, 2, 3, 4, 6, 7, 8]].any()


def test_row_optimizers(device):
    at = ROWS.to(device)
    start = torch.randn(len(at), WIDTH, device=device).bfloat16()
    grads = torch.randn(len(at), WIDTH, device=device)
    tables = [_table(torch.bfloat16, device) for _ in range(3)]
    counters = [_table(torch.int32, device, width=1) for _ in range(2)]
    tables[0][at] = start
    small = [start.clone(), *torch.zeros(2, *start.shape, dtype=torch.bfloat16, device=device)]
    options = AdamOptions(step=3, lr=0.1, weight_decay=0.1)
    with _Sizes(*tables, *counters) as made:
        touched_adamw_(tables[0], at, grads, tables[1], tables[2], *counters, options)
        touched_sgd_(tables[0], at, grads, options)
    assert made.largest < 1000
    small_counters = [torch.zeros(len(at), dtype=torch.int32, device=device) for _ in range(2)]
    every = torch.arange(len(at), device=device)
    touched_adamw_(small[0], every, grads, small[1], small[2], *small_counters, options)
    touched_sgd_(small[0], every, grads, options)
    for large, expected in zip(tables, small, strict=True):
        assert torch.equal(large[at], expected)
    assert (counters[0][at] == 1).all() and (counters[1][at] == 3).all()
    assert not counters[0][[1, 2, 3, 4, 6, 7, 8]].any()


@pytest.mark.parametrize(
    ("num_rows", "key"), [(2**15 - 1, torch.int16), (2**15, torch.int32), (2**31 - 2, torch.int32)]
)
def test_sort_keys_are_as_narrow_as_the_table(num_rows, key, device):
    """The last row and the lookup of none, which is sorted as one row more, still fit."""
    ids = torch.tensor([num_rows - 1, -1, 0, num_rows - 1, 3], device=device)
    offsets = torch.tensor([0, 2, 5], device=device)
    lookups = sort_by_torch(ids, torch.arange(5.0, device=device), offsets, num_rows)
    assert lookups.rows_M.dtype == key
    assert lookups.rows_M.tolist() == [0, 3, num_rows - 1, num_rows - 1, num_rows]
    assert lookups.order_M.tolist() == [2, 4, 0, 3, 1]
    assert lookups.bags_M.tolist() == [1, 1, 0, 1, 0]
    assert lookups.weights_M.tolist() == [2, 4, 0, 3, 1]
