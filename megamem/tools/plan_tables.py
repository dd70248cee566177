"""A plan as tables for a terminal."""

from rich.console import Console
from rich.table import Table

from megamem.planner.cost import LayoutCost
from megamem.planner.hardware import ASSUMPTIONS, HARDWARE
from megamem.planner.plan import GB, KIB, Plan, fits


def show_plan(plan: Plan, console: Console) -> None:
    """Parameters, every layout, times by GPU, GPUs needed, and what to take."""
    job, best = plan.job, plan.recommended
    show = console.print
    show(_parameters(plan))
    show(_layouts(plan))
    show(_times(plan))
    show(_needed(plan))
    state = job.state
    show(
        f"{job.spec.optimizer} keeps {state.total} bytes per table parameter: weights "
        f"{state.weights}, fp32 copy {state.master}, gradient {state.gradient}, moments "
        f"{state.moments}" + (f"; and {state.per_row} per row." if state.per_row else "."),
    )
    show(ASSUMPTIONS, style="dim")
    show(f"\nRecommended: {best.layout.flags}", style="bold", highlight=False)
    show(plan.why)
    if plan.asked.layout != best.layout:
        verdict = "fits" if fits(job, plan.asked) else "does not fit"
        show(
            f"Your flags ask for {plan.asked.layout}, which {verdict}: "
            f"{plan.asked.bytes.total / GB:.1f} GB, "
            f"{plan.asked.seconds[job.gpu].table * 1e3:.1f} ms."
        )


def _parameters(plan: Plan) -> Table:
    table = Table("parameters", _right("millions"), box=None, title_justify="left")
    for part, count in plan.parameters.items():
        style = "bold" if part == "total" else None
        table.add_row(part, f"{count / 1e6:,.1f}", style=style)
    return table


def _layouts(plan: Plan) -> Table:
    table = _table("Layouts: GB on a rank, KiB sent per token and layer, GB sent by a rank a step")
    for title in ("layout", "replicas", "table", "of it opt", "grads"):
        table.add_column(title, justify="left" if title == "layout" else "right", no_wrap=True)
    for title in ("buffers", "dense", "total", "fits", "forward", "back", "lookups", "replicas"):
        table.add_column(title, justify="right", no_wrap=True)
    for cost in plan.costs:
        parts, fit = cost.bytes, fits(plan.job, cost)
        table.add_row(
            str(cost.layout),
            str(cost.replicas),
            f"{parts.table / GB:.1f}",
            f"{parts.optimizer / GB:.1f}",
            f"{parts.gradients / GB:.1f}",
            f"{parts.buffers / GB:.1f}",
            f"{parts.dense / GB:.1f}",
            f"{parts.total / GB:.1f}",
            "yes" if fit else "no",
            f"{cost.sent.forward / KIB:.1f}",
            f"{cost.sent.backward / KIB:.1f}",
            f"{cost.exchange_per_step / GB:.2f}",
            f"{cost.replicas_per_step / GB:.2f}",
            style=_style(plan, cost, fit),
        )
    return table


def _times(plan: Plan) -> Table:
    table = _table(f"{plan.recommended.layout}: estimated ms of a step")
    columns = ("lookup", "exchange", "replicas", "optimizer", "table", "dense", "table's share")
    table.add_column("GPU")
    for title in columns:
        table.add_column(title, justify="right")
    for gpu, hardware in HARDWARE.items():
        step = plan.recommended.seconds[gpu]
        parts = (step.lookup, step.exchange, step.replicas, step.optimizer, step.table, step.dense)
        table.add_row(
            hardware.name, *(f"{part * 1e3:.1f}" for part in parts), f"{100 * step.share:.0f} %"
        )
    return table


def _needed(plan: Plan) -> Table:
    fill = f"{100 * plan.job.fill:.0f} %"
    table = _table(f"Fewest GPUs that hold it at {fill} of their memory")
    table.add_column("optimizer")
    for hardware in HARDWARE.values():
        table.add_column(f"{hardware.name} {hardware.memory / GB:.0f} GB", justify="right")
    for optimizer, counts in plan.gpus_needed.items():
        table.add_row(optimizer, *("none" if n is None else str(n) for n in counts.values()))
    return table


def _table(title: str) -> Table:
    return Table(box=None, title=f"\n{title}", title_justify="left", title_style="bold")


def _right(title: str) -> str:
    return f"[right]{title}[/right]"


def _style(plan: Plan, cost: LayoutCost, fit: bool) -> str | None:
    if cost is plan.recommended:
        return "bold green"
    return None if fit else "dim"
