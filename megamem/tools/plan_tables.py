"""A plan as tables for a terminal."""

from rich.console import Console
from rich.table import Table

from megamem.planner.cost import LayoutCost
from megamem.planner.hardware import ASSUMPTIONS, HARDWARE
from megamem.planner.job import Job
from megamem.planner.plan import GB, KIB, Plan, fastest, fits


def show_plan(plan: Plan, console: Console, *, asks: bool) -> None:
    """Print parameters, layouts, stages, times by GPU, GPUs needed, and the recommendation.

    If no layout fits, stages and times are those of the smallest, and what is missing is printed.

    Args:
        plan: the plan.
        console: where to print it.
        asks: whether the command line names a layout.
    """
    job, best = plan.job, plan.recommended
    show = console.print
    show(_parameters(plan))
    show(f"\n{_batch(job)}", highlight=False)
    show(_layouts(plan))
    show(_stages(plan))
    show(_times(plan))
    show(_needed(plan))
    state = job.state
    show(
        f"\nWith --memory-optimizer {job.spec.optimizer} training stores {state.total} bytes per "
        f"parameter of the table: weights {state.weights}, fp32 copy {state.master}, gradient "
        f"{state.gradient}, moments {state.moments}"
        + (f"; and {state.per_row} bytes per row." if state.per_row else "."),
        highlight=False,
    )
    show(ASSUMPTIONS, style="dim", highlight=False)
    if best is not None:
        show(f"\nRecommended: {best.flags}", style="bold", highlight=False)
        show(plan.why, highlight=False)
    else:
        show(f"\n{plan.why}", style="bold red", highlight=False)
    if best is None or plan.asked.name != best.name:
        verdict = "fits" if fits(job, plan.asked) else "does not fit"
        chosen = "Your flags select" if asks else "Without these flags the layout is"
        if best is None and not asks:
            chosen = "The default layout is"
        show(
            f"{chosen} {plan.asked.name}, which {verdict}: "
            f"{plan.asked.bytes.total / GB:.1f} GB per rank, and "
            f"{plan.asked.seconds[job.gpu].table * 1e3:.1f} ms per step for the table.",
            highlight=False,
        )


def _batch(job: Job) -> str:
    """The batch for which the plan is made, in a sentence."""
    cluster, length = job.cluster, job.shape.seq_length
    count = cluster.microbatches
    return (
        f"A step is {cluster.batch:,} sequences of {length:,} tokens: {count:,} "
        f"{'microbatch' if count == 1 else 'microbatches'} of {cluster.micro_batch_size} on each "
        f"of {cluster.data_parallel:,} data-parallel ranks."
    )


def _parameters(plan: Plan) -> Table:
    table = Table(box=None)
    table.add_column("part of the model")
    table.add_column("million parameters", justify="right")
    for part, count in plan.parameters.items():
        style = "bold" if part == "total" else None
        table.add_row(part, f"{count / 1e6:,.1f}", style=style)
    table.add_row("active for one token", f"{plan.active / 1e6:,.1f}")
    return table


