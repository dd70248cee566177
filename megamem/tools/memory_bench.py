"""`megamem bench --memory`: the peak memory of a rank, compared with the planner's.

Each case shards one table, which two memory layers share, over some ranks and makes one step:
forward, backward, gradient norm, update. The peak of each phase counts the bytes of all tensors,
temporary ones included:

    on a GPU      torch.cuda.max_memory_allocated
    on a CPU      the allocations that torch.profiler records. The code that calls the kernels runs
                  as on a GPU; the kernels, which allocate nothing, do not run, as their plain-torch
                  versions would allocate more. Row ids are random, and results are meaningless

Memory outside of torch's tensors is not counted: buffers of NCCL and gloo, the CUDA context, and
what the allocator caches. Beside the table the plan counts the layers' own weights and gradients in
the table's dtype. Their optimizer is Megatron's and does not run here.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megamem.config import ConfigurationError, MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.megatron.launcher import close_process_group
from megamem.optimizer import StepOptions, TableOptimizer
from megamem.parallel.memory_group import form, partition
from megamem.planner import OPTIMIZERS, Cluster, Job, ModelShape
from megamem.planner.cost import rank_bytes
from megamem.planner.sizes import memory_layer_parameters
from megamem.resolution import resolve
from megamem.spec import Layout, MemorySpec
from megamem.tools.memory_peaks import PHASES, CpuPeaks, GpuPeaks, leave_kernels_out

LAYERS = 2
MODES = ("row", "column")
TOLERANCE = 0.1
BEYOND_PLAN = 1
PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of the model that is built."""

    num_keys: int
    width: int
    """Numbers per row of the table; also the hidden size."""
    key_dim: int
    """Width of a head's query."""
    tokens: int
    """Tokens of each rank."""
    heads: int
    topk: int
    variant: Literal["memory", "memory+", "peer", "ultramem", "ultramem-v2"] = "memory+"
    optimizer: str = "adamw"
    wire: Literal["auto", "alltoall", "allgather"] = "auto"


