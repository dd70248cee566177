"""The input of a plan: a model, its memory layers, the ranks, and the possible layouts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megamem.config import ConfigurationError
from megamem.layers.variants import pool_of, variant_of
from megamem.parallel import exchange_cost
from megamem.parallel.choices import choose_wire
from megamem.parallel.exchange_cost import Exchange
from megamem.parallel.traffic import Traffic, divisors, grids, mode_problem
from megamem.planner.hardware import HARDWARE, Hardware
from megamem.planner.sizes import ModelShape, Placement, even_placement
from megamem.planner.states import FP32_BYTES, TableState, table_state
from megamem.spec import Layout, MemorySpec, Optimizer, Wire


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The ranks of a run and their batch; fields are named like Megatron's flags."""

    world_size: int
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    micro_batch_size: int = 1
    global_batch_size: int | None = None
    """Sequences per step. Default: one microbatch on every data-parallel rank."""
    gpus_per_node: int = 8
    half_precision: bool = True
    use_distributed_optimizer: bool = True
    num_distributed_optimizer_instances: int = 1
    use_torch_fsdp2: bool = False
    """Weights and gradients of the dense model are sharded as its optimizer state is."""
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    """Default: the tensor-parallel size."""
    placement: Placement | None = None
    """The layers of each virtual stage of each stage. Default: spread evenly, no virtual stages."""
    gradient_bytes: int = FP32_BYTES
    """Bytes per parameter of the gradients of the dense model."""
    table_gradient_bytes: int = FP32_BYTES
    """Bytes per parameter of the gradients of the table."""
    optimizer_bytes: float | None = None
    """Bytes per parameter on a GPU of the optimizer state of the dense model. Default: AdamW's."""

    def __post_init__(self) -> None:
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        cp, found = self.context_parallel_size, []
        sizes = {
            "--world-size": self.world_size,
            "--tensor-model-parallel-size": tp,
            "--pipeline-model-parallel-size": pp,
            "--context-parallel-size": cp,
            "--micro-batch-size": self.micro_batch_size,
            "--gpus-per-node": self.gpus_per_node,
            "--expert-model-parallel-size": self.expert_model_parallel_size,
        }
        found += [f"{flag} {size} must be at least 1." for flag, size in sizes.items() if size < 1]
        if not found and self.world_size % (tp * pp * cp):
            fewer = max(1, self.world_size // (tp * pp * cp)) * tp * pp * cp
            found.append(
                f"--world-size {self.world_size} is not a multiple of {tp * pp * cp}, which "
                f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} x "
                f"--context-parallel-size {cp} make; use {fewer}."
            )
        expert_ranks = self.expert_ranks * pp
        if not found and self.world_size % expert_ranks:
            found.append(
                f"--world-size {self.world_size} is not a multiple of {expert_ranks}, which "
                f"--expert-model-parallel-size {self.expert_model_parallel_size} x "
                f"--expert-tensor-parallel-size {self.expert_ranks_of_tensor} x "
                f"--pipeline-model-parallel-size {pp} make; use a multiple, or lower one of them."
            )
        if not found and self.batch % (self.micro_batch_size * self.data_parallel):
            step = self.micro_batch_size * self.data_parallel
            found.append(
                f"--global-batch-size {self.batch} is not a multiple of --micro-batch-size "
                f"{self.micro_batch_size} x {self.data_parallel} data-parallel ranks; use "
                f"{-(-self.batch // step) * step}."
            )
        ConfigurationError.collect(found)

    @property
    def stage_ranks(self) -> int:
        """Number of ranks of one pipeline stage: TP x CP x DP."""
        return self.world_size // self.pipeline_model_parallel_size

    @property
    def expert_ranks_of_tensor(self) -> int:
        """Tensor-parallel ranks of experts."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks that the experts of a layer are spread over."""
        return self.expert_model_parallel_size * self.expert_ranks_of_tensor

    @property
    def data_parallel(self) -> int:
        return self.stage_ranks // self.tensor_model_parallel_size // self.context_parallel_size

    def microbatch_tokens(self, seq_length: int) -> float:
        """Tokens of a microbatch for which one rank makes the lookups."""
        ranks = self.tensor_model_parallel_size * self.context_parallel_size
        return self.micro_batch_size * seq_length / ranks

    @property
    def batch(self) -> int:
        return self.global_batch_size or self.micro_batch_size * self.data_parallel

    @property
    def microbatches(self) -> int:
        return self.batch // (self.micro_batch_size * self.data_parallel)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a plan depends on."""

    shape: ModelShape
    spec: MemorySpec
    """The settings of the memory layers, with the layout that the flags select."""
    cluster: Cluster
    gpu: str = "h100"
    wire: Literal["auto", "alltoall", "allgather"] = "auto"
    """The value of --memory-wire."""
    link: float | None = None
    """Bytes per second that a GPU sends inside a node. Default: those of the kind of GPU."""
    network: float | None = None
    """Bytes per second that a GPU sends to other nodes. Default: those of the kind of GPU."""
    fill: float = 0.6
    """Share of a GPU's memory that model and optimizer may take; activations get the rest."""

    def with_optimizer(self, name: Optimizer, stochastic_rounding: bool = False) -> "Job":
        """The same job with another optimizer for the table."""
        spec = replace(self.spec, optimizer=name, stochastic_rounding=stochastic_rounding)
        return replace(self, spec=spec)

    def in_pieces(self, pieces: int) -> "Job":
        """The same job with the tokens of a layer in so many pieces."""
        return replace(self, spec=replace(self.spec, pieces=pieces))

    @property
    def state(self) -> TableState:
        return table_state(
            self.spec.optimizer,
            half_precision=self.cluster.half_precision,
            stochastic_rounding=self.spec.stochastic_rounding,
            gradient_bytes=self.cluster.table_gradient_bytes,
        )

    @property
    def hardware(self) -> Hardware:
        return self.on(self.gpu)

    def on(self, gpu: str) -> Hardware:
        """A kind of GPU, with the links of the job."""
        known = HARDWARE[gpu]
        link, network = self.link or known.link, self.network or known.network
        return replace(known, link=link, network=network)

    @property
    def exchange(self) -> Exchange:
        """What the cost of an exchange depends on."""
        spec, hardware = self.spec, self.hardware
        return Exchange(
            width=spec.value_dim,
            lookups=spec.lookups_per_token,
            tokens=self.microbatch_tokens,
            number_bytes=self.number_bytes,
            num_rows=spec.num_rows,
            weight_bytes=2 if spec.lookup_weights == "bf16" else 4,
            sends_tokens=variant_of(spec).reads_tokens,
            pieces=spec.pieces,
            cores=spec.cores,
            blocks=spec.bags_per_token,
            token_width=spec.pre_value_dim or None,
            link=hardware.link,
            network=hardware.network,
        )

    @property
    def room(self) -> float:
        """Bytes per rank that model and optimizer may take."""
        return self.fill * self.hardware.memory

    @property
    def number_bytes(self) -> int:
        """Bytes per number of the model's weights and activations."""
        return 2 if self.cluster.half_precision else 4

    @property
    def microbatch_tokens(self) -> float:
        """Tokens of a microbatch for which one rank makes the lookups."""
        return self.cluster.microbatch_tokens(self.shape.seq_length)

    @property
    def placement(self) -> Placement:
        """The layers of each virtual stage of each pipeline stage."""
        stages = self.cluster.pipeline_model_parallel_size
        return self.cluster.placement or even_placement(self.shape.num_layers, stages)

    @property
    def chunk_memories(self) -> list[list[int]]:
        """The number of memory layers on each virtual stage of each pipeline stage."""
        return [[len(self._memories(chunk)) for chunk in chunks] for chunks in self.placement]

    @property
    def stage_memories(self) -> list[int]:
        """The number of memory layers on each pipeline stage."""
        return [sum(chunks) for chunks in self.chunk_memories]

    @property
    def stage_pools(self) -> list[int]:
        """The number of pools of tables that each pipeline stage reads."""
        return [
            len({pool_of(layer, self.spec) for chunk in chunks for layer in self._memories(chunk)})
            for chunks in self.placement
        ]

    def _memories(self, chunk: Sequence[int]) -> set[int]:
        return set(chunk) & set(self.spec.layers)

    @property
    def table_stages(self) -> int:
        """Number of pipeline stages that hold one and the same table."""
        return sum(map(bool, self.stage_memories)) if self.spec.pool == "shared" else 1

    def replicas(self, layout: Layout) -> int:
        """Number of ranks that hold the same shard of a table, on all stages."""
        return self.cluster.stage_ranks // layout.group_size * max(1, self.table_stages)


def group_sizes(cluster: Cluster) -> list[int]:
    """The possible sizes of a memory group: the divisors of the ranks of a stage, ascending."""
    return divisors(cluster.stage_ranks)


def layouts(job: Job) -> list[Layout]:
    """Every possible layout of the job's table: all group sizes, each in every grid that the
    variant and the width allow."""
    found: list[Layout] = []
    for size in group_sizes(job.cluster):
        for option in map(Layout.of_grid, grids(size, job.cluster.gpus_per_node)):
            if option.mode != "row" and not variant_of(job.spec).cuts_rows:
                continue
            if not mode_problem(option, job.spec.value_dim):
                found.append(option)
    return found


def layout_wire(job: Job, layout: Layout) -> Wire:
    """The collective that takes lookups to the ranks that own their rows."""
    return choose_wire(job.wire, layout.grid, job.exchange)


def layout_traffic(job: Job, layout: Layout) -> Traffic:
    """Bytes that a layout sends per token and memory layer."""
    return exchange_cost.sent(layout.grid, layout_wire(job, layout), job.exchange)
