"""What one layout of the table costs: bytes per rank, bytes sent, seconds per step."""

from dataclasses import dataclass

from megamem.parallel.exchange_cost import hidden
from megamem.parallel.replica_groups import reduction_bytes
from megamem.parallel.traffic import Traffic
from megamem.planner.buffers import lookup_buffers
from megamem.planner.hardware import HARDWARE
from megamem.planner.job import Job, Layout, layout_traffic, layout_wire
from megamem.planner.sizes import (
    dense_flops_per_token,
    memory_flops_per_token,
    score_flops_per_token,
    stage_parameters,
)
from megamem.planner.stages import PIECED, Share, Stage, rank_share, stages
from megamem.spec import Wire

MOMENTS_BYTES = 8
MASTER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """Bytes on the rank that holds most, without the activations of the dense model."""

    dense: float
    """Weights, gradients and optimizer state of everything but the table."""
    weights: float
    """The table's weights."""
    gradients: float
    """The table's gradients."""
    optimizer: float
    """The table's optimizer state."""
    buffers: float
    """What all memory layers save for backward, plus the largest temporary peak."""

    @property
    def table(self) -> float:
        """Weights, gradients and optimizer state of the table."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.dense + self.table + self.buffers


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Estimated time of one step on one kind of GPU."""

    dense: float
    """Matrix multiplications of the complete model, but the scores of sub-keys."""
    stages: list[Stage]
    """What memory layers and tables take beside that, stage by stage."""
    inside: float
    """Sending lookups to the ranks that own the rows and sums back, forward and backward: to ranks
    of the same node."""
    across: float
    """The same, to ranks of other nodes."""
    hidden: float
    """What pieces hide of it, or hide behind it. Of N pieces, all but one hide what the links and
    the stages of reading and summing take behind the one of the three that takes longest, in the
    forward and in the backward."""
    replicas: float
    """The sum of the gradients over the replicas of the table: its time on the slower link, as one
    block of rows is sent inside nodes while another crosses the network."""

    @property
    def exchange(self) -> float:
        """What the exchange adds to a step: the times on both links, without what pieces hide."""
        return self.inside + self.across - self.hidden

    @property
    def lookup(self) -> float:
        """Finding rows, reading them and summing their gradients, in all passes of the step."""
        return sum(stage.per_step for stage in self.stages if stage.phase != "step")

    @property
    def optimizer(self) -> float:
        """Gradient norm and update of the table."""
        return sum(stage.per_step for stage in self.stages if stage.phase == "step")

    @property
    def table(self) -> float:
        """Everything but the matrix multiplications."""
        return self.lookup + self.exchange + self.replicas + self.optimizer

    @property
    def share(self) -> float:
        """The table's share of the step, from 0 to 1."""
        return self.table / (self.table + self.dense)


@dataclass(frozen=True)
class DenseModel:
    """What everything but the table takes, which no layout changes."""

    bytes: float
    """Weights, gradients and optimizer state per rank."""
    flops: float
    """Matrix FLOPs of a step on one rank."""

    @classmethod
    def of(cls, job: Job) -> "DenseModel":
        """That of a job."""
        return cls(dense_bytes(job), step_flops(job))


@dataclass(frozen=True, kw_only=True)
class LayoutCost:
    """One layout and what it costs."""

    layout: Layout
    wire: Wire
    """The collective that sends lookups."""
    pieces: int
    """The pieces in which the tokens of a layer pass."""
    replicas: int
    bytes: RankBytes
    sent: Traffic
    """Bytes sent per token and memory layer."""
    exchange_per_step: float
    """Bytes that a rank sends for lookups in a step."""
    replicas_inside: float
    """Bytes that a rank sends in a step to ranks of its node, to sum the gradients of the table's
    replicas."""
    replicas_across: float
    """The same, to ranks of other nodes."""
    seconds: dict[str, StepSeconds]
    """Name of the GPU -> estimate."""

    @property
    def name(self) -> str:
        """The layout, and its pieces if there are several."""
        return str(self.layout) + (f" in {self.pieces} pieces" if self.pieces > 1 else "")

    @property
    def flags(self) -> str:
        """The command-line flags that select the layout and the pieces."""
        pieces = f" --memory-pieces {self.pieces}" if self.pieces > 1 else ""
        return self.layout.flags + pieces

    @property
    def replicas_per_step(self) -> float:
        """Bytes that a rank sends in a step to sum the gradients of the table's replicas."""
        return self.replicas_inside + self.replicas_across