GPU_SIZES = Sizes(num_keys=1024, width=1024, key_dim=512, tokens=8192, heads=4, topk=32)
CPU_SIZES = Sizes(num_keys=256, width=256, key_dim=64, tokens=128, heads=4, topk=16)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One case, on the rank with the highest peak."""

    device: str
    mode: str
    ranks: int
    sizes: Sizes
    planned: dict[str, float]
    """Planned bytes of the table's weights, gradients, optimizer and buffers, and of the layers."""
    measured: dict[str, int]
    """Phase -> peak in bytes."""

    @property
    def plan(self) -> float:
        """Planned bytes in total."""
        return sum(self.planned.values())

    @property
    def peak(self) -> int:
        """Measured bytes: the highest peak of all phases."""
        return max(self.measured.values())

    @property
    def ratio(self) -> float:
        """Measured bytes divided by planned bytes."""
        return self.peak / self.plan

    @property
    def buffers_ratio(self) -> float:
        """The same ratio for the lookup buffers of forward and backward alone."""
        held = self.plan - self.planned["buffers"]
        peak = max(self.measured["forward"], self.measured["backward"])
        return (peak - held) / self.planned["buffers"]


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; return 0, or 1 if a peak differs from the plan by more than TOLERANCE."""
    if args.json:
        # a file that cannot be written is an error now, not after minutes of measurements
        Path(args.json).open("a").close()
    gpus = torch.cuda.device_count() if args.device != "cpu" else 0
    if args.device == "cuda" and not gpus:
        raise ConfigurationError(
            "--device cuda: torch finds no GPUs on this machine; use --device cpu"
        )
    sizes = _sizes(args, GPU_SIZES if gpus else CPU_SIZES)
    console = Console(width=None if sys.stdout.isatty() else 160)
    cases = [
        (mode, ranks) for ranks in args.ranks for mode in args.modes if ranks > 1 or mode == "row"
    ]
    records = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for mode, ranks in cases:
            progress.update(task, description=f"{mode} over {ranks}")
            if not gpus or ranks <= gpus:
                records.append(measure(mode, ranks, sizes, on_gpu=bool(gpus)))
            progress.advance(task)
    console.print(rich_table(records))
    if left_out := [str(ranks) for ranks in args.ranks if gpus and ranks > gpus]:
        console.print(
            f"--ranks {' '.join(left_out)} was skipped, as there are {gpus} GPUs; --device cpu "
            "measures any number of ranks."
        )
    if args.json:
        Path(args.json).write_text(json.dumps([as_json(r) for r in records], indent=2) + "\n")
    return BEYOND_PLAN if any(abs(r.ratio - 1) > TOLERANCE for r in records) else 0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `megamem bench --memory`."""
    add = parser.add_argument
    ranks = "numbers of ranks that share the table, measured one after the other (default: 1 2 4)"
    add("--ranks", nargs="+", type=int, default=[1, 2, 4], help=ranks)
    modes = "how the table is sharded, as --memory-mode (default: both)"
    add("--modes", nargs="+", choices=MODES, default=MODES, help=modes)
    add("--device", choices=("cuda", "cpu"), help="default: GPUs if there are any")
    optimizer = "optimizer of the table, as --memory-optimizer (default: %(default)s)"
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help=optimizer)
    wire = "collective used for the lookups, as --memory-wire (default: %(default)s)"
    add("--wire", choices=("auto", "alltoall", "allgather"), default="auto", help=wire)
    variant = "variant of memory layers, as --memory-variant (default: memory+)"
    add("--variant", choices=get_args(get_type_hints(Sizes)["variant"]), help=variant)
    for name, meaning in (
        ("num-keys", "sub-keys per query half"),
        ("width", "numbers per row of the table; also the hidden size"),
        ("key-dim", "width of a head's query"),
        ("tokens", "tokens per rank"),
        ("heads", "heads of a memory layer"),
        ("topk", "rows that each head reads"),
    ):
        field = name.replace("-", "_")
        on_gpu, on_cpu = getattr(GPU_SIZES, field), getattr(CPU_SIZES, field)
        default = f"{on_gpu}" if on_gpu == on_cpu else f"{on_gpu} on GPUs, {on_cpu} on CPUs"
        add(f"--{name}", type=int, help=f"{meaning} (default: {default})")
    add("--json", metavar="FILE", help="also write the records to this file")


def _sizes(args: argparse.Namespace, default: Sizes) -> Sizes:
    fields = asdict(default)
    return Sizes(**{name: getattr(args, name) or fields[name] for name in fields})


def measure(mode: str, ranks: int, sizes: Sizes, *, on_gpu: bool = False) -> Record:
    """Make a step on spawned ranks; return the highest peak of a rank, and the plan.

    Raises:
        ConfigurationError: no memory layer can have these sizes.
    """
    job, layout = job_of(mode, ranks, sizes)
    planned = planned_bytes(job, layout)
    with tempfile.TemporaryDirectory() as folder, _environment(on_gpu):
        mp.spawn(_rank, args=(folder, mode, ranks, sizes, on_gpu), nprocs=ranks)
        peaks = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    fullest = max(peaks, key=lambda peak: max(peak.values()))
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    return Record(
        device=device, mode=mode, ranks=ranks, sizes=sizes, planned=planned, measured=fullest
    )


def job_of(mode: str, ranks: int, sizes: Sizes) -> tuple[Job, Layout]:
    """The planner's input for a case."""
    shape = ModelShape(
        num_layers=LAYERS,
        hidden_size=sizes.width,
        num_attention_heads=1,
        padded_vocab_size=1,
        seq_length=sizes.tokens,
    )
    cluster = Cluster(world_size=ranks, half_precision=True)
    spec = _spec(mode, ranks, sizes)
    return Job(shape=shape, spec=spec, cluster=cluster, wire=sizes.wire), spec.layout


def _spec(mode: str, ranks: int, sizes: Sizes) -> MemorySpec:
    settings: dict[str, Any] = {"memory_mode": mode, "memory_group_size": ranks}
    settings |= {"memory_optimizer": sizes.optimizer, "memory_wire": sizes.wire}
    settings |= {"memory_variant": sizes.variant, "memory_pool": "shared"}
    config = MemoryConfig(
        memory_layers=list(range(LAYERS)),
        memory_num_keys=sizes.num_keys,
        memory_key_dim=sizes.key_dim,
        memory_heads=sizes.heads,
        memory_topk=sizes.topk,
        **settings,
    )
    return resolve(config, sizes.width, seed=0)


