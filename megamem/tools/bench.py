"""`megamem bench`: how fast the memory layers' kernels are on this GPU, and whether they are right.

It tells whether a GPU reaches the speed that the plan of a run counts on: memory layers wait for
memory, so each op is given as a fraction of the bandwidth of a copy. It needs no model and no data.

It first measures the bandwidth of a large copy, which is the upper bound. Then, for each op and
size, it compares the result with the plain-torch reference, and measures the time of the op and of
torch's own. A case with a wrong result is reported and not timed.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.progress import Progress

from megamem.config import ConfigurationError
from megamem.errors import complain
from megamem.tools import memory_bench
from megamem.tools.bench_cases import (
    MAX_RELATIVE_ERROR,
    Case,
    Rival,
    bag_cases,
    dot_cases,
    topk_cases,
)
from megamem.tools.bench_published import PublishedKernels
from megamem.tools.bench_sort import sort_cases
from megamem.tools.bench_steps import adam_cases
from megamem.tools.bench_table import (
    Record,
    failures,
    markdown,
    numbers,
    read_records,
    rich_table,
)
from megamem.tools.bench_tucker import tucker_cases
from megamem.tools.markers import rewrite

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPS = ("bag", "topk", "tucker", "adam", "dot", "sort")
MARKER = "bench"
"""Name of the markers around the table in a Markdown page."""
WRONG_RESULT = 1


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; return its exit status."""
    if args.memory:
        return memory_bench.run(args)
    if args.table:
        return _show_table([Path(path) for path in args.table], args.into)
    if args.into:
        raise ConfigurationError(
            f"--into {args.into} needs --table FILE; measure with --json FILE first"
        )
    device = _device(args.device)
    published = None
    if args.published:
        try:
            published = PublishedKernels.load(Path(args.published), device)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
    for path in (args.json, args.plot):
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            # a file that cannot be written is an error now, not after minutes of measurements
            Path(path).open("a").close()
    torch.manual_seed(args.seed)
    cases = list(_cases(args, device, published))
    found = _measure_all(cases, args, device)
    if args.plot:
        from megamem.tools.bench_plot import plot

        plot(found.records, Path(args.plot))
    for line in found.wrong:
        complain(line)
    return WRONG_RESULT if found.wrong else 0


def _device(name: str | None) -> torch.device:
    """The device of this name, by default the GPU if there is one.

    Raises:
        ConfigurationError: there is no such device.
    """
    gpus = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if gpus else "cpu"))
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device {name} is not cuda, cuda:1 or cpu")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigurationError(
            f"--device {name}: torch finds {gpus or 'no'} GPUs on this machine; use --device cpu"
            + (f", or cuda:0 to cuda:{gpus - 1}" if gpus else "")
        )
    return device


