"""`megamem bench`: how near the kernels come to what the memory of this machine can do.

Measures a large copy first, which is the ceiling; then, case by case, checks the result of an op
against its reference and times it beside torch. A case whose result is wrong is not timed.
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
from megamem.tools.bench_steps import adam_cases
from megamem.tools.bench_table import (
    Record,
    failures,
    markdown,
    numbers,
    read_records,
    rich_table,
)
from megamem.tools.markers import rewrite

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPS = ("bag", "topk", "adam", "dot")
MARKER = "bench"
"""Of the table in a page."""
WRONG_RESULT = 1


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; return its exit status."""
    if args.memory:
        return memory_bench.run(args)
    if args.table:
        return _show_table([Path(path) for path in args.table], args.into)
    if args.into:
        raise ConfigurationError("--into is for a --table; measure with --json first")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    published = None
    if args.published:
        try:
            published = PublishedKernels.load(Path(args.published), device)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
    for path in (args.json, args.plot):
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            # before minutes have gone into it
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


@dataclass(frozen=True)
class Found:
    """What came of the cases."""

    records: list[Record] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Cases for which there was no memory, and how much they take."""
    wrong: list[str] = field(default_factory=list)
    """Cases whose result is wrong, or that failed."""


def _measure_all(cases: list[Case], args: argparse.Namespace, device: torch.device) -> Found:
    """Measure one case after the other, show and write what comes of them."""
    # a file has no width of its own
    console = Console(width=None if sys.stdout.isatty() else 160)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    ceiling = copy_gbps(device)
    console.print(f"{name}: a large copy moves {ceiling:.0f} GB/s, which is the ceiling below")
    if device.type == "cpu":
        console.print(
            "No GPU: the twins in plain torch run, on small shapes; only ratios mean anything."
        )
    if args.json:
        Path(args.json).write_text("")
    found = Found()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            named = f"{case.op} {numbers(case.shape)} {case.distribution}"
            progress.update(task, description=named)
            free = _free_bytes(device)
            try:
                if case.memory > free:
                    needed = f"{case.memory / 2**30:.0f} GiB of {free / 2**30:.0f} GiB free"
                    raise torch.OutOfMemoryError(f"it takes {needed}")
                record = measure(case, device, name, ceiling, args.min_ms, args.command)
            except torch.OutOfMemoryError as error:
                found.skipped.append(f"{named}: {first_line(error)}")
            except Exception as error:
                found.wrong.append(f"{named} fails: {type(error).__name__}: {first_line(error)}")
            else:
                _keep(record, named, found, args.json)
            progress.advance(task)
    console.print(rich_table(found.records))
    for line in found.skipped:
        console.print(f"skipped: {line}")
    for line in failures(found.records):
        console.print(f"could not: {line}")
    return found


def _keep(record: Record, named: str, found: Found, path: str | None) -> None:
    # written so that NaN is wrong, too
    if not record.error <= MAX_RELATIVE_ERROR:
        error = f"relative error {record.error:.1e}"
        found.wrong.append(f"{named} is wrong: {error}; it was not timed")
        return
    found.records.append(record)
    if path:
        # at once, so that a run that is cut off leaves what it measured
        with Path(path).open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")


def add_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Those of `megamem bench`, or, where --memory is among the words, of that."""
    add = parser.add_argument
    add("--memory", action="store_true", help="measure what ranks hold instead; has its own --help")
    if "--memory" in words:
        parser.description = memory_bench.__doc__
        memory_bench.add_flags(parser)
        return
    parser.set_defaults(command=" ".join(("python -m megamem bench", *words)))
    add("--device", help="cuda, cuda:1, cpu; default: a GPU if there is one")
    add("--ops", nargs="+", choices=OPS, default=OPS)
    add("--quick", action="store_true", help="one size of each op, that of a layer of 2048")
    add("--dtype", choices=DTYPES, default="bf16", help="of tables and queries")
    add("--min-ms", type=float, default=200, help="time spent on each timing")
    add("--json", metavar="FILE", help="write one record per line")
    add("--plot", metavar="FILE", help="draw the roofline as a PNG")
    published = "also time the bag kernels in this checkout of facebookresearch/memory"
    add("--published", metavar="DIR", help=published)
    table = "measure nothing: turn --json files into Markdown"
    add("--table", nargs="+", metavar="FILE", help=table)
    into = f"with --table: put it between the markers {MARKER!r} of this page"
    add("--into", metavar="PAGE", help=into)
    add("--seed", type=int, default=0)


def _show_table(paths: list[Path], page: str | None) -> int:
    records: list[Record] = []
    for path in paths:
        try:
            records += read_records(path)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{path} holds no records of --json: {error}") from error
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
    # a layer of width V reads rows of V with halves of queries of V / 4
    typical = 2048 if gpu else 64
    if args.quick:
        widths, rows = [typical], [2**20 if gpu else 2**12]
        sizes = [1024 if gpu else 128]
    if "bag" in args.ops:
        yield from bag_cases(widths, rows, tokens, lookups, dtype, device, published)
    if "topk" in args.ops:
        yield from topk_cases(sizes, tokens, 4, typical // 4, 32, dtype, device)
    if "adam" in args.ops:
        yield from adam_cases(widths, rows, device)
    if "dot" in args.ops:
        yield from dot_cases(widths, rows, tokens, lookups, dtype, device)


def measure(
    case: Case,
    device: torch.device,
    device_name: str,
    ceiling: float,
    min_ms: float,
    command: str = "",
) -> Record:
    """Check a case, then time it and its rivals; a wrong one has no times."""
    work = case.build()
    error = work.check()
    # written so that NaN is wrong, too
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
    """Name and time of the first rival that runs; `failed` gets those before it, and why."""
    for rival in rivals:
        try:
            return rival.name, median_ms(rival.build(), device, min_ms)
        except Exception as error:
            failed.append(f"{rival.name}: {type(error).__name__}: {first_line(error)}")
        # what it held is free again here, outside of the handler, whose traceback holds on to it
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return "", None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


@lru_cache
def commit() -> str:
    """The commit of the checkout that runs, "+" behind it where files differ; "" outside of one."""
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
    """Bytes read plus bytes written per second by a copy several times as large as the cache."""
    size = 2**31 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / median_ms(lambda: target.copy_(source), device, 200) / 1e6


def median_ms(run: Callable[[], object], device: torch.device, min_ms: float) -> float:
    """Median time of a run; on a GPU by events, with the cache flushed before each."""
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
    # what allocating needs to round up and to keep
    return 0.85 * torch.cuda.mem_get_info(device)[0]