def layout_cost(job: Job, layout: Layout, dense: DenseModel | None = None) -> LayoutCost:
    """What one layout costs: bytes on the rank that holds most, bytes sent and time per step.

    Args:
        job: the job.
        layout: the layout.
        dense: DenseModel.of(job), if it is known.
    """
    dense = dense or DenseModel.of(job)
    share, sent = rank_share(job, layout), layout_traffic(job, layout)
    replicas = job.replicas(layout)
    tokens = job.microbatch_tokens * share.calls
    # gradients, and for each row whether it has one; every replica then makes the same update
    summed = share.touched_by_step if job.spec.reduce_rows == "touched" else share.rows
    held = summed * share.by_row * job.state.gradient + share.tables * share.rows
    inside, across = _replica_bytes(job, layout, held)
    return LayoutCost(
        layout=layout,
        wire=layout_wire(job, layout),
        pieces=job.spec.pieces,
        replicas=replicas,
        bytes=rank_bytes(job, layout, dense.bytes),
        sent=sent,
        exchange_per_step=tokens * sent.total,
        replicas_inside=inside,
        replicas_across=across,
        seconds={
            gpu: _step_seconds(job, layout, share, sent, (inside, across), dense, gpu)
            for gpu in HARDWARE
        },
    )


def rank_bytes(job: Job, layout: Layout, dense: float | None = None) -> RankBytes:
    """Bytes of one layout on the rank that holds most.

    Args:
        job: the job.
        layout: the layout.
        dense: dense_bytes(job), if it is known.
    """
    state, share = job.state, rank_share(job, layout)
    return RankBytes(
        dense=dense_bytes(job) if dense is None else dense,
        weights=share.numbers * state.weights,
        gradients=share.numbers * state.gradient,
        optimizer=share.numbers * state.optimizer + share.tables * share.rows * state.per_row,
        buffers=lookup_buffers(job, layout),
    )


def dense_bytes(job: Job) -> float:
    """Bytes of weights, gradients and optimizer state of everything but the table, per rank.

    They are those of the pipeline stage that needs the most. With FSDP2 the weights of a layer are
    also held complete while it computes, as activations are, which is not counted.
    """
    cluster = job.cluster
    held = stage_parameters(
        job.shape,
        job.spec,
        cluster.tensor_model_parallel_size,
        job.placement,
        cluster.expert_model_parallel_size,
        cluster.expert_ranks_of_tensor,
    )
    owners = expert_owners = 1
    if cluster.use_distributed_optimizer or cluster.use_torch_fsdp2:
        instances = cluster.num_distributed_optimizer_instances
        owners = max(1, cluster.data_parallel * cluster.context_parallel_size // instances)
        expert_owners = max(1, cluster.stage_ranks // cluster.expert_ranks // instances)
    state = cluster.optimizer_bytes
    if state is None:
        state = (MASTER_BYTES if cluster.half_precision else 0) + MOMENTS_BYTES
    numbers = job.number_bytes + cluster.gradient_bytes
    if cluster.use_torch_fsdp2:
        numbers, state = 0, state + numbers
    return max(
        stage.dense * (numbers + state / owners) + stage.experts * (numbers + state / expert_owners)
        for stage in held
    )


def step_flops(job: Job) -> float:
    """Matrix FLOPs of a step on one rank, if they are spread evenly over all ranks.

    Those of the scores of sub-keys are left out, as their time is that of a stage.
    """
    per_token = dense_flops_per_token(job.shape, job.spec)
    in_layer = memory_flops_per_token(job.spec) - score_flops_per_token(job.spec)
    per_token += len(job.spec.layers) * in_layer
    return per_token * job.cluster.batch * job.shape.seq_length / job.cluster.world_size


def _step_seconds(
    job: Job,
    layout: Layout,
    share: Share,
    sent: Traffic,
    replica_bytes: tuple[float, float],
    dense: DenseModel,
    gpu: str,
) -> StepSeconds:
    hardware = job.on(gpu)
    inside, across = replica_bytes
    tokens = share.calls * job.microbatch_tokens
    found = stages(job, layout, share, hardware)
    directions = (
        ("forward", sent.forward_inside, sent.forward_across),
        ("backward", sent.backward_inside, sent.backward_across),
    )
    saved = 0.0
    for phase, near, far in directions:
        work = sum(s.per_step for s in found if s.phase == phase and s.name in PIECED)
        parts = (tokens * near / hardware.link, tokens * far / hardware.network, work)
        saved += hidden(parts, job.spec.pieces)
    return StepSeconds(
        dense=dense.flops / hardware.flops,
        stages=found,
        inside=tokens * sent.inside / hardware.link,
        across=tokens * sent.across / hardware.network,
        hidden=saved,
        replicas=max(inside / hardware.link, across / hardware.network),
    )


def _replica_bytes(job: Job, layout: Layout, held: float) -> tuple[float, float]:
    """Bytes that a rank sends inside its node and between nodes to sum what the replicas hold."""
    cluster, memories = job.cluster, job.stage_memories
    holders = [stage for stage, count in enumerate(memories) if count]
    ranks = [
        stage * cluster.stage_ranks + first
        for stage in (holders if job.spec.pool == "shared" else holders[:1])
        for first in range(0, cluster.stage_ranks, layout.group_size)
    ]
    nodes = [rank // cluster.gpus_per_node for rank in range(cluster.world_size)]
    return reduction_bytes(held, ranks, nodes)