@dataclass(frozen=True)
class Found:
    """The results of all cases."""

    records: list[Record] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Cases that were skipped for lack of memory, and how much they need."""
    wrong: list[str] = field(default_factory=list)
    """Cases that raised an exception or whose result is wrong."""


def _measure_all(cases: list[Case], args: argparse.Namespace, device: torch.device) -> Found:
    """Measure one case after the other, print the table, and write the records."""
    # where the output is a file or a pipe, rich does not know a width
    console = Console(width=None if sys.stdout.isatty() else 160)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    ceiling = copy_gbps(device)
    console.print(
        f"{name}: a large copy runs at {ceiling:.0f} GB/s; the column '% of copy' compares with it."
    )
    if device.type == "cpu":
        console.print(
            "There is no GPU, so the plain-torch versions of the ops run on small shapes; these "
            "times do not tell how fast the kernels are."
        )
    if args.json:
        Path(args.json).write_text("")
    found = Found()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            title = f"{case.op} {numbers(case.shape)} {case.distribution}"
            progress.update(task, description=title)
            free = _free_bytes(device)
            try:
                if case.memory > free:
                    needed, there = f"{case.memory / 2**30:.0f} GiB", f"{free / 2**30:.0f} GiB"
                    raise torch.OutOfMemoryError(f"it needs {needed}, and {there} are free")
                record = measure(case, device, name, ceiling, args.min_ms, args.command)
            except torch.OutOfMemoryError as error:
                found.skipped.append(f"{title}: {first_line(error)}")
            except Exception as error:
                found.wrong.append(f"{title} fails: {type(error).__name__}: {first_line(error)}")
            else:
                _keep(record, title, found, args.json)
            progress.advance(task)
    console.print(rich_table(found.records))
    for line in found.skipped:
        console.print(f"skipped: {line}")
    for line in failures(found.records):
        console.print(f"not compared: {line}")
    return found


def _keep(record: Record, title: str, found: Found, path: str | None) -> None:
    # this form of the comparison also finds NaN
    if not record.error <= MAX_RELATIVE_ERROR:
        error = f"relative error {record.error:.1e}"
        found.wrong.append(f"{title} is wrong: {error}; it was not timed")
        return
    found.records.append(record)
    if path:
        # written at once, so that an interrupted run leaves what it has measured
        with Path(path).open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")


def add_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add the flags of `megamem bench`, or of `megamem bench --memory` if that is asked for."""
    add = parser.add_argument
    add(
        "--memory",
        action="store_true",
        help="measure peak memory per rank instead of speed; megamem bench --memory --help lists "
        "the flags",
    )
    if "--memory" in words:
        parser.description = memory_bench.__doc__
        memory_bench.add_flags(parser)
        return
    parser.set_defaults(command=" ".join(("python -m megamem bench", *words)))
    add("--device", help="cuda, cuda:1 or cpu (default: the GPU if there is one)")
    ops = (
        "embedding_bag, product_topk, tucker_topk, optimizer steps, row_dot, sort_lookups "
        "(default: all)"
    )
    add("--ops", nargs="+", choices=OPS, default=OPS, help=ops)
    quick = "measure each op at one size only, that of a layer of width 2048"
    add("--quick", action="store_true", help=quick)
    dtype = "dtype of tables and queries (default: %(default)s)"
    add("--dtype", choices=DTYPES, default="bf16", help=dtype)
    min_ms = "milliseconds spent on each measurement (default: %(default)g)"
    add("--min-ms", type=float, default=200, help=min_ms)
    add("--json", metavar="FILE", help="also write the records to this file, one JSON per line")
    add("--plot", metavar="FILE", help="also draw a roofline plot as a PNG")
    published = "also measure the embedding-bag kernels of this checkout of facebookresearch/memory"
    add("--published", metavar="DIR", help=published)
    table = "measure nothing, and print the records of --json files as a Markdown table"
    add("--table", nargs="+", metavar="FILE", help=table)
    into = f"with --table: write the table between the {MARKER!r} markers of this Markdown page"
    add("--into", metavar="PAGE", help=into)
    add("--seed", type=int, default=0, help="seed of the random inputs (default: %(default)s)")


