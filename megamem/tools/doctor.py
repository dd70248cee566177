"""megamem doctor: can this machine train with memory layers, and what will it use?

One table: versions, what is used for norms, optimizer and kernels, devices and their links, a tiny
memory layer forward and backward, and known answers put through every kernel, on a GPU at the size
of a real run; under torchrun also the collectives that lookups travel by. The exit status is 0 when
nothing is wrong and 1 otherwise, so that a health check can use it.
"""

import argparse
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from importlib import metadata, util
from typing import Any

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megamem import __version__
from megamem.config import ConfigurationError, MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.megatron.reports import lost_ranks
from megamem.ops import forms
from megamem.ops.backend import use_triton
from megamem.patching import MissingSymbolError
from megamem.resolution import resolve
from megamem.tools import known_answers
from megamem.tools.doctor_collectives import COLLECTIVES, MIB, collective_check
from megamem.tools.doctor_finding import Finding, Status

SHOWN: dict[Status, str] = {
    "ok": "[green]ok[/]",
    "note": "[yellow]note[/]",
    "problem": "[red]PROBLEM[/]",
}
VERSIONS = ("torch", "triton", "megatron-core")
TOLERANCE = 1e-3
CPU_SCALE = 4096
"""What sizes of the known answers are divided by where there is no GPU."""


def add_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Those of `megamem doctor`."""
    add = parser.add_argument
    add("--mib", type=int, help="size of a collective on each rank; default 64, on CPUs 4")
    add("--timeout", type=int, default=60, help="seconds that a rank waits for the others")
    add(
        "--light",
        action="store_true",
        help="without known answers, which take a GPU's memory: for a health check beside a run",
    )


def run(options: argparse.Namespace) -> int:
    """Examine this machine, or under torchrun all of them; 1 if something is wrong."""
    for name, value in (("--mib", options.mib), ("--timeout", options.timeout)):
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} {value} must be at least 1")

    device = own_device()
    findings = [*versions(), *megatron(), *used(device), *devices()]
    findings.append(layer_check(device))
    if options.light:
        findings.append(Finding("known answers", "not tried: --light", "note"))
    else:
        findings += answers_check(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        mib = options.mib or (64 if device.type == "cuda" else 4)
        findings, is_first = with_all_ranks(findings, device, mib * MIB, options.timeout)
    else:
        is_first = True
        advice = "not tried: start with torchrun to try them"
        findings.append(Finding("collectives", advice, "note"))
    problems = sum(finding.status == "problem" for finding in findings)
    if is_first:
        show(findings, problems)
    status = 1 if problems else 0
    # where collectives failed, the process group is still there
    lost_ranks.end_process(SystemExit(status), sys.excepthook)
    return status


def own_device() -> torch.device:
    """The GPU of this local rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def show(findings: list[Finding], problems: int) -> None:
    """Print the table and the verdict."""
    console = Console()
    table = Table(title=f"megamem {__version__}", title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("")
    for finding in findings:
        table.add_row(finding.what, finding.found, SHOWN[finding.status])
    console.print(table)
    if problems:
        word = "problem" if problems == 1 else "problems"
        console.print(f"[red]Not ready:[/] {problems} {word}, marked above with what to do.")
        return
    trains = "on GPUs" if torch.cuda.is_available() else "on CPUs, for dry runs (megamem.run --cpu)"
    console.print(f"[green]Ready:[/] this machine trains memory layers {trains}.")


def versions() -> list[Finding]:
    """Python and what megamem is built on, against what its metadata asks for."""
    wanted = requirements()
    found = [Finding("python", platform.python_version())]
    for name in VERSIONS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            advice = f"not installed; pip install '{wanted.get(name, name)}'"
            found.append(Finding(name, advice, "problem"))
            continue
        need = wanted.get(name)
        if need is not None and not need.specifier.contains(version, prereleases=True):
            gap = f"{version}, but megamem needs {name}{need.specifier}"
            found.append(Finding(name, gap, "problem"))
        else:
            found.append(Finding(name, version))
    if torch.version.cuda:
        found.append(Finding("CUDA of torch", torch.version.cuda))
    return found


def requirements() -> dict[str, Requirement]:
    """Package -> what megamem's own metadata asks of it; nothing where it was not installed."""
    try:
        lines = metadata.requires("megamem") or []
    except metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines if "extra ==" not in line]
    return {requirement.name: requirement for requirement in parsed}


