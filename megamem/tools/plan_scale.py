"""What the table of the paper's models takes of a step, on 8 to 1,024 GPUs.

python -m megamem.tools.plan_scale examples/README.md     rewrites the table in this file
"""

import sys
from pathlib import Path

from megamem.config import MemoryConfig
from megamem.planner import Cluster, Job, preset
from megamem.planner.cost import LayoutCost, layout_cost
from megamem.planner.plan import all_costs, fastest
from megamem.resolution import resolve
from megamem.spec import Layout
from megamem.tools import markers
from megamem.tools.plan import PRESET_MICROBATCH_TOKENS, PRESET_TOKENS

GPUS = (8, 32, 128, 512, 1024)
NUM_KEYS = {"1M": 1024, "4M": 2048, "16M": 4096, "64M": 8192}
TENSOR_RANKS = {"1.3b": 1, "8b": 8}
"""The tensor-parallel size of each model, as in examples/cluster."""


def job_of(model: str, num_keys: int, gpus: int) -> Job:
    """The job that `megamem plan --preset` describes, on so many H100."""
    shape, layers = preset(model)
    sequences, tensor_ranks = PRESET_MICROBATCH_TOKENS // shape.seq_length, TENSOR_RANKS[model]
    step = sequences * gpus // tensor_ranks
    cluster = Cluster(
        world_size=gpus,
        tensor_model_parallel_size=tensor_ranks,
        micro_batch_size=sequences,
        global_batch_size=max(1, round(PRESET_TOKENS / shape.seq_length / step)) * step,
    )
    spec = resolve(
        MemoryConfig(memory_layers=layers, memory_num_keys=num_keys),
        shape.hidden_size,
        tensor_ranks=tensor_ranks,
        stage_ranks=cluster.stage_ranks,
        batch_tokens=cluster.batch * shape.seq_length,
        microbatch_tokens=cluster.microbatch_tokens(shape.seq_length),
    )
    return Job(shape=shape, spec=spec, cluster=cluster)


def table() -> str:
    """The table as Markdown, with a row for every model, number of rows and number of GPUs."""
    lines = [
        "| model | rows | GPUs | layout | pieces | inside, ms | across, ms | exchange, ms "
        "| table, ms | share | with a named mode |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in TENSOR_RANKS:
        for rows, num_keys in NUM_KEYS.items():
            for gpus in GPUS:
                job = job_of(model, num_keys, gpus)
                lines.append(f"| `{model}` | {rows} | {gpus:,} | {_cells(job)} |")
    return "\n".join(lines)


def _cells(job: Job) -> str:
    costs = all_costs(job)
    best = fastest(job, costs)
    if best is None:
        return " | ".join(["does not fit", *[""] * 7])
    step = best.seconds[job.gpu]
    exchange = (step.inside, step.across, step.exchange, step.table)
    cells = [str(best.layout), str(best.pieces), *(f"{part * 1e3:.0f}" for part in exchange)]
    named = fastest(job, [layout_cost(job, layout) for layout in named_layouts(job, costs)])
    last = "does not fit" if named is None else f"{named.layout}: {_share(job, named)}"
    return " | ".join([*cells, _share(job, best), last])


def _share(job: Job, cost: LayoutCost) -> str:
    return f"{100 * cost.seconds[job.gpu].share:.0f} %"


def named_layouts(job: Job, costs: list[LayoutCost]) -> list[Layout]:
    """The layouts that `--memory-mode row | column | 2d` names, of those with these costs."""
    near = job.cluster.gpus_per_node
    return [
        layout
        for layout in (cost.layout for cost in costs)
        if layout == Layout.of_mode(layout.mode, layout.group_size, layout.column_ranks, near)
    ]


def rewrite(page: str) -> str:
    """The page with the table as it is now."""
    return markers.rewrite(page, "scale", table())


def main() -> None:
    """Rewrite the table in the file named on the command line."""
    path = Path(sys.argv[1])
    path.write_text(rewrite(path.read_text()))


if __name__ == "__main__":
    main()