def _show_table(paths: list[Path], page: str | None) -> int:
    records: list[Record] = []
    for path in paths:
        try:
            records += read_records(path)
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"--table {path}: the file does not hold records of --json ({error})"
            ) from error
    if page is None:
        sys.stdout.write(markdown(records))
        return 0
    try:
        text = rewrite(Path(page).read_text(), MARKER, markdown(records).rstrip("\n"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--into {page}: {error}") from error
    Path(page).write_text(text)
    return 0


def _cases(
    args: argparse.Namespace, device: torch.device, published: PublishedKernels | None
) -> Iterator[Case]:
    dtype, gpu = DTYPES[args.dtype], device.type == "cuda"
    if gpu:
        widths, rows = [256, 1024, 2048, 4096], [2**16, 2**20, 2**24, 2**26]
        sizes, tokens, lookups = [128, 1024, 4096, 16384], 8192, 128
    else:
        widths, rows, sizes, tokens, lookups = [64, 256], [2**12], [128], 64, 32
    # in a layer of width V rows have V numbers, and sub-keys V / 4
    typical = 2048 if gpu else 64
    if args.quick:
        widths, rows = [typical], [2**20 if gpu else 2**12]
        sizes = [1024 if gpu else 128]
    if "bag" in args.ops:
        yield from bag_cases(widths, rows, tokens, lookups, dtype, device, published)
    if "topk" in args.ops:
        yield from topk_cases(sizes, tokens, 4, typical // 4, 32, dtype, device)
    if "tucker" in args.ops:
        yield from tucker_cases(tokens, 192 if gpu else 24, dtype, device, args.quick)
    if "adam" in args.ops:
        yield from adam_cases(widths, rows, device)
    if "dot" in args.ops:
        yield from dot_cases(widths, rows, tokens, lookups, dtype, device)
    if "sort" in args.ops:
        yield from sort_cases(typical, rows, tokens, lookups, dtype, device)


def measure(
    case: Case,
    device: torch.device,
    device_name: str,
    ceiling: float,
    min_ms: float,
    command: str = "",
) -> Record:
    """Check a case, then time it and what it is compared with.

    Returns:
        The record; its times are NaN or None where the result is wrong.
    """
    work = case.build()
    error = work.check()
    # this form of the comparison also finds NaN
    right = error <= MAX_RELATIVE_ERROR
    ms = median_ms(work.run, device, min_ms) if right else math.nan
    failed: list[str] = []
    baseline, baseline_ms = _first_timed(work.rivals if right else (), device, min_ms, failed)
    theirs = (work.published,) if right and work.published is not None else ()
    _, published_ms = _first_timed(theirs, device, min_ms, failed)
    gbps = work.bytes / ms / 1e6
    return Record(
        device=device_name,
        op=case.op,
        shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."),
        distribution=case.distribution,
        ms=ms,
        bytes=work.bytes,
        gbps=gbps,
        ceiling_gbps=ceiling,
        fraction=gbps / ceiling,
        baseline=baseline,
        baseline_ms=baseline_ms,
        speedup=None if baseline_ms is None else baseline_ms / ms,
        published_ms=published_ms,
        error=error,
        commit=commit(),
        command=command,
        failures=tuple(failed),
        torch=torch.__version__,
        triton=triton.__version__,
    )


def _first_timed(
    rivals: Iterable[Rival], device: torch.device, min_ms: float, failed: list[str]
) -> tuple[str, float | None]:
    """Name and median ms of the first rival that runs, or "" and None.

    Rivals that raise an exception are appended to `failed`, with the exception.
    """
    for rival in rivals:
        try:
            return rival.name, median_ms(rival.build(), device, min_ms)
        except Exception as error:
            failed.append(f"{rival.name}: {type(error).__name__}: {first_line(error)}")
        # here, as inside of the handler the traceback would keep the tensors alive
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return "", None


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; "" if it has none."""
    return (str(error).strip().splitlines() or [""])[0]


@lru_cache
def commit() -> str:
    """The commit of this checkout, followed by "+" if files are modified; "" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        words = [
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno", "."))
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return words[0].strip() + ("+" if words[1].strip() else "")


def copy_gbps(device: torch.device) -> float:
    """GB/s, read plus written, of a copy that is several times as large as the cache."""
    size = 2**31 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / median_ms(lambda: target.copy_(source), device, 200) / 1e6


def median_ms(run: Callable[[], object], device: torch.device, min_ms: float) -> float:
    """Median milliseconds of a call; on a GPU from events, with the cache flushed before each."""
    if device.type == "cuda":
        from triton.testing import do_bench

        with torch.cuda.device(device):
            return do_bench(run, warmup=min_ms / 4, rep=min_ms, return_mode="median")
    run()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < min_ms and len(times) < 100):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)[len(times) // 2]


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return 2**30
    torch.cuda.empty_cache()
    # the allocator needs some of it for rounding up and for blocks that it caches
    return 0.85 * torch.cuda.mem_get_info(device)[0]
