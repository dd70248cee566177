"""`megamem doctor`: checks whether this machine can train memory layers, and what will be used.

It prints one table: versions of packages, the implementations of norms, optimizer and kernels,
devices and their links, a small memory layer in forward and backward, and a test of every kernel on
inputs with known results (known answers), on a GPU at the size of a real run. Under torchrun it
also tests the collectives that send lookups to other ranks, measures the links inside nodes and
between them, and names the layout of a table that suits these. The exit status is 0 if there is no
problem and 1 otherwise, so that a health check can use it.

    python -m megamem doctor --flags "<the command line of a training run>"

checks no machine, but whether memory layers work with everything that the run uses. The exit status
is 1 if something is refused. Under torchrun it checks both, and the layout is that of the run's
tables.
"""

import argparse
import contextlib
import importlib
import io
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
from megamem.tools.doctor_links import TableSize, links_check, table_size
from megamem.tools.plan import quiet_imports

SHOWN: dict[Status, str] = {
    "ok": "[green]ok[/]",
    "note": "[yellow]note[/]",
    "problem": "[red]PROBLEM[/]",
}
VERSIONS = ("torch", "triton", "megatron-core")
TOLERANCE = 1e-3
CPU_SCALE = 4096
"""The sizes of the known answers are divided by this number where there is no GPU."""


def add_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add the flags of `megamem doctor`."""
    add = parser.add_argument
    mib = "MiB per rank in each test of a collective (default: 64 on GPUs, 4 on CPUs)"
    add("--mib", type=int, help=mib)
    timeout = "seconds that a rank waits for the other ranks (default: %(default)s)"
    add("--timeout", type=int, default=60, help=timeout)
    add(
        "--light",
        action="store_true",
        help="skip the known answers, which need much GPU memory; for health checks during a run",
    )
    add(
        "--flags",
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="say whether memory layers work with the flags of a training run, instead of checking "
        "this machine, or under torchrun beside that; everything that follows is its command "
        "line, with or without quotes",
    )
    # --flags needs a parser for another command line
    parser.set_defaults(
        new_parser=lambda: type(parser)(prog="megamem doctor --flags", add_help=False)
    )


def run(options: argparse.Namespace) -> int:
    """Check this machine, or under torchrun all of them; return 1 if there is a problem, else 0.

    With --flags a command line is checked instead, or under torchrun as well.

    Raises:
        ConfigurationError: --mib or --timeout is less than 1, or a command line cannot be read.
    """
    many, refused, size_of_table = int(os.environ.get("WORLD_SIZE", "1")) > 1, 0, TableSize()
    if options.flags is not None:
        refused, size_of_table = flags_check(options, shown=os.environ.get("RANK", "0") == "0")
        if not many:
            return refused
    for name, value in (("--mib", options.mib), ("--timeout", options.timeout)):
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} {value} must be at least 1")

    device = own_device()
    findings = [*versions(), *megatron(), *used(device), *devices()]
    findings.append(layer_check(device))
    if options.light:
        findings.append(Finding("known answers", "skipped because of --light", "note"))
    else:
        findings += answers_check(device)
    if many:
        mib = options.mib or (64 if device.type == "cuda" else 4)
        findings, is_first = with_all_ranks(
            findings, device, mib * MIB, options.timeout, size_of_table
        )
    else:
        is_first = True
        advice = "not tested; start megamem doctor with torchrun to test them"
        findings.append(Finding("collectives", advice, "note"))
    problems = sum(finding.status == "problem" for finding in findings)
    if is_first:
        show(findings, problems)
    status = 1 if problems or refused else 0
    # after a failed collective the process group still exists, and would block the exit
    lost_ranks.end_process(SystemExit(status), sys.excepthook)
    return status


def flags_check(options: argparse.Namespace, *, shown: bool) -> tuple[int, TableSize]:
    """Check the command line of --flags.

    Args:
        options: the command line of doctor.
        shown: whether to print what was found.

    Returns:
        1 if something is refused, else 0; and the size of the run's tables.

    Raises:
        ConfigurationError: the command line cannot be read.
    """
    # it imports Megatron, which the other checks report if it cannot be imported
    with quiet_imports():
        from megamem.tools import support

    with contextlib.nullcontext() if shown else contextlib.redirect_stdout(io.StringIO()):
        refused = support.check_flags(options.flags, options.new_parser())
    args, _ = support.parse(options.flags, options.new_parser())
    try:
        return refused, table_size(args)
    except ConfigurationError:
        # it is one of the refusals
        return refused, TableSize()


def own_device() -> torch.device:
    """The GPU of this local rank, or the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def show(findings: list[Finding], problems: int) -> None:
    """Print the table and the verdict."""
    console = Console()
    table = Table(title=f"megamem {__version__}", title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("result", overflow="fold")
    table.add_column("status")
    for finding in findings:
        if not finding.is_line:
            table.add_row(finding.what, finding.found, SHOWN[finding.status])
    console.print(table)
    for finding in findings:
        if finding.is_line:
            console.print(finding.found, soft_wrap=True, highlight=False, markup=False)
    if problems:
        word = "problem" if problems == 1 else "problems"
        console.print(f"[red]Not ready:[/] {problems} {word}; see the rows marked PROBLEM above.")
        return
    where = "on GPUs" if torch.cuda.is_available() else "on CPUs, for dry runs (megamem.run --cpu)"
    console.print(f"[green]Ready:[/] this machine can train memory layers {where}.")


def versions() -> list[Finding]:
    """The versions of Python and of megamem's main dependencies, checked against its metadata."""
    wanted = requirements()
    found = [Finding("python", platform.python_version())]
    for name in VERSIONS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            advice = f"not installed; run pip install '{wanted.get(name, name)}'"
            found.append(Finding(name, advice, "problem"))
            continue
        need = wanted.get(name)
        if need is not None and not need.specifier.contains(version, prereleases=True):
            gap = f"{version}, but megamem needs {name}{need.specifier}; run pip install '{need}'"
            found.append(Finding(name, gap, "problem"))
        else:
            found.append(Finding(name, version))
    if torch.version.cuda:
        found.append(Finding("CUDA of torch", torch.version.cuda))
    return found


def requirements() -> dict[str, Requirement]:
    """Package -> its requirement in megamem's metadata; empty if megamem is not installed."""
    try:
        lines = metadata.requires("megamem") or []
    except metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines if "extra ==" not in line]
    return {requirement.name: requirement for requirement in parsed}


