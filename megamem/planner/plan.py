"""All layouts of a table over the ranks of a run, and which of them to take."""

import math
from dataclasses import dataclass, replace

from megamem.config import ConfigurationError
from megamem.planner.cost import LayoutCost, layout_cost, rank_bytes
from megamem.planner.hardware import HARDWARE
from megamem.planner.job import Job, layouts
from megamem.planner.sizes import stage_layers, table_parameters, total_parameters
from megamem.planner.states import OPTIMIZERS
from megamem.spec import Optimizer

GB = 1e9
KIB = 1024
MOST_GPUS = 2**15


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `megamem plan` shows."""

    job: Job
    parameters: dict[str, int]
    """Part of the model -> its parameters."""
    costs: list[LayoutCost]
    """Every layout that can be cut."""
    asked: LayoutCost
    """The layout that the --memory-* flags ask for; it may not fit."""
    recommended: LayoutCost
    why: str
    gpus_needed: dict[Optimizer, dict[str, int | None]]
    """Optimizer -> GPU -> the fewest that hold model and table; None where no number does."""


def make_plan(job: Job) -> Plan:
    """All layouts of a job's table, and the recommended one: of those that fit, the fastest.

    Raises:
        ConfigurationError: the layers cannot be placed, or no layout fits the GPUs.
    """
    check_layers(job)
    asked = layout_cost(job, job.spec.layout)
    costs = [layout_cost(job, layout) for layout in layouts(job)]
    fitting = [cost for cost in costs if fits(job, cost)]
    if not fitting:
        raise ConfigurationError(_nothing_fits(job, min(costs, key=lambda c: c.bytes.total)))
    best = min(fitting, key=lambda c: (c.seconds[job.gpu].table, c.layout.group_size))
    return Plan(
        job=job,
        parameters=total_parameters(job.shape, job.spec),
        costs=costs,
        asked=asked,
        recommended=best,
        why=_why(job, best, costs),
        gpus_needed={
            name: {
                gpu: gpus_needed(
                    replace(job, gpu=gpu).with_optimizer(name, job.spec.stochastic_rounding)
                )
                for gpu in HARDWARE
            }
            for name in OPTIMIZERS
        },
    )


def fits(job: Job, cost: LayoutCost) -> bool:
    return cost.bytes.total <= job.room


def check_layers(job: Job) -> None:
    """Whether the memory layers can be where they are asked for.

    Raises:
        ConfigurationError: there are none, or beyond the model, or of one pool on two stages.
    """
    spec, layers = job.spec, job.spec.layers
    stages = job.cluster.pipeline_model_parallel_size
    if not layers:
        raise ConfigurationError(
            "no memory layers: name them with --memory-layers, or take a --preset."
        )
    if beyond := [layer for layer in layers if layer >= job.shape.num_layers]:
        raise ConfigurationError(
            f"--memory-layers {' '.join(map(str, beyond))} is beyond --num-layers "
            f"{job.shape.num_layers}: layers are counted from 0; use 0 to "
            f"{job.shape.num_layers - 1}."
        )
    if stages > job.shape.num_layers:
        raise ConfigurationError(
            f"--pipeline-model-parallel-size {stages} is more than --num-layers "
            f"{job.shape.num_layers}; use at most that many."
        )
    places = {
        stage: found
        for stage in range(stages)
        if (found := sorted(set(layers) & set(stage_layers(job.shape.num_layers, stages, stage))))
    }
    if spec.pool == "shared" and len(places) > 1:
        told = ", ".join(f"{found} on stage {stage}" for stage, found in places.items())
        raise ConfigurationError(
            f"--memory-layers {' '.join(map(str, layers))} share one table but lie on several "
            f"pipeline stages ({told}); choose layers of one stage, lower "
            f"--pipeline-model-parallel-size {stages}, or use --memory-pool layer."
        )


def gpus_for_bytes(state: float, room: float) -> int:
    """GPUs among which this state, cut evenly, leaves each within its room."""
    return math.ceil(state / room)


def gpus_needed(job: Job) -> int | None:
    """The fewest GPUs, in whole model-parallel groups and nodes, on which some layout fits.

    The batch is one microbatch on each data-parallel rank. None where no number up to MOST_GPUS is
    enough, as when the dense model alone overflows.
    """
    cluster, stages = job.cluster, job.cluster.pipeline_model_parallel_size
    unit = stages * cluster.tensor_model_parallel_size * cluster.context_parallel_size
    # weights and optimizer state alone are a bound
    state: float = table_parameters(job.spec) * (job.state.weights + job.state.optimizer)
    if job.spec.pool == "layer":
        state *= max(job.stage_memories) / len(job.spec.layers)
    world = gpus_for_bytes(state, job.room) * stages
    while True:
        step = math.lcm(unit, cluster.gpus_per_node) if world > cluster.gpus_per_node else unit
        world = -(-world // step) * step
        if world > MOST_GPUS:
            return None
        wider = replace(cluster, world_size=world, global_batch_size=None)
        if _fits_somehow(replace(job, cluster=wider)):
            return world
        # beyond a few hundred nodes an answer within two hundredths is soon enough found
        world += max(1, world // 64)


def _why(job: Job, best: LayoutCost, costs: list[LayoutCost]) -> str:
    step, hardware = best.seconds[job.gpu], job.hardware
    said = [
        f"{best.layout} takes least time of those that fit: {step.table * 1e3:.1f} ms of a step of "
        f"{(step.table + step.dense) * 1e3:.0f} ms ({100 * step.share:.0f} %) on {hardware.name}",
        f"{best.bytes.total / GB:.1f} GB on a rank, of {job.room / GB:.0f} GB "
        f"({100 * job.fill:.0f} % of {hardware.memory / GB:.0f})",
    ]
    same = [c for c in costs if c.layout.group_size == best.layout.group_size and c is not best]
    sent = f"{best.sent.total / KIB:.1f} KiB sent per token and layer"
    if same:
        rivals = ", ".join(f"{c.layout.mode} {c.sent.total / KIB:.1f}" for c in same)
        sent += f" (over as many ranks: {rivals})"
    said.append(sent)
    if best.replicas > 1:
        said.append(
            f"{best.replicas} replicas of the table exchange {best.replicas_per_step / GB:.1f} GB "
            f"a rank and step ({step.replicas * 1e3:.0f} ms)"
        )
    elif len(costs) > 1:
        said.append("no replicas to keep equal")
    too_big = [c for c in costs if not fits(job, c)]
    if too_big:
        smallest = min(too_big, key=lambda c: c.bytes.total)
        said.append(
            f"{len(too_big)} of {len(costs)} layouts do not fit, the least of them "
            f"({smallest.layout}) with {smallest.bytes.total / GB:.0f} GB"
        )
    return "; ".join(said) + "."


def _nothing_fits(job: Job, leanest: LayoutCost) -> str:
    need, world = leanest.bytes, job.cluster.world_size
    said = (
        f"nothing fits: {world} x {job.hardware.name} at --fill {job.fill:g} leave "
        f"{job.room / GB:.0f} GB a rank, and the leanest layout ({leanest.layout}) needs "
        f"{need.total / GB:.0f} GB: table {need.table / GB:.0f}, dense model "
        f"{need.dense / GB:.0f}, lookup buffers {need.buffers / GB:.0f}."
    )
    options = []
    needed = {gpu: gpus_needed(replace(job, gpu=gpu)) for gpu in HARDWARE}
    if more := needed[job.gpu]:
        others = [f"{n} {HARDWARE[gpu].name}" for gpu, n in needed.items() if n and gpu != job.gpu]
        options.append(f"--world-size {more} (with other GPUs: {', '.join(others)})")
    leaner = [
        job.with_optimizer(name, rounding)
        for rounding in sorted({job.spec.stochastic_rounding, job.cluster.half_precision})
        for name in OPTIMIZERS
    ]
    for other in leaner:
        if _fits_somehow(other):
            spec = other.spec
            rounding = " --memory-stochastic-rounding" if spec.stochastic_rounding else ""
            options.append(f"--memory-optimizer {spec.optimizer}{rounding}")
            break
    if not options:
        options.append("a smaller --memory-num-keys, or a wider --tensor-model-parallel-size")
    return f"{said} What would: {', or '.join(options)}."


def _fits_somehow(job: Job) -> bool:
    return any(rank_bytes(job, layout).total <= job.room for layout in layouts(job))