def planned_bytes(job: Job, layout: Layout) -> dict[str, float]:
    """Part -> bytes on the rank that holds most."""
    parts = rank_bytes(job, layout)
    own = LAYERS * memory_layer_parameters(job.spec)
    return {
        "weights": parts.weights,
        "gradients": parts.gradients,
        "optimizer": parts.optimizer,
        "buffers": parts.buffers,
        "layers": 2 * own * job.number_bytes,
    }


@contextmanager
def _environment(on_gpu: bool) -> Iterator[None]:
    """Set the variables that ranks need in their environment before they import Triton."""
    wanted = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0" if on_gpu else "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _rank(rank: int, folder: str, mode: str, ranks: int, sizes: Sizes, on_gpu: bool) -> None:
    """Run one rank of a case and write its peaks to FOLDER/RANK.json."""
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not on_gpu:
        leave_kernels_out()
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=PATIENCE,
    )
    recorder = GpuPeaks() if on_gpu else CpuPeaks()
    with recorder:
        _step(mode, ranks, sizes, device, recorder)
    Path(folder, f"{rank}.json").write_text(json.dumps(recorder.peaks()))
    # not in a finally: after a failure NCCL would wait for ranks that wait for this one
    close_process_group()


def _step(
    mode: str, ranks: int, sizes: Sizes, device: torch.device, phase: Callable[[str], None]
) -> None:
    """Build a table and its layers and make one step; call `phase` when a phase begins."""
    spec = _spec(mode, ranks, sizes)
    group = form(partition([list(range(ranks))], spec.layout.grid))
    place: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    pool = MemoryPool(spec, group=group, **place)
    # as in a run: the table's gradient does not come from autograd
    for table in pool:
        table.leave_to_optimizer()
    layers = [MemoryLayer(spec, pool, layer=n, group=group.members, **place) for n in range(LAYERS)]
    optimizer = TableOptimizer(pool, spec, StepOptions(), lr=1e-3, weight_decay=0.1)
    for layer in layers:
        for weight in layer.parameters():
            # Megatron allocates the gradients of all weights for the complete run
            weight.grad = torch.zeros_like(weight)
    hidden = torch.randn(sizes.tokens, 1, sizes.width, **place).requires_grad_()
    phase("forward")
    y = hidden
    for layer in layers:
        y = layer(y)
    phase("backward")
    loss = y.float().square().mean()
    del y
    loss.backward()
    phase("norm")
    optimizer.reduce()
    optimizer.squared_norm()
    phase("update")
    optimizer.step()
    phase("end")


def rich_table(records: list[Record]) -> Table:
    """A table with a row per case: planned bytes by part, and measured peaks by phase."""
    title = (
        "MB on the rank with the highest peak. The columns up to plan are the planner's, those up\n"
        "to peak are measured; buffers / plan compares the lookup buffers alone."
    )
    table = Table(box=None, title=title, title_justify="left")
    table.add_column("layout")
    parts, phases = list(records[0].planned) if records else [], PHASES
    for title in (*parts, "plan", *phases, "peak", "peak / plan", "buffers / plan"):
        table.add_column(title, justify="right")
    for r in records:
        planned = [f"{r.planned[part] / 1e6:.2f}" for part in parts]
        measured = [f"{r.measured[phase] / 1e6:.2f}" for phase in phases]
        ends = [f"{r.peak / 1e6:.2f}", f"{r.ratio:.3f}", f"{r.buffers_ratio:.2f}"]
        name = f"{r.mode} over {r.ranks}"
        table.add_row(name, *planned, f"{r.plan / 1e6:.2f}", *measured, *ends)
    return table


def as_json(record: Record) -> dict[str, Any]:
    """The fields of a record, its totals and its ratios."""
    return asdict(record) | {
        "plan": record.plan,
        "peak": record.peak,
        "ratio": record.ratio,
        "buffers_ratio": record.buffers_ratio,
    }