def megatron() -> list[Finding]:
    """Whether Megatron can be imported and has every function that megamem replaces."""
    what = "Megatron functions"
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
    return [Finding(what, "all functions that megamem replaces exist")]


def used(device: torch.device) -> list[Finding]:
    """The implementations of norms, optimizer steps and memory lookups that a run will use."""
    engine, apex = transformer_engine(), nvidia_apex()
    if engine.status == "ok":
        norms = optimizer = "Transformer Engine"
    elif apex.status == "ok":
        norms = optimizer = "Apex"
    else:
        norms = optimizer = "torch"
    on_triton = use_triton(torch.empty(0, device=device))
    plain = "plain torch, which is slow, as there is no GPU"
    kernels = Finding("memory kernels", "Triton" if on_triton else plain)
    if device.type == "cpu" and on_triton:
        kernels = Finding(
            "memory kernels",
            "Triton's interpreter, which is far slower than torch; unset TRITON_INTERPRET",
            "note",
        )
    return [
        engine,
        apex,
        Finding("norms", norms),
        Finding("optimizer", f"{optimizer}; megamem's own for value tables"),
        kernels,
        *selected_forms(),
    ]


def selected_forms() -> list[Finding]:
    """The forms of ops that MEGAMEM_FORMS selects instead of the defaults; empty if none."""
    name = "forms of ops"
    try:
        selected = forms.selected()
    except ValueError as error:
        return [Finding(name, str(error), "problem")]
    if not selected:
        return []
    listed = ", ".join(f"{op}={form}" for op, form in selected.items())
    return [Finding(name, f"{listed}, selected by {forms.ENVIRONMENT}", "note")]


def transformer_engine() -> Finding:
    """Whether Transformer Engine is installed and can be imported."""
    name = "Transformer Engine"
    if util.find_spec("transformer_engine") is None:
        advice = "use --transformer-impl local; on GPUs --sequence-parallel then needs Apex"
        return Finding(name, f"not installed; {advice}", "note")
    if failure := import_failure("transformer_engine.pytorch"):
        advice = "reinstall it for this torch and CUDA, or uninstall it"
        # without a GPU no run uses it
        status: Status = "problem" if torch.cuda.is_available() else "note"
        return Finding(name, f"installed, but {failure}; {advice}", status)
    return Finding(name, version_of("transformer-engine", "transformer_engine"))


def nvidia_apex() -> Finding:
    """Whether NVIDIA's Apex is installed; the package apex on PyPI is another project."""
    if util.find_spec("apex") is None:
        return Finding("Apex", "not installed; it is optional", "note")
    if util.find_spec("amp_C") is None or import_failure("apex.optimizers"):
        return Finding(
            "Apex",
            "installed, but without NVIDIA's compiled kernels; PyPI's apex is another project. "
            "Run pip uninstall apex, or build NVIDIA's from source",
            "problem",
        )
    return Finding("Apex", f"{version_of('apex', 'apex')}, built from source")


