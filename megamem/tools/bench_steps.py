"""The benchmark's cases of optimizer steps; megamem.tools.bench_cases has the others."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megamem import ops
from megamem.ops import forms
from megamem.reference import row_adam as row_adam_reference
from megamem.reference.squared_norm import squared_norm as norm_reference
from megamem.tools.bench_cases import Case, Rival, Work, relative_error

ADAM = ("fp32", "fp32, as in training", "bf16, moment per row")
TOUCHED = 0.63
"""Share of the rows that are touched if there are as many uniform lookups as rows: 1 - 1 / e."""


def adam_cases(widths: list[int], rows: list[int], device: torch.device) -> Iterator[Case]:
    """Optimizer steps for each width and number of rows."""
    for width in widths:
        for num_rows in rows:
            for kind in ADAM:
                shape = {"R": num_rows, "V": width}
                dtype = torch.bfloat16 if kind.startswith("bf16") else torch.float32
                build = partial(_adam, kind, shape, device)
                # bytes per number of weights, gradient, moments and copy, while drawn in fp32
                memory = num_rows * width * (11 if dtype == torch.bfloat16 else 19)
                picked = f"{TOUCHED:.0%} of rows" if kind.endswith("training") else "all rows"
                yield Case(f"adamw_ {kind}", shape, dtype, picked, build, memory)
            picked = f"{TOUCHED:.0%} of rows"
            for form in forms.FORMS["squared_norm"]:
                build, memory = partial(_norm, form, shape, device), num_rows * width * 14
                yield Case(f"squared_norm {form}", shape, torch.float32, picked, build, memory)
            for form in forms.FORMS["row_adam"]:
                build, memory = partial(_lazy, form, shape, device), num_rows * width * 23
                name = f"touched_adamw_ fp32, {form}"
                yield Case(name, shape, torch.float32, picked, build, memory)


def _adam(kind: str, shape: dict[str, int], device: torch.device) -> Work:
    num_rows, width = shape.values()
    fp32, training = kind.startswith("fp32"), kind.endswith("training")

    def tables(count: int) -> list[Tensor | None]:
        weights = torch.randn(count, width, device=device)
        grads = torch.randn(count, width, device=device)
        if fp32:
            moments = torch.zeros(2, count, width, device=device).unbind()
            return [weights, grads, *moments, torch.empty_like(weights, dtype=torch.bfloat16)]
        first = torch.zeros(count, width, dtype=torch.bfloat16, device=device)
        return [weights.bfloat16(), grads, first, torch.zeros(count, device=device), None]

    touched = torch.rand(num_rows, device=device) < TOUCHED

    def step(op: Callable[..., None], table: list[Tensor | None], seed: int | None) -> None:
        *tensors, copy = table
        assert tensors[0] is not None
        options = ops.AdamOptions(
            step=3,
            lr=1e-3,
            weight_decay=0.1,
            copy_rV=copy,
            seed=seed,
            touched_r=touched[: len(tensors[0])] if training else None,
            clear_grads=training,
        )
        op(*tensors, options)

    seed = None if fp32 else 1
    table = tables(num_rows)

    def check() -> float:
        ours = tables(min(256, num_rows))
        twin = [None if x is None else x.clone() for x in ours]
        step(ops.adamw_, ours, seed)
        step(row_adam_reference.adamw_, twin, seed)

        assert ours[2] is not None and twin[2] is not None
        assert ours[0] is not None and twin[0] is not None
        return max(relative_error(ours[n], twin[n]) for n in (0, 2))  # type: ignore[arg-type]

    # weights and moments are read and written, the copy is written, the gradient is read; in
    # training the gradients of touched rows are also cleared
    gradient = 8 * float(touched.double().mean()) if training else 4
    per_number = 26 + gradient if fp32 else 8 + gradient
    moved = int(num_rows * width * per_number) + (0 if fp32 else 8 * num_rows)
    moved += num_rows if training else 0

    def torchs() -> Callable[[], object]:
        parameter = torch.zeros(num_rows, width, device=device, requires_grad=True)
        parameter.grad = table[1]
        return torch.optim.AdamW([parameter], lr=1e-3, fused=True).step

    rivals = (Rival("torch fused AdamW", torchs),) if fp32 and device.type == "cuda" else ()
    return Work(lambda: step(ops.adamw_, table, seed), moved, check, rivals)


def _lazy(form: str, shape: dict[str, int], device: torch.device) -> Work:
    """The step of lazy_adamw on touched rows, each of which has its own counters.

    The time of form `list` has neither the making of the list nor the copy of the gradients in it.
    """
    num_rows, width = shape.values()

    def tables(count: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return weights, gradients of all rows, moments and counters; the copy; the flags."""
        weights, grads = torch.randn(2, count, width, device=device).unbind()
        moments = torch.zeros(2, count, width, device=device).unbind()
        counters = torch.zeros(2, count, dtype=torch.int32, device=device).unbind()
        copy = torch.empty_like(weights, dtype=torch.bfloat16)
        touched = torch.rand(count, device=device) < TOUCHED
        return [weights, grads, *moments, *counters], copy, touched

    def listed(table: list[Tensor], copy: Tensor, touched: Tensor) -> tuple[object, ...]:
        (weights, grads, *state), rows = table, touched.nonzero().squeeze(1)
        options = ops.AdamOptions(step=3, lr=1e-3, weight_decay=0.1, copy_rV=copy)
        return weights, rows, grads[rows], *state, options

    def marked(table: list[Tensor], copy: Tensor, touched: Tensor) -> tuple[object, ...]:
        weights, grads, *state = table
        options = ops.AdamOptions(
            step=3, lr=1e-3, weight_decay=0.1, copy_rV=copy, touched_r=touched
        )
        return weights, None, grads, *state, options

    arguments: Callable[..., tuple[Any, ...]] = marked if form == "flags" else listed

    def check() -> float:
        ours, out, touched = tables(min(256, num_rows))
        twin = [x.clone() for x in ours]
        ops.touched_adamw_(*arguments(ours, out, touched))
        row_adam_reference.touched_adamw_(*listed(twin, out.clone(), touched))  # type: ignore[arg-type]
        return max(relative_error(ours[n], twin[n]) for n in (0, 2))

    table, copy, touched = tables(num_rows)
    # the gradient is read, weights, moments and counters are read and written, the copy is written
    moved = int(touched.sum()) * (width * 30 + 16) + num_rows
    step = arguments(table, copy, touched)
    return Work(lambda: ops.touched_adamw_(*step), moved, check)


def _norm(form: str, shape: dict[str, int], device: torch.device) -> Work:
    """The gradient norm by one form, of a buffer in which some rows have a gradient."""
    num_rows, width = shape.values()
    touched = torch.rand(num_rows, device=device) < TOUCHED
    grads = torch.randn(num_rows, width, device=device).mul_(touched.unsqueeze(1))

    def check() -> float:
        few = slice(min(256, num_rows))
        ours = ops.squared_norm(grads[few], touched[few], form=form)
        return relative_error(ours.view(1), norm_reference(grads[few], touched[few]).view(1))

    # what has to be read; the form torch reads all rows, and writes and reads a copy in fp64
    moved = int(touched.sum()) * width * 4 + num_rows
    return Work(lambda: ops.squared_norm(grads, touched, form=form), moved, check)