def megatron() -> list[Finding]:
    """Whether Megatron imports, and still has every function that megamem replaces."""
    what = "megatron hooks"
    failure = import_failure("megamem.megatron.patches")
    if not failure:
        from megamem.megatron import patches

        try:
            patches.install()
            patches.install_memory()
        except MissingSymbolError as error:
            failure = str(error)
    if failure:
        advice = "install the release of megatron-core that megamem needs"
        return [Finding(what, f"{failure}; {advice}", "problem")]
    return [Finding(what, "every function that megamem replaces is there")]


def used(device: torch.device) -> list[Finding]:
    """What will run norms, optimizer steps and memory lookups."""
    engine, apex = transformer_engine(), nvidia_apex()
    if engine.status == "ok":
        norms = optimizer = "Transformer Engine"
    elif apex.status == "ok":
        norms = optimizer = "Apex"
    else:
        norms = optimizer = "torch"
    on_triton = use_triton(torch.empty(0, device=device))
    kernels = Finding("memory kernels", "Triton" if on_triton else "torch, slow: there is no GPU")
    if device.type == "cpu" and on_triton:
        kernels = Finding(
            "memory kernels",
            "Triton's interpreter, far slower than torch; unset TRITON_INTERPRET",
            "note",
        )
    return [
        engine,
        apex,
        Finding("norms by", norms),
        Finding("optimizer by", f"{optimizer}; value tables by megamem's own"),
        kernels,
        *selected_forms(),
    ]


def selected_forms() -> list[Finding]:
    """What the environment selects in place of the defaults; nothing where it selects nothing."""
    name = "forms of ops"
    try:
        selected = forms.selected()
    except ValueError as error:
        return [Finding(name, str(error), "problem")]
    if not selected:
        return []
    told = ", ".join(f"{op}={form}" for op, form in selected.items())
    return [Finding(name, f"{told}, selected by {forms.ENVIRONMENT}", "note")]


def transformer_engine() -> Finding:
    """Whether Transformer Engine is there and imports."""
    name = "Transformer Engine"
    if util.find_spec("transformer_engine") is None:
        advice = (
            "--transformer-impl local works without; on GPUs --sequence-parallel then needs Apex"
        )
        return Finding(name, f"not installed; {advice}", "note")
    if failure := import_failure("transformer_engine.pytorch"):
        advice = "reinstall it for this torch and CUDA, or uninstall it"
        # without a GPU nobody will use it
        status: Status = "problem" if torch.cuda.is_available() else "note"
        return Finding(name, f"installed, but {failure}; {advice}", status)
    return Finding(name, version_of("transformer-engine", "transformer_engine"))


def nvidia_apex() -> Finding:
    """Whether NVIDIA's Apex is there; the package of that name on PyPI is something else."""
    if util.find_spec("apex") is None:
        return Finding("Apex", "not installed; nothing needs it", "note")
    if util.find_spec("amp_C") is None or import_failure("apex.optimizers"):
        return Finding(
            "Apex",
            "installed, but without NVIDIA's compiled kernels: PyPI's apex is another project. "
            "pip uninstall apex, or build NVIDIA's from source",
            "problem",
        )
    return Finding("Apex", f"{version_of('apex', 'apex')}, built from source")


def import_failure(module: str) -> str:
    """Why a module does not import, in one line; empty if it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return ""


def version_of(distribution: str, module: str) -> str:
    """Of an installed package, as its metadata or its module says."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(module), "__version__", "of unknown version"))


def devices() -> list[Finding]:
    """GPUs of one kind in one line, and how they are linked."""
    if not torch.cuda.is_available():
        cpus = len(os.sched_getaffinity(0))
        return [Finding("GPUs", f"none; {cpus} CPU cores", "note")]
    kinds: Counter[str] = Counter()
    for index in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(index)
        memory = f"{seen.total_memory / 2**30:.0f} GiB, compute {seen.major}.{seen.minor}"
        kinds[f"{seen.name}, {memory}"] += 1
    found = [Finding("GPUs", f"{count} x {kind}") for kind, count in kinds.items()]
    if shutil.which("nvidia-smi"):
        said = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True)
        found.append(Finding("links", links(said.stdout) or "nvidia-smi names none"))
    return found


def links(topology: str) -> str:
    """`nvidia-smi topo -m` -> each kind of link between two GPUs, and how many pairs have it."""
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", topology).splitlines()]
    rows = [row for row in rows if row and row[0].startswith("GPU") and "X" in row]
    pairs: Counter[str] = Counter()
    for place, row in enumerate(rows):
        pairs.update(row[1 : 1 + place])
    return ", ".join(f"{kind} between {count} pairs" for kind, count in pairs.most_common())


