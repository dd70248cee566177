"""`megamem tune`: measures which block sizes and forms of the kernels are fastest on this GPU.

    python -m megamem tune "<the command line of a training run>"
    python -m megamem tune --preset 1.3b --memory-num-keys 1024

For each op it puts known answers through every candidate, at the sizes of the run, and then times
the candidates that are right, as the mean over lookups that are uniform and skewed (Zipf 1.0). It
writes the fastest to a file in the user's cache folder, which runs on this kind of GPU read from
then on (--memory-tuning). It takes about a minute.

A candidate that fails, does not compile or gives a wrong answer is named, and never chosen. A form
that has no record of a run on a GPU is not the default, but it can be chosen here, as it has then
run on yours. Choices change results by rounding only: the order of sums, and which of two sub-keys
is read whose scores are equal up to rounding.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from os import sched_getaffinity
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from triton import knobs

from megamem import __version__
from megamem.config import ConfigurationError
from megamem.errors import complain
from megamem.ops import forms, tuning
from megamem.ops.tuning import Choices, Tuning
from megamem.tools import command_line, known_answers, plan
from megamem.tools.bench import commit, first_line, median_ms
from megamem.tools.tune_ops import TUNED, Candidate, Run, Sizes, TunedOp

WRONG_DEFAULT = 1
"""Exit status if a default is wrong."""
GAIN = 0.02
"""Share of the time by which a candidate must be faster than the default to be chosen."""
GPU_MS, CPU_MS = 40, 1
"""Milliseconds for each timed call."""
COMPILING_SCALE = 64
"""The sizes of known answers are divided by this number where kernels are only compiled."""
WORKERS = 8
"""The most processes that compile."""


@dataclass
class Outcome:
    """What came of one candidate."""

    candidate: Candidate
    wrong: str = ""
    """Why it must not be used; empty if it gave the known answers."""
    ms: float | None = None
    """Mean time of the timed calls; None if it was not timed."""
    times: dict[str, float] = field(default_factory=dict)
    """Each call -> its median in ms."""
    chosen: bool = False

    def record(self) -> dict[str, Any]:
        """The outcome as it stands in the file."""
        found = asdict(self)
        return {"op": found["candidate"].pop("op"), **found.pop("candidate"), **found}


def add_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add the flags of `megamem tune`, the --memory-* flags and Megatron's."""
    add = parser.add_argument
    add("command", nargs="?", help="the command line of a training run, in quotes")
    add("--device", help="cuda, cuda:1, or cpu for Triton's interpreter (default: cuda)")
    add("--out", metavar="FILE", help="the file to write (default: in the user's cache folder)")
    seconds = "seconds after which nothing more is measured (default: %(default)g)"
    add("--seconds", type=float, default=55, help=seconds)
    without = "candidates that are not tried, each as OP=NAME, in quotes if the name has spaces"
    add("--without", nargs="+", default=[], metavar="OP=NAME", help=without)
    pasted = [flag for word in words for flag in flags_of(word)]
    plan.add_model_flags(parser, pasted)
    # the planner asks for these, and nothing here depends on them
    parser.set_defaults(gpu="h100", fill=1.0)
    parser.set_defaults(parsed=lambda: parser.parse_args(pasted))


def flags_of(word: str) -> list[str]:
    """The flags of a training script, if the word is a command line; else the word itself.

    The ranks that torchrun is told are of no account: what one rank does is measured.
    """
    return command_line.read([word]).flags if command_line.is_command(word) else [word]