def _layouts(plan: Plan) -> Table:
    table = _table(
        "The best grid of every mode and number of ranks. The columns from table to total are GB "
        "per rank (table = weights,\ngradients and optimizer state); inside and across are KiB "
        "sent per token and memory layer, forward and backward,\ninside nodes and between them; "
        "all-reduce (gradients of replicas) is GB that a rank sends per step; ms is the\ntable's "
        "time per step."
    )
    table.add_column("layout", no_wrap=True)
    table.add_column("wire", no_wrap=True)
    for title in ("pieces", "replicas", "table", "buffers", "dense"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("total", "fits", "inside", "across", "all-reduce", "ms"):
        table.add_column(title, justify="right", no_wrap=True)
    for cost in _best_grids(plan):
        parts, fit = cost.bytes, fits(plan.job, cost)
        table.add_row(
            str(cost.layout),
            cost.wire if cost.layout.row_ranks > 1 else "",
            str(cost.pieces),
            str(cost.replicas),
            f"{parts.table / GB:.1f}",
            f"{parts.buffers / GB:.1f}",
            f"{parts.dense / GB:.1f}",
            f"{parts.total / GB:.1f}",
            "yes" if fit else "no",
            f"{cost.sent.inside / KIB:.1f}",
            f"{cost.sent.across / KIB:.1f}",
            f"{cost.replicas_per_step / GB:.2f}",
            f"{cost.seconds[plan.job.gpu].table * 1e3:.0f}",
            style=_style(plan, cost, fit),
        )
    return table


def _best_grids(plan: Plan) -> list[LayoutCost]:
    """Of the grids of each mode and number of ranks, the fastest that fits or else the smallest."""
    same: dict[tuple[int, str], list[LayoutCost]] = {}
    for cost in plan.costs:
        same.setdefault((cost.layout.group_size, cost.layout.mode), []).append(cost)
    order = ("row", "column", "2d")
    return [
        fastest(plan.job, costs) or min(costs, key=lambda cost: cost.bytes.total)
        for (_, _), costs in sorted(same.items(), key=lambda x: (x[0][0], order.index(x[0][1])))
    ]


def _times(plan: Plan) -> Table:
    table = _table(
        f"Estimated time of a step with {plan.shown.name}, in ms;\ninside and across are the "
        "exchange, of which pieces hide a part"
    )
    columns = ("lookup", "inside", "across", "hidden", "all-reduce", "optimizer", "table", "dense")
    table.add_column("GPU")
    for title in (*columns, "table's share"):
        table.add_column(title, justify="right")
    for gpu, hardware in HARDWARE.items():
        step = plan.shown.seconds[gpu]
        exchange = (step.inside, step.across, step.hidden)
        others = (step.replicas, step.optimizer, step.table, step.dense)
        parts = (step.lookup, *exchange, *others)
        table.add_row(
            hardware.name, *(f"{part * 1e3:.1f}" for part in parts), f"{100 * step.share:.0f} %"
        )
    return table


def _stages(plan: Plan) -> Table:
    """The stages of the recommended layout on the job's GPU, and their sums."""
    gpu, step = plan.job.hardware.name, plan.shown.seconds[plan.job.gpu]
    table = _table(f"Estimated stages of memory layers with {plan.shown.name} on {gpu}, in ms")
    table.add_column("stage")
    for title in ("", "per layer and microbatch", "per step"):
        table.add_column(title, justify="right")
    table.add_column("measured")
    for stage in step.stages:
        table.add_row(
            stage.name,
            stage.phase,
            "" if stage.phase == "step" else f"{stage.seconds * 1e3:.2f}",
            f"{stage.per_step * 1e3:.1f}",
            "on an H100" if stage.record else "no, estimated",
        )
    passes = [stage for stage in step.stages if stage.phase != "step"]
    table.add_row(
        "sum",
        "",
        f"{sum(stage.seconds for stage in passes) * 1e3:.2f}",
        f"{(step.lookup + step.optimizer) * 1e3:.1f}",
        style="bold",
    )
    return table


def _needed(plan: Plan) -> Table:
    fill = f"{100 * plan.job.fill:.0f} %"
    table = _table(f"Fewest GPUs that hold model and table in {fill} of their memory")
    table.add_column("optimizer")
    for hardware in HARDWARE.values():
        table.add_column(f"{hardware.name} {hardware.memory / GB:.0f} GB", justify="right")
    for optimizer, counts in plan.gpus_needed.items():
        table.add_row(optimizer, *("none" if n is None else str(n) for n in counts.values()))
    return table


def _table(title: str) -> Table:
    return Table(box=None, title=f"\n{title}", title_justify="left", title_style="bold")


def _style(plan: Plan, cost: LayoutCost, fit: bool) -> str | None:
    if cost is plan.recommended:
        return "bold green"
    return None if fit else "dim"
