"""All layouts of a table over the ranks of a run, and the recommended one."""

import math
from dataclasses import dataclass, replace

from megamem.config import ConfigurationError
from megamem.planner.cost import (
    DenseModel,
    LayoutCost,
    dense_bytes,
    layout_cost,
    rank_bytes,
)
from megamem.planner.hardware import HARDWARE
from megamem.planner.job import Job, layouts
from megamem.planner.sizes import (
    EXPERTS,
    FEED_FORWARD,
    active_parameters,
    table_parameters,
    total_parameters,
)
from megamem.planner.states import OPTIMIZERS
from megamem.spec import Optimizer

GB = 1e9
KIB = 1024
MOST_GPUS = 2**15
PIECES = (1, 2, 4)
"""The numbers of pieces that are compared, beside that of --memory-pieces."""
FEED_FORWARDS = FEED_FORWARD + EXPERTS


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The result that `megamem plan` shows."""

    job: Job
    parameters: dict[str, int]
    """Part of the model -> its number of parameters."""
    active: int
    """Parameters that one token meets."""
    costs: list[LayoutCost]
    """Every possible layout, each in the number of pieces that is fastest of those that fit."""
    asked: LayoutCost
    """The layout that the --memory-* flags select; it may not fit."""
    recommended: LayoutCost | None
    """The fastest layout that fits; None if no layout fits."""
    why: str
    """Why it is recommended, or what is missing, in sentences."""
    gpus_needed: dict[Optimizer, dict[str, int | None]]
    """Optimizer -> GPU -> the fewest GPUs that hold model and table; None where none suffice."""

    @property
    def shown(self) -> LayoutCost:
        """The layout whose times are shown: the recommended one, or the smallest if none fits."""
        return self.recommended or min(self.costs, key=lambda cost: cost.bytes.total)


def make_plan(job: Job) -> Plan:
    """Compute the cost of all layouts of a job's table, and recommend the fastest that fits.

    Raises:
        ConfigurationError: the memory layers are not possible in this model.
    """
    check_layers(job)
    asked = layout_cost(job, job.spec.layout)
    costs = all_costs(job)
    best = fastest(job, costs)
    if best is None:
        why = _nothing_fits(job, min(costs, key=lambda c: c.bytes.total))
    else:
        why = _why(job, best, costs)
    return Plan(
        job=job,
        parameters=total_parameters(job.shape, job.spec),
        active=active_parameters(job.shape, job.spec),
        costs=costs,
        asked=asked,
        recommended=best,
        why=why,
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


def all_costs(job: Job) -> list[LayoutCost]:
    """The cost of every possible layout, in the number of pieces that is fastest of those that fit,
    or else takes the least memory."""
    dense, cut = DenseModel.of(job), {pieces: job.in_pieces(pieces) for pieces in _pieces(job)}
    found = []
    for layout in layouts(job):
        # one rank exchanges nothing
        tried = cut if layout.group_size > 1 else [job.spec.pieces]
        costs = [layout_cost(cut[pieces], layout, dense) for pieces in tried]
        found.append(fastest(job, costs) or min(costs, key=lambda cost: cost.bytes.total))
    return found


def fastest(job: Job, costs: list[LayoutCost]) -> LayoutCost | None:
    """The cost with the least time of those that fit; None if none does."""

    def rank(cost: LayoutCost) -> tuple[float, int, int]:
        return cost.seconds[job.gpu].table, cost.layout.group_size, cost.pieces

    return min((cost for cost in costs if fits(job, cost)), key=rank, default=None)


def _pieces(job: Job) -> list[int]:
    return sorted({*PIECES, job.spec.pieces})


def fits(job: Job, cost: LayoutCost) -> bool:
    """Whether a layout fits into the memory that --fill leaves it."""
    return cost.bytes.total <= job.room


def check_layers(job: Job) -> None:
    """Check that the memory layers are possible in this model.

    Raises:
        ConfigurationError: there are no memory layers, or the model has no such layers.
    """
    layers = job.spec.layers
    stages = job.cluster.pipeline_model_parallel_size
    if not layers:
        raise ConfigurationError(
            "there are no memory layers; name them with --memory-layers, or use a --preset."
        )
    if beyond := [layer for layer in layers if layer >= job.shape.num_layers]:
        raise ConfigurationError(
            f"--memory-layers {' '.join(map(str, beyond))} is beyond --num-layers "
            f"{job.shape.num_layers}; layers are counted from 0, so use 0 to "
            f"{job.shape.num_layers - 1}."
        )
    if stages > job.shape.num_layers:
        raise ConfigurationError(
            f"--pipeline-model-parallel-size {stages} is more than --num-layers "
            f"{job.shape.num_layers}; use at most {job.shape.num_layers}."
        )
    wrong = [layer for layer in layers if job.shape.layer_parts[layer][-1] not in FEED_FORWARDS]
    if wrong:
        raise ConfigurationError(
            f"--memory-layers {' '.join(map(str, wrong))} is no feed-forward of "
            f"--hybrid-layer-pattern {''.join(job.shape.layer_parts)}; choose layers that are - or "
            "E, counted from 0."
        )


def gpus_for_bytes(state: float, room: float) -> int:
    """The fewest GPUs that hold this many bytes if they are spread evenly.

    Args:
        state: bytes of weights and optimizer state in total.
        room: bytes that each GPU can hold.
    """
    return math.ceil(state / room)


def gpus_needed(job: Job) -> int | None:
    """The fewest GPUs, in complete model-parallel groups and nodes, on which some layout fits.

    The batch is one microbatch on each data-parallel rank. The result is None where no number up to
    MOST_GPUS is enough, for example because the dense model alone does not fit.
    """
    cluster, stages = job.cluster, job.cluster.pipeline_model_parallel_size
    unit = stages * math.lcm(
        cluster.tensor_model_parallel_size * cluster.context_parallel_size, cluster.expert_ranks
    )
    # the search starts at a lower bound: the table's weights and optimizer state alone
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
        if _some_layout_fits(replace(job, cluster=wider)):
            return world
        # steps of 1/64 keep the search short; beyond 512 GPUs the result may be 2 % too large
        world += max(1, world // 64)


def _why(job: Job, best: LayoutCost, costs: list[LayoutCost]) -> str:
    step, hardware = best.seconds[job.gpu], job.hardware
    sentences = [
        f"{best.name} is the fastest layout that fits: the table takes {step.table * 1e3:.1f} ms "
        f"of a step of {(step.table + step.dense) * 1e3:.0f} ms ({100 * step.share:.0f} %) on "
        f"{hardware.name}.",
        f"It needs {best.bytes.total / GB:.1f} GB per rank; --fill {job.fill:g} allows "
        f"{job.room / GB:.0f} of {hardware.memory / GB:.0f} GB.",
    ]
    others = {}
    for cost in sorted(costs, key=lambda cost: -cost.seconds[job.gpu].exchange):
        if (
            cost.layout.group_size == best.layout.group_size
            and cost.layout.mode != best.layout.mode
        ):
            others[cost.layout.mode] = _sends(cost)
    sent = f"It sends {_sends(best)} KiB per token and memory layer inside nodes + between them"
    if others:
        listed = ", ".join(f"{mode} {kib}" for mode, kib in sorted(others.items()))
        sent += f" (other modes over as many ranks: {listed})"
    sentences.append(f"{sent}.")
    if best.pieces > 1:
        sentences.append(
            f"{best.pieces} pieces save {step.hidden * 1e3:.0f} of the "
            f"{(step.inside + step.across) * 1e3:.0f} ms that the links take."
        )
    if best.replicas > 1:
        sentences.append(
            f"To sum the gradients of {job.spec.reduce_rows} rows over the {best.replicas} "
            "replicas of the table, each rank sends "
            f"{best.replicas_inside / GB:.1f} GB per step inside its node and "
            f"{best.replicas_across / GB:.1f} GB to other nodes ({step.replicas * 1e3:.0f} ms)."
        )
    elif len(costs) > 1:
        sentences.append("The table has no replicas, so no all-reduce of its gradients is needed.")
    too_big = [c for c in costs if not fits(job, c)]
    if too_big:
        smallest = min(too_big, key=lambda c: c.bytes.total)
        sentences.append(
            f"{len(too_big)} of {len(costs)} layouts do not fit; the smallest of these "
            f"({smallest.name}) needs {smallest.bytes.total / GB:.0f} GB per rank."
        )
    return " ".join(sentences)


def _sends(cost: LayoutCost) -> str:
    return f"{cost.sent.inside / KIB:.1f} + {cost.sent.across / KIB:.1f}"


def _nothing_fits(job: Job, smallest: LayoutCost) -> str:
    need, world = smallest.bytes, job.cluster.world_size
    problem = (
        f"No layout fits: {world} x {job.hardware.name} with --fill {job.fill:g} leave "
        f"{job.room / GB:.0f} GB per rank, but the smallest layout ({smallest.name}) needs "
        f"{need.total / GB:.0f} GB: {need.table / GB:.0f} for the table, {need.dense / GB:.0f} for "
        f"the dense model and {need.buffers / GB:.0f} for lookup buffers."
    )
    options = []
    needed = {gpu: gpus_needed(replace(job, gpu=gpu)) for gpu in HARDWARE}
    if more := needed[job.gpu]:
        others = [f"{n} {HARDWARE[gpu].name}" for gpu, n in needed.items() if n and gpu != job.gpu]
        options.append(f"--world-size {more} (with other GPUs: {', '.join(others)})")
    smaller = [
        job.with_optimizer(name, rounding)
        for rounding in sorted({job.spec.stochastic_rounding, job.cluster.half_precision})
        for name in OPTIMIZERS
    ]
    for other in smaller:
        if _some_layout_fits(other):
            spec = other.spec
            rounding = " --memory-stochastic-rounding" if spec.stochastic_rounding else ""
            options.append(f"--memory-optimizer {spec.optimizer}{rounding}")
            break
    if not options:
        options.append("a smaller --memory-num-keys or a larger --tensor-model-parallel-size")
    return f"{problem} Use {', or '.join(options)}."


def _some_layout_fits(job: Job) -> bool:
    # buffers shrink with the pieces
    cut, dense = job.in_pieces(_pieces(job)[-1]), dense_bytes(job)
    return any(
        rank_bytes(cut if layout.group_size > 1 else job, layout, dense).total <= job.room
        for layout in layouts(job)
    )
