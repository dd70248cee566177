"""The checks of known_answers for one step of an optimizer.

A table repeats the same BLOCK rows, so one block in float64 is the truth for all of it. If a step
loses a gradient, clears one too early, reads a counter that was already written, or changes a row
that it must not, numbers differ by far more than the rounding that is allowed.

Each check returns None, or a sentence that says how many of which numbers are wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megamem import ops
from megamem.ops import forms
from megamem.ops.backend import use_triton
from megamem.reference import row_adam as reference

BLOCK = 16
"""Number of rows after which a table repeats."""
CHUNK = 2**25
"""Numbers that are compared at once."""
POISON = 1e30
"""Value of the gradients that a step must not read."""
STEP, LR, WEIGHT_DECAY = 50, 2.0**-6, 0.1
SCALE = 0.5
NORM_BOUND = 1e-14
"""Relative error bound of a sum of squares in fp64."""
FP32_BOUND, BF16_BOUND = 2e-6, 2.0**-7
"""Relative error bounds: several roundings in fp32; one unit in the last place for bf16 weights,
which are rounded stochastically."""


@dataclass(frozen=True)
class Form:
    """The dtype and the optimizer state of a step."""

    weights: torch.dtype = torch.float32
    """The dtype of the weights that are updated."""
    copy: bool = False
    """The step also writes a bf16 copy of the weights."""
    first: bool = True
    """There is a first moment."""
    second: str = "number"
    """A second moment per "number" or per "row"; "" for none."""


@dataclass
class Table:
    """Weights and optimizer state, in the order of the ops' arguments."""

    weights: Tensor
    grads: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    touched: Tensor
    """Whether each row has a gradient: [rows] bool."""
    touches: Tensor
    """How often each row was updated, for lazy optimizers: [rows] int32."""
    last_steps: Tensor
    """The last step that updated each row, for lazy optimizers: [rows] int32."""

    def repeated(self, times: int) -> "Table":
        """The table repeated along its rows."""
        return self._map(lambda x: x.repeat(times, *[1] * (x.dim() - 1)))

    def exact(self) -> "Table":
        """A copy in float64."""
        return self._map(
            lambda x: x.to(torch.float64 if x.is_floating_point() else x.dtype, copy=True)
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Table":
        found: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {n: None if x is None else change(x) for n, x in found.items()}
        return Table(**changed)


def block_of(form: Form, width: int, device: torch.device) -> Table:
    """BLOCK rows as they are during training; every third row has no gradient."""
    generator = torch.Generator(device).manual_seed(8)

    def draw(*shape: int) -> Tensor:
        # magnitudes from 1 to 2, as relative errors near 0 are meaningless
        signs = torch.randint(2, shape, generator=generator, device=device) * 2 - 1
        return (torch.rand(shape, generator=generator, device=device) + 1) * signs

    rows = torch.arange(BLOCK, device=device)
    touched = rows % 3 != 2
    grads = torch.where(touched.unsqueeze(-1), draw(BLOCK, width), POISON)
    squares = {"number": (BLOCK, width), "row": (BLOCK,)}.get(form.second)
    return Table(
        # small enough that an update changes them by a tenth or more
        weights=(draw(BLOCK, width) / 8).to(form.weights),
        grads=grads,
        exp_avg=draw(BLOCK, width) / 4 if form.first else None,
        exp_avg_sq=None if squares is None else draw(*squares).square() / 64,
        touched=touched,
        touches=(rows % 5).int(),
        last_steps=(rows % 5).int() * 7,
    )


def dense_step_is_right(
    device: torch.device, rows: int, width: int, op: str, form: Form
) -> str | None:
    """A step on all rows that clears the gradients it has read."""
    block = block_of(form, width, device)
    table = block.repeated(rows // BLOCK)
    copy = None
    if form.copy:
        copy = torch.full_like(table.weights, torch.nan, dtype=torch.bfloat16)
    options = replace(_options(form, copy, device), touched_r=table.touched, clear_grads=True)
    moments = [m for m in (table.exp_avg, table.exp_avg_sq) if m is not None]
    getattr(ops, op)(table.weights, table.grads, *moments, options)
    truth = block.exact()
    reference.adamw_(
        *(truth.weights, truth.grads, truth.exp_avg, truth.exp_avg_sq),
        replace(_exact_options(device), touched_r=truth.touched, clear_grads=True),
    )
    return _differences(table, truth, copy)


def touched_step_is_right(
    device: torch.device, rows: int, width: int, op: str, form: Form
) -> str | None:
    """A step on touched rows, each of which has its own counters."""
    block = block_of(form, width, device)
    table = block.repeated(rows // BLOCK)
    copy = table.weights.bfloat16() if form.copy else None
    chosen = table.touched.nonzero().squeeze(-1)
    grads = table.grads[chosen]
    # as from sparse_gradients: slots without a row follow, whose gradients are undefined
    chosen = torch.nn.functional.pad(chosen, (0, BLOCK), value=-1)
    grads = torch.nn.functional.pad(grads, (0, 0, 0, BLOCK), value=POISON)
    lazy = op != "touched_sgd_"
    moments = [m for m in (table.exp_avg, table.exp_avg_sq) if m is not None]
    counters = [table.touches, table.last_steps] if lazy else []
    options = _options(form, copy, device)
    getattr(ops, op)(table.weights, chosen, grads, *moments, *counters, options)
    return _differences(table, _touched_truth(block, lazy, device), copy)


def marked_step_is_right(
    device: torch.device, rows: int, width: int, op: str, form: Form
) -> str | None:
    """A step on rows that flags mark, without a list of them, which clears their gradients."""
    block = block_of(form, width, device)
    table = block.repeated(rows // BLOCK)
    copy = table.weights.bfloat16() if form.copy else None
    lazy = op != "touched_sgd_"
    moments = [m for m in (table.exp_avg, table.exp_avg_sq) if m is not None]
    counters = [table.touches, table.last_steps] if lazy else []
    options = replace(_options(form, copy, device), touched_r=table.touched, clear_grads=True)
    getattr(ops, op)(table.weights, None, table.grads, *moments, *counters, options)
    truth = _touched_truth(block, lazy, device)
    truth.grads[truth.touched] = 0
    return _differences(table, truth, copy)


def _touched_truth(block: Table, lazy: bool, device: torch.device) -> Table:
    """A block after a step on its touched rows, in float64."""
    truth = block.exact()
    chosen = truth.touched.nonzero().squeeze(-1)
    grads = truth.grads[chosen]
    if lazy:
        reference.touched_adamw_(
            *(truth.weights, chosen, grads),
            *(truth.exp_avg, truth.exp_avg_sq),
            *(truth.touches, truth.last_steps),
            _exact_options(device),
        )
    else:
        reference.touched_sgd_(truth.weights, chosen, grads, _exact_options(device))
    return truth


def norm_is_right(device: torch.device, rows: int, width: int, op: str, form: Form) -> str | None:
    """The sum of squares of whole numbers, by both forms; the kernel must not read other rows."""
    for name in ("torch", "triton"):
        if wrong := _norm_by(name, device, rows, width, op, form):
            return wrong
    return None


def selected_norm_is_right(
    device: torch.device, rows: int, width: int, op: str, form: Form
) -> str | None:
    """The same by the form that is selected alone."""
    return _norm_by(forms.pick(op), device, rows, width, op, form)


def _norm_by(
    name: str, device: torch.device, rows: int, width: int, op: str, form: Form
) -> str | None:
    count = torch.arange(BLOCK * width, dtype=torch.float64).view(BLOCK, width)
    touched = torch.arange(BLOCK) % 3 == 0
    block = (count % 17 - 8) * touched.unsqueeze(1)
    exact = float(block.square().sum()) * (rows // BLOCK)
    grads = block.to(device, form.weights).repeat(rows // BLOCK, 1)
    every = touched.to(device).repeat(rows // BLOCK)
    if name == "triton":
        if not use_triton(grads):
            return None
        grads[~every] = POISON
    found = float(getattr(ops, op)(grads, every, form=name))
    if not abs(found - exact) <= NORM_BOUND * exact:
        return f"the sum of squares by the form {name} is {found!r}, not {exact!r}"
    return None


def _options(form: Form, copy: Tensor | None, device: torch.device) -> ops.AdamOptions:
    """The options of the op under test; bf16 weights are rounded stochastically."""
    return ops.AdamOptions(
        step=STEP,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        grad_scale=torch.full((1,), SCALE, device=device),
        seed=1 if form.weights == torch.bfloat16 else None,
        copy_rV=copy,
    )


def _exact_options(device: torch.device) -> ops.AdamOptions:
    scale = torch.full((1,), SCALE, dtype=torch.float64, device=device)
    return ops.AdamOptions(step=STEP, lr=LR, weight_decay=WEIGHT_DECAY, grad_scale=scale)


def _differences(table: Table, truth: Table, copy: Tensor | None) -> str | None:
    """A sentence about the first tensor with wrong numbers; None if all are correct."""
    rounded = table.weights.dtype == torch.bfloat16
    expected: list[tuple[str, Tensor | None, Tensor | None, float]] = [
        ("gradients after the step", table.grads, truth.grads, 0.0),
        ("weights", table.weights, truth.weights, BF16_BOUND if rounded else FP32_BOUND),
        ("first moment", table.exp_avg, truth.exp_avg, FP32_BOUND),
        ("second moment", table.exp_avg_sq, truth.exp_avg_sq, FP32_BOUND),
        ("bf16 copy", copy, truth.weights, BF16_BOUND),
        ("touches", table.touches, truth.touches, 0.0),
        ("last steps", table.last_steps, truth.last_steps, 0.0),
    ]
    for what, ours, right, bound in expected:
        if ours is None or right is None:
            continue
        wrong = _far(ours, right, bound)
        if wrong:
            return f"{wrong:,} of {ours.numel():,} numbers of the {what} are wrong"
    return None


def _far(ours: Tensor, block: Tensor, bound: float) -> int:
    """How many numbers of a table differ from the block that it repeats."""
    blocks = ours.view(-1, *block.shape)
    tolerance = bound * block.abs()
    # exact comparisons are made in the dtype of the table
    truth = block.to(ours.dtype) if bound == 0 else block
    return sum(
        int((~((part - truth).abs() <= tolerance)).sum())
        for part in blocks.split(max(1, CHUNK // block.numel()))
    )