def layer_check(device: torch.device) -> Finding:
    """A tiny memory layer, forward and backward, against itself in float64."""
    what = "tiny memory layer"
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            ours, truth = (tiny_layer(device, dtype) for dtype in (torch.float32, torch.float64))
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error) else ""
        return Finding(what, f"fails on {device}: {type(error).__name__}: {line}", "problem")
    for name, exact in truth.items():
        wrong = float((ours[name].double() - exact).norm() / exact.norm())
        # a NaN is no small error
        if not wrong <= TOLERANCE:
            return Finding(what, f"{name} on {device} is wrong by {wrong:.1%}", "problem")
    return Finding(what, f"forward and backward on {device} are right")


def tiny_layer(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name -> output and gradients of a layer whose weights and input are the same every time."""
    hidden = 64
    config = MemoryConfig(memory_layers=[0], memory_num_keys=32, memory_heads=2, memory_topk=8)
    spec = resolve(config, hidden, seed=1)
    pool = MemoryPool(spec, "doctor", device=device, dtype=dtype)
    layer = MemoryLayer(spec, pool, device=device, dtype=dtype)
    torch.manual_seed(1)
    x_SBD = torch.randn(32, 2, hidden).to(device, dtype).requires_grad_()
    out_SBD = layer(x_SBD)
    out_SBD.square().sum().backward()
    assert x_SBD.grad is not None
    values_grad, keys_grad = pool.values.weight.grad, layer.keys.sub_keys.grad
    assert values_grad is not None and keys_grad is not None
    return {
        "output": out_SBD.detach(),
        "gradient of the input": x_SBD.grad,
        "gradient of the values": values_grad,
        "gradient of the sub-keys": keys_grad,
    }


def answers_check(device: torch.device) -> list[Finding]:
    """Every kernel on inputs whose results are known: one line if all are right, else one each."""
    on_gpu = device.type == "cuda"
    scale = 1 if on_gpu else CPU_SCALE
    console = Console(stderr=True)
    with console.status("known answers") as status:
        outcomes = known_answers.run(
            device, scale, progress=lambda answer: status.update(f"known answer: {answer.name}")
        )
    size = "the size of a real run" if on_gpu else f"1/{scale} of the size of a real run"
    found = []
    for outcome in outcomes:
        name, op = outcome.answer.name, outcome.answer.op
        if outcome.wrong:
            advice = "do not train with this: take another commit of megamem or release of Triton"
            said = f"wrong on {device} at {size}: {name}: {outcome.wrong}; {advice}"
            found.append(Finding(op, said, "problem"))
        elif outcome.skipped:
            found.append(Finding(op, f"{name} was not tried: {outcome.skipped}", "note"))
    right = len(outcomes) - len(found)
    if right:
        ops = len({outcome.answer.op for outcome in outcomes})
        seconds = sum(outcome.seconds for outcome in outcomes)
        said = f"{right} of {len(outcomes)} for {ops} ops are right on {device}, at {size}"
        found.insert(0, Finding("known answers", f"{said}; {seconds:.1f} s"))
    return found


def with_all_ranks(
    findings: list[Finding], device: torch.device, size: int, patience: int
) -> tuple[list[Finding], bool]:
    """The first rank's findings, the problems of all, and the collectives; and if we are first."""
    rank = int(os.environ.get("RANK", "0"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=patience))
        world = dist.get_world_size()
        everybody: list[Any] = [None] * world
        host = platform.node()
        dist.all_gather_object(everybody, [(host, f) for f in findings if f.status == "problem"])
        hosts: list[Any] = [None] * world
        dist.all_gather_object(hosts, host)
        findings = [
            *findings,
            Finding("ranks", f"{world}, hosts {len(set(hosts))}, over {backend}"),
            *(
                Finding(f"rank {other} on {host}: {problem.what}", problem.found, "problem")
                for other, problems in enumerate(everybody)
                for host, problem in problems
                if other != rank
            ),
            *(collective_check(name, device, size) for name in COLLECTIVES),
        ]
        dist.destroy_process_group()
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error) else ""
        text = f"rank {rank} on {platform.node()}: {type(error).__name__}: {line}"
        # whoever fails says so itself: the others may be gone
        return [*findings, Finding("collectives", text, "problem")], True
    return findings, rank == 0