def import_failure(module: str) -> str:
    """The exception that importing a module raises, in one line; empty if it can be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return ""


def version_of(distribution: str, module: str) -> str:
    """The version of an installed package, from its metadata or its module."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(module), "__version__", "of unknown version"))


def devices() -> list[Finding]:
    """The GPUs, one row per kind, and their links."""
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
        found.append(Finding("links", links(said.stdout) or "nvidia-smi lists none"))
    return found


def links(topology: str) -> str:
    """Kinds of links between GPUs, with the number of pairs, from `nvidia-smi topo -m`."""
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", topology).splitlines()]
    rows = [row for row in rows if row and row[0].startswith("GPU") and "X" in row]
    pairs: Counter[str] = Counter()
    for place, row in enumerate(rows):
        pairs.update(row[1 : 1 + place])
    return ", ".join(
        f"{kind} ({count} {'pair' if count == 1 else 'pairs'})"
        for kind, count in pairs.most_common()
    )


def layer_check(device: torch.device) -> Finding:
    """A small memory layer in float32, forward and backward, compared with itself in float64."""
    what = "small memory layer"
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            ours, truth = (tiny_layer(device, dtype) for dtype in (torch.float32, torch.float64))
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error) else ""
        return Finding(what, f"fails on {device}: {type(error).__name__}: {line}", "problem")
    for name, exact in truth.items():
        wrong = float((ours[name].double() - exact).norm() / exact.norm())
        # this form of the comparison also finds NaN
        if not wrong <= TOLERANCE:
            said = f"the {name} on {device} is wrong by {wrong:.1%}; do not train on it"
            return Finding(what, said, "problem")
    return Finding(what, f"forward and backward on {device} are correct")


def tiny_layer(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of a layer, by name; its weights and its input are fixed."""
    hidden = 64
    config = MemoryConfig(memory_layers=[0], memory_num_keys=32, memory_heads=2, memory_topk=8)
    spec = resolve(config, hidden, seed=1)
    pool = MemoryPool(spec, "doctor", device=device, dtype=dtype)
    layer = MemoryLayer(spec, pool, device=device, dtype=dtype)
    torch.manual_seed(1)
    x = torch.randn(32, 2, hidden).to(device, dtype).requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    assert x.grad is not None
    values_grad, keys_grad = pool.values.weight.grad, layer.keys.sub_keys.grad
    assert values_grad is not None and keys_grad is not None
    return {
        "output": out.detach(),
        "gradient of the input": x.grad,
        "gradient of the values": values_grad,
        "gradient of the sub-keys": keys_grad,
    }


def answers_check(device: torch.device) -> list[Finding]:
    """Test every kernel on inputs whose results are known.

    Returns:
        One finding for all correct answers, and one for each that is wrong or was skipped.
    """
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
            advice = "do not train with it; use another commit of megamem or release of Triton"
            said = f"wrong on {device} at {size}: {name}: {outcome.wrong}; {advice}"
            found.append(Finding(op, said, "problem"))
        elif outcome.skipped:
            found.append(Finding(op, f"{name} was skipped: {outcome.skipped}", "note"))
    right = len(outcomes) - len(found)
    if right:
        ops = len({outcome.answer.op for outcome in outcomes})
        seconds = sum(outcome.seconds for outcome in outcomes)
        said = f"{right} of {len(outcomes)} answers of {ops} ops are correct on {device}, at {size}"
        found.insert(0, Finding("known answers", f"{said}; {seconds:.1f} s"))
    return found


def with_all_ranks(
    findings: list[Finding],
    device: torch.device,
    size: int,
    patience: int,
    table: TableSize | None = None,
) -> tuple[list[Finding], bool]:
    """Add the problems of other ranks, the tests of collectives and links to this rank's findings.

    Args:
        findings: this rank's.
        device: this rank's.
        size: bytes per rank in each test.
        patience: seconds to wait for the other ranks.
        table: the table whose layout is chosen for the links.

    Returns:
        The findings, and whether this rank should print them: rank 0, and each rank whose
        collectives fail.
    """
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
            Finding("ranks", f"{world} ranks on {len(set(hosts))} hosts, over {backend}"),
            *(
                Finding(f"rank {other} on {host}: {problem.what}", problem.found, "problem")
                for other, problems in enumerate(everybody)
                for host, problem in problems
                if other != rank
            ),
            *(collective_check(name, device, size) for name in COLLECTIVES),
            *links_check(device, size, patience, table or TableSize()),
        ]
        dist.destroy_process_group()
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error) else ""
        text = f"rank {rank} on {platform.node()}: {type(error).__name__}: {line}"
        # every rank that fails reports it, as the other ranks may have ended
        return [*findings, Finding("collectives", text, "problem")], True
    return findings, rank == 0
