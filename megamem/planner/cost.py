"""What one layout of the table takes: bytes on a rank, bytes on the wires, seconds of a step."""

from dataclasses import dataclass

from megamem.layers.variants import variant_of
from megamem.parallel.traffic import (
    Traffic,
    all_reduce_bytes,
    expected_unique,
    forward_bytes,
    widest_slice,
)
from megamem.planner.buffers import lookup_buffers
from megamem.planner.hardware import HARDWARE
from megamem.planner.job import Job, Layout, layout_traffic
from megamem.planner.sizes import (
    dense_flops_per_token,
    memory_flops_per_token,
    stage_parameters,
)
from megamem.planner.states import TableState

GRADIENT_BYTES = 4
MOMENTS_BYTES = 8
MASTER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """Bytes on the fullest rank, activations of the dense model not among them."""

    dense: float
    """Weights, gradients and optimizer of everything but the table."""
    weights: float
    """Of the table."""
    gradients: float
    optimizer: float
    buffers: float
    """What comes and goes: what backward needs of every memory layer, and the largest peak."""

    @property
    def table(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.dense + self.table + self.buffers


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Estimated time of one step on one kind of GPU."""

    dense: float
    """Matrix work of the whole model, that of the memory layers included."""
    lookup: float
    """Rows read forward and backward, partial sums written, gradients added up."""
    exchange: float
    """Lookups to the rows and sums back, both directions."""
    replicas: float
    """Gradients summed over replicas of the table."""
    optimizer: float
    """The table's step."""

    @property
    def table(self) -> float:
        """All but the matrix work."""
        return self.lookup + self.exchange + self.replicas + self.optimizer

    @property
    def share(self) -> float:
        """Of the step that the table takes."""
        return self.table / (self.table + self.dense)


@dataclass(frozen=True, kw_only=True)
class LayoutCost:
    """One layout and what it takes."""

    layout: Layout
    replicas: int
    bytes: RankBytes
    sent: Traffic
    """Per token and memory layer."""
    exchange_per_step: float
    """Bytes that a rank sends for lookups."""
    replicas_per_step: float
    """Bytes that a rank sends to keep replicas equal."""
    seconds: dict[str, StepSeconds]
    """GPU -> estimate."""


@dataclass(frozen=True)
class Share:
    """A rank's part of the tables, and of the lookups; counts are expectations."""

    tables: int
    rows: int
    """Of each table, on the rank that holds most."""
    width: int
    """Numbers of a row, there."""
    picks: float
    """Lookups that arrive for one layer in one microbatch."""
    calls: int
    """Memory layers times microbatches."""
    touched: float
    """Rows of one table that one layer touches in one microbatch."""
    touched_by_step: float
    """Rows of one table that all layers, microbatches and replicas touch."""

    @property
    def numbers(self) -> int:
        return self.tables * self.rows * self.width


def layout_cost(job: Job, layout: Layout) -> LayoutCost:
    """What one layout takes on the fullest rank and in every step."""
    cluster, size = job.cluster, layout.group_size
    share, sent = rank_share(job, layout), layout_traffic(job, layout)
    replicas = cluster.stage_ranks // size
    tokens = job.microbatch_tokens * share.calls
    # gradients, and for each row whether it has one; every replica then makes the same step
    replica_bytes = all_reduce_bytes(
        share.numbers * job.state.gradient + share.tables * share.rows, replicas
    )
    return LayoutCost(
        layout=layout,
        replicas=replicas,
        bytes=rank_bytes(job, layout),
        sent=sent,
        exchange_per_step=tokens * sent.total,
        replicas_per_step=replica_bytes,
        seconds={
            gpu: _step_seconds(job, layout, share, sent, replica_bytes, gpu) for gpu in HARDWARE
        },
    )


def rank_share(job: Job, layout: Layout) -> Share:
    """What falls to one rank of the stage with most memory layers."""
    spec, microbatches = job.spec, job.cluster.microbatches
    layers, own_tables = max(job.stage_memories), spec.pool == "layer"
    rows = -(-spec.num_rows // layout.row_ranks)
    picks = spec.lookups_per_token * job.microbatch_tokens * layout.column_ranks
    readers = (1 if own_tables else layers) * (job.cluster.stage_ranks // layout.group_size)
    return Share(
        tables=len(variant_of(spec).tables) * (layers if own_tables else 1),
        rows=rows,
        width=widest_slice(spec.value_dim, layout.column_ranks),
        picks=picks,
        calls=layers * microbatches,
        touched=expected_unique(rows, picks),
        touched_by_step=expected_unique(rows, picks * readers * microbatches),
    )


def rank_bytes(job: Job, layout: Layout) -> RankBytes:
    """What one layout takes on the fullest rank."""
    state, share = job.state, rank_share(job, layout)
    return RankBytes(
        dense=dense_bytes(job),
        weights=share.numbers * state.weights,
        gradients=share.numbers * state.gradient,
        optimizer=share.numbers * state.optimizer + share.tables * share.rows * state.per_row,
        buffers=lookup_buffers(job, layout),
    )


def dense_bytes(job: Job) -> float:
    """Weights, gradients and AdamW state of all but the table, on the fullest pipeline stage."""
    cluster, half = job.cluster, job.cluster.half_precision
    parameters = max(
        stage_parameters(
            job.shape,
            job.spec,
            cluster.tensor_model_parallel_size,
            cluster.pipeline_model_parallel_size,
        )
    )
    owners = 1
    if cluster.use_distributed_optimizer:
        owners = cluster.data_parallel * cluster.context_parallel_size
    state = (MASTER_BYTES if half else 0) + MOMENTS_BYTES
    return parameters * (job.number_bytes + GRADIENT_BYTES + state / owners)


def backward_bytes(
    touched: float, width: float, state: TableState, *, e: int = 2, adds: bool = True
) -> float:
    """Read and written by the sorted backward: each touched row once, and its gradient.

    A gradient that is added to a buffer is read and written; one that is returned, only written.
    """
    return touched * width * (e + state.gradient * (2 if adds else 1))


def step_flops(job: Job) -> float:
    """Matrix FLOPs of a step on one rank, if all ranks share them evenly."""
    per_token = dense_flops_per_token(job.shape, job.spec)
    memories = len(job.spec.layers)
    per_token += memories * memory_flops_per_token(job.spec)
    return per_token * job.cluster.batch * job.shape.seq_length / job.cluster.world_size


def _step_seconds(
    job: Job, layout: Layout, share: Share, sent: Traffic, replica_bytes: float, gpu: str
) -> StepSeconds:
    hardware, state, e = HARDWARE[gpu], job.state, job.number_bytes
    spec, cluster, tokens = job.spec, job.cluster, job.microbatch_tokens
    variant = variant_of(spec)
    read = forward_bytes(spec.value_dim, spec.lookups_per_token, tokens, e=e)
    # what every rank of the group sums for these tokens is written and read again, and where these
    # travel to the rows, the gradients of the tokens as well
    sums = (layout.group_size - 1) * tokens * share.width * e
    moved = sums * (2 if variant.reads_tokens else 1)
    for use in variant.tables:
        if use.read == "bag":
            moved += read + backward_bytes(share.touched, share.width, state, e=e)
        else:
            # rows are read for the products and for the tokens' gradients; their own gradient
            # needs the tokens alone
            moved += 2 * read + backward_bytes(share.touched, share.width, state, e=0)
    stepped = share.touched_by_step if state.touched_only else share.rows
    within_node = cluster.stage_ranks <= cluster.gpus_per_node
    return StepSeconds(
        dense=step_flops(job) / hardware.flops,
        lookup=share.calls * moved / hardware.copy,
        exchange=sent.seconds(share.calls * tokens, hardware.link, hardware.network),
        replicas=replica_bytes / (hardware.link if within_node else hardware.network),
        optimizer=share.tables * stepped * share.width * state.moved_by_step / hardware.copy,
    )