def run(args: argparse.Namespace) -> int:
    """Measure the candidates and write the choices; return the exit status."""
    started = time.monotonic()
    args = args.parsed()
    device = _device(args)
    sizes, out = _sizes(args, device), _out(args, device)
    console = Console(width=None if sys.stdout.isatty() else 160)
    with tuning.using(None):
        search = Search(sizes, device, started + args.seconds, set(args.without))
        outcomes = search.run(TUNED, console)
    tuning.write(
        out,
        Tuning(
            tuning.this_machine(device),
            asdict(sizes),
            search.chosen,
            f"{__version__} {commit()}".strip(),
            [outcome.record() for outcome in outcomes],
        ),
    )
    console.print(_table(outcomes))
    for name in search.not_tried:
        console.print(f"not tried, as --seconds {args.seconds:g} were over: {name}")
    status = 0
    for outcome in outcomes:
        if outcome.wrong:
            name = f"{outcome.candidate.op}: {outcome.candidate.name}"
            console.print(f"never chosen: {name}: {outcome.wrong}", soft_wrap=True)
    for name in search.wrong_defaults:
        complain(f"the default of {name} is wrong on this machine; run python -m megamem doctor")
        status = WRONG_DEFAULT
    console.print(
        f"Written to {out}. Choices change results by rounding only: the order of sums, and which "
        "of two sub-keys is read whose scores are equal up to rounding.",
        soft_wrap=True,
    )
    return status


