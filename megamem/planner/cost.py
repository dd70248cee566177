"""What one layout of the table costs: bytes per rank, bytes sent, seconds per step."""

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
    """Matrix multiplications of the complete model, memory layers included."""
    lookup: float
    """Reading rows in forward and backward, writing partial sums, and summing gradients."""
    exchange: float
    """Sending lookups to the ranks that own the rows and sums back, forward and backward."""
    replicas: float
    """All-reduce of the gradients over the replicas of the table."""
    optimizer: float
    """Update of the table."""

    @property
    def table(self) -> float:
        """Everything but the matrix multiplications."""
        return self.lookup + self.exchange + self.replicas + self.optimizer

    @property
    def share(self) -> float:
        """The table's share of the step, from 0 to 1."""
        return self.table / (self.table + self.dense)


@dataclass(frozen=True, kw_only=True)
class LayoutCost:
    """One layout and what it costs."""

    layout: Layout
    replicas: int
    bytes: RankBytes
    sent: Traffic
    """Bytes sent per token and memory layer."""
    exchange_per_step: float
    """Bytes that a rank sends for lookups in a step."""
    replicas_per_step: float
    """Bytes that a rank sends in a step to sum the gradients of the table's replicas."""
    seconds: dict[str, StepSeconds]
    """Name of the GPU -> estimate."""


@dataclass(frozen=True)
class Share:
    """The part of the tables and of the lookups that one rank has; counts are expected values."""

    tables: int
    rows: int
    """Rows of each table on the rank that holds most."""
    width: int
    """Numbers per row on that rank."""
    picks: float
    """Lookups that the rank receives for one layer in one microbatch."""
    calls: int
    """Memory layers times microbatches."""
    touched: float
    """Rows of one table that one layer reads in one microbatch."""
    touched_by_step: float
    """Rows of one table that all layers, microbatches and replicas read in a step."""

    @property
    def numbers(self) -> int:
        return self.tables * self.rows * self.width


def layout_cost(job: Job, layout: Layout) -> LayoutCost:
    """What one layout costs: bytes on the rank that holds most, bytes sent and time per step."""
    cluster, size = job.cluster, layout.group_size
    share, sent = rank_share(job, layout), layout_traffic(job, layout)
    replicas = cluster.stage_ranks // size
    tokens = job.microbatch_tokens * share.calls
    # gradients, and for each row whether it has one; every replica then makes the same update
    summed = share.touched_by_step if job.spec.reduce_rows == "touched" else share.rows
    replica_bytes = all_reduce_bytes(
        share.tables * (summed * share.width * job.state.gradient + share.rows), replicas
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
    """The share of one rank of the pipeline stage with the most memory layers."""
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
    """Bytes of one layout on the rank that holds most."""
    state, share = job.state, rank_share(job, layout)
    return RankBytes(
        dense=dense_bytes(job),
        weights=share.numbers * state.weights,
        gradients=share.numbers * state.gradient,
        optimizer=share.numbers * state.optimizer + share.tables * share.rows * state.per_row,
        buffers=lookup_buffers(job, layout),
    )


def dense_bytes(job: Job) -> float:
    """Bytes of weights, gradients and AdamW state of everything but the table, per rank.

    They are those of the pipeline stage that has the most parameters.
    """
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
    """Bytes that the sorted backward reads and writes: each touched row once, and its gradient.

    Args:
        touched: number of touched rows.
        width: numbers per row.
        state: bytes per parameter.
        e: bytes per number of a row; 0 where rows are not read.
        adds: the gradient is added to a buffer (read and written) instead of returned (written).
    """
    return touched * width * (e + state.gradient * (2 if adds else 1))


def step_flops(job: Job) -> float:
    """Matrix FLOPs of a step on one rank, if they are spread evenly over all ranks."""
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
    # the partial sums of every rank of the group are written and read again; where the tokens are
    # sent to the rows, so are the gradients of the tokens
    sums = (layout.group_size - 1) * tokens * share.width * e
    moved = sums * (2 if variant.reads_tokens else 1)
    for use in variant.tables:
        if use.read == "bag":
            moved += read + backward_bytes(share.touched, share.width, state, e=e)
        else:
            # rows are read for the products and for the gradients of the tokens; the gradient of
            # a row needs only the tokens
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
