"""The benchmark's cases of lookups sorted by row, and of the row gradient that follows."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from megamem import ops
from megamem.ops.backend import use_triton
from megamem.ops.forms import FORMS
from megamem.ops.row_buffer import RowBuffer
from megamem.ops.value_gradient import add_rows_
from megamem.reference.embedding_bag import embedding_bag as bag_reference
from megamem.reference.sort_lookups import sort_lookups as reference
from megamem.tools.bench_cases import CHECKED_BAGS, Case, Work, draw_rows, relative_error

GROUPS = (1, 8)
"""Ranks whose lookups are received; all but one of so many are of rows on other ranks."""


def sort_cases(
    width: int,
    rows: list[int],
    tokens: int,
    lookups: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Case]:
    """Each form of sort_lookups, and the row gradient of what it returns."""
    kernels = device.type == "cuda" or use_triton(torch.empty(0))
    forms = FORMS["sort_lookups"] if kernels else ("torch",)
    for num_rows in rows:
        for ranks in GROUPS:
            picked = "uniform, all present" if ranks == 1 else f"uniform, 1 of {ranks} present"
            shape = {"T": ranks * tokens, "L": lookups, "R": num_rows, "V": width}
            count = ranks * tokens * lookups
            for form in forms:
                build = partial(_sort, form, shape, ranks, device)
                yield Case(f"sort_lookups {form}", shape, torch.int32, picked, build, 80 * count)
                if not kernels:
                    continue
                build = partial(_gradient, form, shape, ranks, dtype, device)
                memory = num_rows * width * (dtype.itemsize + 4) + 120 * count
                memory += ranks * tokens * width * 8 + 2**28
                yield Case(f"row gradient after {form}", shape, dtype, picked, build, memory)


class _Arrived:
    """Lookups of several ranks, of which this rank has the rows of one part."""

    def __init__(self, shape: dict[str, int], ranks: int, device: torch.device) -> None:
        self.num_bags, self.lookups, self.num_rows, self.width = shape.values()
        count = self.num_bags * self.lookups
        ids = draw_rows(count, self.num_rows, "uniform", device)
        here = torch.randint(ranks, (count,), device=device) == 0
        self.row_ids = ids.where(here, -1).int()
        self.weights = torch.rand(count, device=device)
        self.offsets = torch.arange(0, count + 1, self.lookups, device=device)
        self.present = int(here.sum())
        self.known = ops.Known(ranks > 1, equal_bags=True, expected=count // ranks)

    def first(self, bags: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row ids, weights and offsets of the first bags."""
        count = bags * self.lookups
        return self.row_ids[:count], self.weights[:count], self.offsets[: bags + 1]


def _sort(form: str, shape: dict[str, int], ranks: int, device: torch.device) -> Work:
    arrived = _Arrived(shape, ranks, device)

    def check() -> float:
        few = arrived.first(min(CHECKED_BAGS, arrived.num_bags))
        truth = reference(*few)
        ours = ops.sort_lookups(*few, arrived.num_rows, arrived.known, form=form)
        found = (ours.rows_M, ours.order_M, ours.bags_M, ours.weights_M)
        pairs = zip(found, truth, strict=True)
        return max(float((x[: len(y)] != y).any()) for x, y in pairs)

    # row ids are read; of what is present, weights are read, and 4 numbers are written
    moved = 4 * len(arrived.row_ids) + 20 * arrived.present
    sizes = (arrived.row_ids, arrived.weights, arrived.offsets, arrived.num_rows)
    return Work(lambda: ops.sort_lookups(*sizes, arrived.known, form=form), moved, check)


def _gradient(
    form: str, shape: dict[str, int], ranks: int, dtype: torch.dtype, device: torch.device
) -> Work:
    """The gradient of rows, added to an fp32 buffer, and of weights."""
    arrived = _Arrived(shape, ranks, device)
    width, num_rows = arrived.width, arrived.num_rows
    values = torch.empty(num_rows, width, dtype=dtype, device=device).normal_()
    grad = torch.randn(arrived.num_bags, width, device=device).to(dtype)
    buffer = torch.zeros(num_rows, width, device=device)

    def check() -> float:
        bags = min(CHECKED_BAGS, arrived.num_bags)
        row_ids, weights, offsets = arrived.first(bags)
        rows, slots = row_ids.unique(return_inverse=True)
        # the first is -1 where lookups are absent
        absent = int(rows[0] < 0)
        rows, slots = rows[absent:], slots - absent
        table = values[rows].double().requires_grad_()
        leaf = weights.double().requires_grad_()
        truth = bag_reference(table, slots, leaf, offsets)
        true_gradients = torch.autograd.grad(truth, (table, leaf), grad[:bags].double())
        ours = ops.sort_lookups(slots, weights, offsets, len(rows), arrived.known, form=form)
        sums = torch.zeros(len(rows), width, device=device)
        by_weight = add_rows_(RowBuffer(sums), ours, grad[:bags].contiguous(), values[rows])
        assert by_weight is not None
        pairs = zip((sums, by_weight), true_gradients, strict=True)
        return max(relative_error(x, y) for x, y in pairs)

    sizes = (arrived.row_ids, arrived.weights, arrived.offsets, num_rows)
    by_row = ops.sort_lookups(*sizes, arrived.known, form=form)
    # rows and gradients of bags are read, the buffer is read and written at rows that are read
    distinct = len(arrived.row_ids.unique()) - int(ranks > 1)
    moved = distinct * width * (dtype.itemsize + 8) + grad.numel() * dtype.itemsize
    moved += 20 * arrived.present
    return Work(lambda: add_rows_(RowBuffer(buffer), by_row, grad, values), moved, check)