def _device(args: argparse.Namespace) -> torch.device:
    name = args.device or "cuda"
    device = torch.device(name)
    if device.type == "cpu":
        if not knobs.runtime.interpret:
            raise ConfigurationError(
                "--device cpu runs the kernels in Triton's interpreter; set TRITON_INTERPRET=1, or "
                "run megamem tune on a machine with a GPU."
            )
    elif not torch.cuda.is_available():
        raise ConfigurationError(
            f"--device {name}: this machine has no GPU to measure; run megamem tune on one that "
            "has, or try it with TRITON_INTERPRET=1 and --device cpu."
        )
    if selected := forms.selected():
        listed = ",".join(f"{op}={form}" for op, form in selected.items())
        raise ConfigurationError(
            f"{forms.ENVIRONMENT}={listed} comes before every choice that is measured here; unset "
            "it."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _sizes(args: argparse.Namespace, device: torch.device) -> Sizes:
    if not args.bf16:
        raise ConfigurationError(
            "megamem tune measures models in bf16, in which the known answers are; add --bf16."
        )
    sizes = Sizes.of(plan.job_from_args(args))
    if device.type == "cpu":
        return sizes.of_interpreter()
    return sizes.that_fit(torch.cuda.mem_get_info(device)[0])


def _out(args: argparse.Namespace, device: torch.device) -> Path:
    if args.out:
        return Path(args.out)
    if device.type == "cpu":
        raise ConfigurationError(
            "--device cpu measures nothing that a run should use; add --out FILE."
        )
    return tuning.default_path(torch.cuda.get_device_name(device))


class Search:
    """Finds the fastest candidate of each op that gives the known answers."""

    def __init__(
        self,
        sizes: Sizes,
        device: torch.device,
        end: float,
        without: set[str],
    ) -> None:
        """Start from the choices for this card.

        Args:
            sizes: the sizes of the calls.
            device: where they run.
            end: the time, as of time.monotonic(), after which nothing more is measured.
            without: candidates that are not tried, as OP=NAME.
        """
        self.sizes, self.device, self.end, self.without = sizes, device, end, without
        self.chosen: Choices = tuning.current()
        self.not_tried: list[str] = []
        self.wrong_defaults: list[str] = []

    def run(self, tuned: Sequence[TunedOp], console: Console) -> list[Outcome]:
        """Measure every op, and put the fastest candidates into `chosen`; return all outcomes."""
        found: list[Outcome] = []
        # a run with Tucker scores has no product_topk
        tuned = [op for op in tuned if op.candidates(self.sizes, self.chosen)]
        with Progress(console=console, transient=True) as progress:
            jobs = [(op, c) for op in tuned for c in op.candidates(self.sizes, self.chosen)]
            task = progress.add_task("compiling", total=len(jobs))
            if self.device.type == "cuda":
                self._compile(jobs)

            def say(candidate: Candidate) -> None:
                progress.update(task, advance=1, description=f"{candidate.op}: {candidate.name}")

            for op in tuned:
                outcomes = list(self._measure(op, say))
                self._choose(op, outcomes)
                found += outcomes
        return found

    def _compile(self, jobs: list[tuple[TunedOp, Candidate]]) -> None:
        """Compile the kernels of all candidates into Triton's cache, in several processes.

        Whatever fails there fails again where the candidate is checked, and is named there.
        """
        workers = min(WORKERS, len(jobs), len(sched_getaffinity(0)))
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        names = [(op.name, candidate) for op, candidate in jobs]
        try:
            futures = [
                pool.submit(_compile_one, name, candidate, self.sizes, str(self.device))
                for name, candidate in names
            ]
            wait(futures, max(0.0, self.end - time.monotonic()))
        except BrokenProcessPool:
            pass
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _measure(self, op: TunedOp, say: Callable[[Candidate], None]) -> Iterator[Outcome]:
        """The outcome of each candidate; those of one form share the inputs of the timed calls."""
        form = ""
        runs: list[tuple[str, Run]] = []
        for candidate in op.candidates(self.sizes, self.chosen):
            say(candidate)
            name = f"{op.name}={candidate.name}"
            if name in self.without:
                continue
            if time.monotonic() > self.end:
                self.not_tried.append(name)
                continue
            with tuning.using(candidate.choose(self.chosen)):
                answers = op.answers(self.sizes, candidate.form)
                outcome = Outcome(candidate, self._wrong(answers))
                try:
                    if not outcome.wrong:
                        if candidate.form != form:
                            runs.clear()
                            self._free()
                            runs, form = list(op.runs(self.sizes, self.device)), candidate.form
                        self._time(outcome, runs)
                except Exception as error:
                    outcome.wrong = f"it fails: {type(error).__name__}: {first_line(error)}"
            self._check_device(name, outcome)
            yield outcome
        runs.clear()
        self._free()

    def _wrong(self, answers: list[known_answers.KnownAnswer]) -> str:
        """What is wrong with the first known answer that is not correct; empty if all are."""
        for answer in answers:
            (outcome,) = known_answers.run(self.device, answers=[answer])
            if said := outcome.wrong or outcome.skipped:
                return f"{answer.name}: {said}"
        return ""

    def _time(self, outcome: Outcome, runs: list[tuple[str, Run]]) -> None:
        min_ms = GPU_MS if self.device.type == "cuda" else CPU_MS
        for name, call in runs:
            outcome.times[name] = median_ms(call, self.device, min_ms)
        outcome.ms = sum(outcome.times.values()) / len(runs)

    def _check_device(self, name: str, outcome: Outcome) -> None:
        """Stop if a candidate has left the GPU in a state in which nothing runs any more."""
        if self.device.type != "cuda" or not outcome.wrong:
            return
        try:
            torch.cuda.synchronize(self.device)
        except Exception as error:
            raise ConfigurationError(
                f"{name} ended this process's use of the GPU ({outcome.wrong}); nothing was "
                f"written. Run the command again with --without '{name}'."
            ) from error

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _choose(self, op: TunedOp, outcomes: list[Outcome]) -> None:
        """Mark the fastest; it replaces the default if it is faster by more than the noise."""
        default = op.candidates(self.sizes, self.chosen)[0]
        presents = [outcome for outcome in outcomes if outcome.candidate == default]
        if any(outcome.wrong for outcome in presents):
            self.wrong_defaults.append(op.name)
        times = {n: o.ms for n, o in enumerate(outcomes) if not o.wrong and o.ms is not None}
        if not times:
            return
        best = outcomes[min(times, key=lambda n: times[n])]
        for present in presents:
            if not present.wrong and min(times.values()) > (1 - GAIN) * times[0]:
                best = present
        best.chosen = True
        if best.candidate != default:
            self.chosen = best.candidate.choose(self.chosen)


def _compile_one(name: str, candidate: Candidate, sizes: Sizes, device: str) -> None:
    """In a process of its own: launch the kernels of a candidate on few tokens or rows."""
    (op,) = (each for each in TUNED if each.name == name)
    with tuning.using(candidate.choose(tuning.current())):
        for answer in op.answers(sizes, candidate.form):
            answer.check(torch.device(device), COMPILING_SCALE)


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(box=None)
    for title, justify in (("op", "left"), ("candidate", "left"), ("ms", "right"), ("", "left")):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for outcome in outcomes:
        ms = "wrong" if outcome.wrong else f"{outcome.ms:.4g}"
        said = "chosen" if outcome.chosen else ""
        table.add_row(outcome.candidate.op, outcome.candidate.name, ms, said)
    return table
