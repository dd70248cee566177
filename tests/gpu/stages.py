"""Part: times the stages of one memory layer, and a feed-forward for comparison.

There are 8192 tokens, 4 heads that read 32 rows each, and 1024 sub-keys per half (1 M rows); rows
have width 2048 and are bf16, and row ids are uniform.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megamem import ops
from megamem.kernels.row_gradient import row_gradient
from megamem.ops.backend import use_triton
from megamem.ops.forms import FORMS
from megamem.ops.row_buffer import RowBuffer
from megamem.ops.sort_lookups import sort_lookups
from megamem.tools.bench import copy_gbps, median_ms
from megamem.tools.known_reads import CORES, using_form
from tests.gpu import report
from tests.gpu.layer import Sizes, TrainedLayer, build

MIN_MS = 100.0
SHOWN_KERNELS = 25
SHOWN = (
    *("top-k forward", "bag forward", "gradient norm", "AdamW step", "layer forward"),
    *("layer forward + backward", "feed-forward, forward + backward"),
)

Stage = tuple[str, Callable[[], object]]


def sizes_of(found: report.Report) -> Sizes:
    """The sizes of the layer."""
    return Sizes(
        tokens=found.divided(8192, least=16),
        hidden=found.divided(2048, least=64),
        num_keys=found.divided(1024, least=32),
        heads=4,
        topk=found.divided(32, least=8),
    )


def run(found: report.Report) -> None:
    """Time the stages of one memory layer."""
    device, sizes = found.device, sizes_of(found)
    min_ms = 1.0 if found.dry_run else MIN_MS
    times: dict[str, float] = {}

    def measure(stages: Iterator[Stage]) -> None:
        for name, stage in stages:
            times[name] = median_ms(stage, device, min_ms)
            found.add(stage=name, ms=round(times[name], 4), **vars(sizes))
        # free these tables before the next stages allocate theirs
        del stage, stages
        if not found.dry_run:
            torch.cuda.empty_cache()

    if not found.dry_run:
        found.add(stage="a large copy", gbps=round(copy_gbps(device), 1))
    rows = sizes.num_keys**2
    measure(op_stages(sizes, device, torch.bfloat16, rows))
    measure(optimizer_stage(rows, sizes.hidden, device))
    measure(feed_forward_stage(sizes, device))
    trained = build(sizes, device, torch.bfloat16)
    measure(layer_stages(trained))
    summary = ", ".join(f"{name} {times[name]:.3g}" for name in SHOWN)
    if not found.dry_run:
        # last, so that a profiler that fails does not stop the other measurements
        for name, ms, calls in kernels_of(trained.forward_backward):
            found.add(kernel=name, ms=round(ms, 4), calls=calls)
    # the times of a dry run are meaningless
    found.finish(True, f"{len(times)} stages ran" if found.dry_run else f"ms: {summary}")


def op_stages(sizes: Sizes, device: torch.device, dtype: torch.dtype, rows: int) -> Iterator[Stage]:
    """The ops of a layer on random inputs, with a table of `rows` rows."""
    yield from read_stages(sizes, device, dtype)
    yield from table_stages(sizes, device, dtype, rows)


def read_stages(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Stage]:
    """The ops from hidden states to row ids."""
    keys = 2 * sizes.heads * sizes.key_dim
    x = torch.randn(sizes.tokens, sizes.hidden, device=device).to(dtype)
    weight = torch.randn(keys, sizes.hidden, device=device).to(dtype)
    yield "query projection", lambda: x @ weight.T

    query = torch.randn(sizes.tokens, sizes.heads, 2 * sizes.key_dim, device=device).to(dtype)
    sub_keys = torch.randn(2, sizes.heads, sizes.num_keys, sizes.key_dim, device=device).to(dtype)
    for form in (None, *FORMS["product_topk"]):
        run = partial(ops.product_topk, query, sub_keys, sizes.topk, form=form)
        yield "top-k forward" + (f", {form}" if form else ""), run
    inputs = (query.clone().requires_grad_(), sub_keys.clone().requires_grad_())
    for form in (None, *FORMS["product_topk_backward"]):
        scores, _ = ops.product_topk(*inputs, sizes.topk, backward_form=form)
        grad = torch.randn_like(scores)
        run = partial(torch.autograd.grad, scores, inputs, grad, retain_graph=True)
        yield "top-k backward" + (f", {form}" if form else ""), run
    yield from tucker_stages(sizes, device, dtype)


def tucker_stages(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Stage]:
    """tucker_topk in the place of product_topk, of rank 2 with two cores and a head."""
    width, shape = sizes.key_dim // 2, (sizes.num_keys, 2, sizes.key_dim // 2)
    query = torch.randn(sizes.tokens, 2, 1, width, device=device).to(dtype).requires_grad_()
    keys = torch.randn(2, 1, *shape, device=device).to(dtype).requires_grad_()
    cores = torch.rand(2, 1, 2, 2, device=device).requires_grad_()
    directions = ops.leading_directions(cores.sum(0), torch.zeros(2, 1, 2, device=device))
    inputs = (query, keys, cores)
    for form in FORMS["tucker_topk"]:
        given = (*(x.detach() for x in inputs), directions, sizes.topk, sizes.topk)
        yield f"Tucker top-k forward, {form}", partial(ops.tucker_topk, *given, form=form)
    for form in FORMS["tucker_topk_backward"]:
        weights, _ = ops.tucker_topk(
            *inputs, directions, sizes.topk, sizes.topk, backward_form=form
        )
        grad = torch.randn_like(weights)
        run = partial(torch.autograd.grad, weights, inputs, grad, retain_graph=True)
        yield f"Tucker top-k backward, {form}", run


def _bag_of_cores(form: str, *given: Tensor, grad: Tensor | None = None, **options: Any) -> None:
    with using_form(CORES, form):
        bags = ops.embedding_bag(*given, **options)
        if grad is not None:
            torch.autograd.grad(bags, given[2], grad)


def table_stages(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, rows: int
) -> Iterator[Stage]:
    """The read-out of a table, and its gradient, which is added to an fp32 buffer."""
    tokens, lookups = sizes.tokens, sizes.heads * sizes.topk
    values = torch.randn(rows, sizes.hidden, device=device, dtype=dtype)
    grad = torch.randn(tokens, sizes.hidden, device=device).to(dtype)
    row_ids = torch.randint(rows, (tokens * lookups,), device=device)
    weights = torch.rand(tokens * lookups, device=device)
    offsets = torch.arange(0, tokens * lookups + 1, lookups, device=device)
    options: dict[str, Any] = {"known": ops.Known(may_skip=False), "check_row_ids": False}
    yield "bag forward", lambda: ops.embedding_bag(values, row_ids, weights, offsets, **options)

    buffer = torch.zeros(rows, sizes.hidden, device=device)
    leaf = weights.clone().requires_grad_()
    out = ops.embedding_bag(values, row_ids, leaf, offsets, add_value_grad_to=buffer, **options)
    yield (
        "bag backward, += fp32",
        lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True),
    )
    several = torch.rand(tokens * lookups, 2, device=device).requires_grad_()
    given = (values, row_ids, several, offsets)
    for form in FORMS[CORES]:
        yield f"bag forward, two cores, {form}", partial(_bag_of_cores, form, *given, **options)
    with_buffer = {"add_value_grad_to": buffer, **options}
    for form in FORMS[CORES]:
        yield (
            f"bag forward and backward, two cores, += fp32, {form}",
            partial(_bag_of_cores, form, *given, grad=grad, **with_buffer),
        )
    flags = torch.zeros(rows + 1, dtype=torch.bool, device=device)
    first = RowBuffer(buffer, flags, overwrites=True)
    bags = ops.embedding_bag(values, row_ids, leaf, offsets, add_value_grad_to=first, **options)

    def first_touch() -> None:
        flags.zero_()
        torch.autograd.grad(bags, leaf, grad, retain_graph=True)

    yield "bag backward, first touch", first_touch
    if use_triton(values):
        # the two parts of the backward
        known = ops.Known(may_skip=False, equal_bags=True)
        lookups = (row_ids, weights, offsets, rows, known)
        for form in FORMS["sort_lookups"]:
            name = "bag backward: sort" + (f", {form}" if form != "torch" else "")
            yield name, lambda form=form: sort_lookups(*lookups, form=form)
        ordered = sort_lookups(row_ids, weights, offsets, rows)
        yield (
            "bag backward: row gradient",
            lambda: row_gradient(ordered, grad, values, buffer, add=True),
        )


def optimizer_stage(rows: int, width: int, device: torch.device) -> Iterator[Stage]:
    """AdamW of a bf16 table with an fp32 copy, where half of the rows have a gradient."""
    weights, grads, exp_avg, exp_avg_sq = (torch.zeros(rows, width, device=device) for _ in "abcd")
    options = ops.AdamOptions(
        step=2,
        lr=1e-3,
        weight_decay=0.1,
        copy_rV=torch.empty(rows, width, device=device, dtype=torch.bfloat16),
        touched_r=torch.rand(rows, device=device) < 0.5,
        # a gradient of zero takes as long as any other
        clear_grads=True,
    )
    yield "AdamW step", lambda: ops.adamw_(weights, grads, exp_avg, exp_avg_sq, options)


def layer_stages(trained: TrainedLayer) -> Iterator[Stage]:
    """The complete layer, and the gradient norm that its table's optimizer computes every step."""

    def forward() -> None:
        with torch.no_grad():
            trained.forward()

    yield "layer forward", forward
    yield "layer forward + backward", trained.forward_backward
    yield "gradient norm", trained.optimizer.squared_norm


def feed_forward_stage(sizes: Sizes, device: torch.device) -> Iterator[Stage]:
    """A feed-forward, which a memory layer replaces."""
    hidden = sizes.hidden
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "bias": False}
    block = nn.Sequential(
        nn.Linear(hidden, 4 * hidden, **options),
        nn.GELU(),
        nn.Linear(4 * hidden, hidden, **options),
    )
    x = torch.randn(sizes.tokens, hidden, device=device).bfloat16().requires_grad_()
    grad = torch.randn_like(x)
    yield "feed-forward, forward + backward", lambda: block(x).backward(grad)


def kernels_of(work: Callable[[], object]) -> list[tuple[str, float, int]]:
    """Name, milliseconds and number of launches of the kernels of a call, slowest first."""
    work()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        torch.cuda.synchronize()
    events = [(e.key, e.self_device_time_total / 1e3, e.count) for e in profiler.key_averages()]
    return sorted(events, key=lambda event: -event[1])[:SHOWN_KERNELS]


if __name__ == "__main__":
    sys.exit(report.main("stages", run))
