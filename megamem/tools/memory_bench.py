"""`megamem bench --memory`: the bytes that a rank holds at most, beside the plan's.

Every case spreads one table that two memory layers share over some ranks, and makes one step:
forward, backward, gradient norm, update. The peak counts every byte of every tensor, with those
that an op allocates for itself, in each of these phases:

    on a GPU      torch.cuda.max_memory_allocated
    on a CPU      the allocations that torch.profiler sees, made by the code that feeds the kernels
                  on a GPU. The kernels themselves, which allocate nothing, are left out: their
                  twins in plain torch would hold more. Rows to read are drawn at random; no number
                  that a kernel would compute means anything

Not counted either is what lies outside of torch: NCCL's and gloo's own buffers, CUDA's context,
and what the allocator keeps for reuse. Beside the table the plan counts the layers' own weights
and gradients in the table's dtype; no optimizer steps them here, as it is Megatron's.
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
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
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
    """Of the model that is built."""

    num_keys: int
    width: int
    """Of a row, and of the model."""
    key_dim: int
    """Of a query."""
    tokens: int
    """Of each rank."""
    heads: int
    topk: int
    optimizer: str = "adamw"
    wire: Literal["auto", "alltoall", "allgather"] = "auto"


GPU_SIZES = Sizes(num_keys=1024, width=1024, key_dim=512, tokens=8192, heads=4, topk=32)
CPU_SIZES = Sizes(num_keys=256, width=256, key_dim=64, tokens=128, heads=4, topk=16)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One case, on the rank that held most."""

    device: str
    mode: str
    ranks: int
    sizes: Sizes
    planned: dict[str, float]
    """weights, gradients, optimizer, buffers of the table, layers -> bytes."""
    measured: dict[str, int]
    """Phase -> peak."""

    @property
    def plan(self) -> float:
        return sum(self.planned.values())

    @property
    def peak(self) -> int:
        return max(self.measured.values())

    @property
    def ratio(self) -> float:
        """Measured to planned."""
        return self.peak / self.plan

    @property
    def buffers_ratio(self) -> float:
        """The same of what forward and backward need beside what is held throughout."""
        held = self.plan - self.planned["buffers"]
        peak = max(self.measured["forward"], self.measured["backward"])
        return (peak - held) / self.planned["buffers"]


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; return its exit status, not 0 where a peak is off the plan."""
    if args.json:
        # before minutes have gone into it
        Path(args.json).open("a").close()
    gpus = torch.cuda.device_count() if args.device != "cpu" else 0
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
            f"left out: {', '.join(left_out)} ranks, as there are {gpus} GPUs; --device cpu"
        )
    if args.json:
        Path(args.json).write_text(json.dumps([as_json(r) for r in records], indent=2) + "\n")
    return BEYOND_PLAN if any(abs(r.ratio - 1) > TOLERANCE for r in records) else 0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `megamem bench --memory`."""
    add = parser.add_argument
    add("--ranks", nargs="+", type=int, default=[1, 2, 4], help="sizes of the memory group")
    add("--modes", nargs="+", choices=MODES, default=MODES)
    add("--device", choices=("cuda", "cpu"), help="default: GPUs if there are any")
    add("--optimizer", choices=OPTIMIZERS, default="adamw")
    add("--wire", choices=("auto", "alltoall", "allgather"), default="auto")
    for name, meaning in (
        ("num-keys", "N, sub-keys of a half"),
        ("width", "of a row"),
        ("key-dim", "of a query"),
        ("tokens", "of each rank"),
        ("heads", "of a layer"),
        ("topk", "rows that a head reads"),
    ):
        add(f"--{name}", type=int, help=meaning)
    add("--json", metavar="FILE", help="write the records")


def _sizes(args: argparse.Namespace, default: Sizes) -> Sizes:
    fields = asdict(default)
    return Sizes(**{name: getattr(args, name) or fields[name] for name in fields})


def measure(mode: str, ranks: int, sizes: Sizes, *, on_gpu: bool = False) -> Record:
    """Build, make a step on spawned ranks, and compare the fullest with the plan.

    Raises:
        ConfigurationError: sizes that no layer can have.
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
    """What the planner is asked."""
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
    """Part -> bytes on the fullest rank."""
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
    """What ranks must find before they import Triton."""
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
    """One rank of a case: writes its peaks."""
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
    # not of a rank that fails: NCCL would wait there for those that wait for it
    dist.destroy_process_group()


def _step(
    mode: str, ranks: int, sizes: Sizes, device: torch.device, phase: Callable[[str], None]
) -> None:
    """Build a table and its layers, and make one step, naming the phases as they begin."""
    spec = _spec(mode, ranks, sizes)
    group = form(partition([list(range(ranks))], ranks, ranks if mode == "column" else 1))
    place: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    pool = MemoryPool(spec, group=group, **place)
    # as in a run: no gradient of it is autograd's
    pool.tables.requires_grad_(False)
    layers = [MemoryLayer(spec, pool, layer=n, group=group.members, **place) for n in range(LAYERS)]
    optimizer = TableOptimizer(pool, spec, StepOptions(), lr=1e-3, weight_decay=0.1)
    for layer in layers:
        for weight in layer.parameters():
            # where Megatron sums gradients there is room for them all the time
            weight.grad = torch.zeros_like(weight)
    hidden_SBD = torch.randn(sizes.tokens, 1, sizes.width, **place).requires_grad_()
    phase("forward")
    y = hidden_SBD
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
    """Planned and measured, a row a case."""
    table = Table(box=None, title="MB on the fullest rank", title_justify="left")
    table.add_column("layout")
    parts, phases = list(records[0].planned) if records else [], PHASES
    for title in (*parts, "plan", *phases, "peak", "peak / plan", "buffers"):
        table.add_column(title, justify="right")
    for r in records:
        planned = [f"{r.planned[part] / 1e6:.2f}" for part in parts]
        measured = [f"{r.measured[phase] / 1e6:.2f}" for phase in phases]
        ends = [f"{r.peak / 1e6:.2f}", f"{r.ratio:.3f}", f"{r.buffers_ratio:.2f}"]
        name = f"{r.mode} over {r.ranks}"
        table.add_row(name, *planned, f"{r.plan / 1e6:.2f}", *measured, *ends)
    return table


def as_json(record: Record) -> dict[str, Any]:
    """A record and its ratio."""
    return asdict(record) | {
        "plan": record.plan,
        "peak": record.peak,
        "ratio": record.ratio,
        "buffers_ratio": record.buffers_ratio,
    }
