"""The command behind `bash tests/gpu.sh`."""

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from tests.gpu import machine
from tests.gpu.parts import PARTS, Part, chosen
from tests.gpu.runner import Outcome, Runner
from tests.gpu.table import table

USER_ERROR = 2
SECONDS = 230.0
# time limits are multiplied by this on a CPU, on which the dry run takes longer
CPU_PATIENCE = 8.0
# characters at the end of each log that are kept
MOST_OF_A_LOG = 200_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests and measurements that need a GPU; without a GPU, run them dry on the CPU."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        for part in PARTS:
            sys.stdout.write(f"{part.name:<9}{part.says}\n")
        return 0
    # torch reads it when it is imported
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # this folder gets thousands of files that are not needed afterwards
    with TemporaryDirectory(prefix="megamem-gpu-", ignore_cleanup_errors=True) as work:
        try:
            parts = chosen(options.parts)
            path = _python_path(Path(work))
        except ValueError as error:
            sys.stderr.write(f"gpu.sh: error: {error}\n")
            return USER_ERROR
        if lacking := machine.missing(("torch", "triton")):
            sys.stderr.write(
                f"gpu.sh: error: {sys.executable} has no {' and no '.join(lacking)}; set "
                "MEGAMEM_PYTHON to a Python that has both\n"
            )
            return USER_ERROR
        _say_what_is_missing(parts)
        on_gpu = _has_gpu()
        patience = 1.0 if on_gpu else CPU_PATIENCE
        words = sys.argv[1:] if argv is None else argv
        command = shlex.join(("bash", "tests/gpu.sh", *words))
        runner = Runner(
            work=Path(work),
            scale=options.scale or (1 if on_gpu else 64),
            deadline=time.monotonic() + (options.seconds or SECONDS * patience),
            patience=patience,
            dry_run=not on_gpu,
            environment={"PYTHONPATH": path, "MEGAMEM_GPU_COMMAND": command},
        )
        return _run(runner, parts, options.out.resolve(), asked=bool(options.parts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bash tests/gpu.sh", description=main.__doc__)
    which = "the parts to run, as listed by --list (default: all)"
    parser.add_argument("parts", nargs="*", metavar="PART", help=which)
    parser.add_argument("--list", action="store_true", help="list the parts and exit")
    cpu = "make a dry run on the CPU, even if there is a GPU"
    parser.add_argument("--cpu", action="store_true", help=cpu)
    scale = "divide all sizes by this number (default: 1 on a GPU, 64 on a CPU)"
    parser.add_argument("--scale", type=int, help=scale)
    parser.add_argument(
        "--seconds",
        type=float,
        default=float(os.environ.get("MEGAMEM_GPU_SECONDS", 0)) or None,
        help=f"time limit of all parts together (default: MEGAMEM_GPU_SECONDS, or {SECONDS:.0f})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or "runs/gpu"),
        help="folder for results.json, table.txt and logs.txt (default: OUT, or runs/gpu)",
    )
    return parser


def _python_path(work: Path) -> str:
    """PYTHONPATH for the parts; the contents of wheels are added to this process's path, too.

    Raises:
        ValueError: the folder of MEGAMEM_WHEELS has no wheels.
    """
    added = []
    if wheels := os.environ.get("MEGAMEM_WHEELS"):
        target = work / "site"
        machine.unpack_wheels(Path(wheels), target)
        added.append(target)
        sys.path.append(str(target))
    return machine.python_path(added)


def _say_what_is_missing(parts: list[Part]) -> None:
    """Print the packages that parts need and that are missing, before anything is started."""
    by_package: dict[str, list[str]] = {}
    for part in parts:
        for package in machine.missing((*part.needs, *part.wants)):
            by_package.setdefault(package, []).append(part.name)
    if not by_package:
        return
    lacking = "; ".join(f"{package} (for {' '.join(n)})" for package, n in by_package.items())
    sys.stdout.write(
        f"missing packages: {lacking}. Download their wheels into the folder of MEGAMEM_WHEELS "
        f"with pip download --no-deps -d FOLDER {' '.join(by_package)}\n"
    )
    sys.stdout.flush()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _run(runner: Runner, parts: list[Part], out: Path, asked: bool) -> int:
    """Run the parts, and write the results of each as soon as it has ended."""

    def stop(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    outcomes: list[Outcome] = []
    out.mkdir(parents=True, exist_ok=True)
    try:
        for outcome in runner.run(parts):
            outcomes.append(outcome)
            _write(outcomes, out, runner)
            line = f"{outcome.part.name}: {outcome.verdict}, {outcome.seconds:.0f} s"
            sys.stdout.write(f"{line}; {outcome.summary}\n")
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write("interrupted\n")
    finally:
        signal.signal(signal.SIGTERM, before)
    reached = {outcome.part.name for outcome in outcomes}
    outcomes += [Outcome(p, "not reached: interrupted") for p in parts if p.name not in reached]
    outcomes.sort(key=lambda outcome: parts.index(outcome.part))
    shown = _write(outcomes, out, runner)
    sys.stdout.write(f"\n{shown}\n{out / 'results.json'}\n")
    # a part that was named on the command line must not be skipped
    bad = [o for o in outcomes if o.failed or (asked and o.verdict == "skipped")]
    return 1 if bad else 0


def _write(outcomes: list[Outcome], out: Path, runner: Runner) -> str:
    """Write results.json, table.txt and logs.txt; return the table.

    They are few files, as some machines return only a few. Each of them marks a dry run.
    """
    shown = table(outcomes, runner.scale if runner.dry_run else None)
    records = [
        {
            **o.content,
            "part": o.part.name,
            "verdict": o.verdict,
            "wall_seconds": round(o.seconds, 1),
            "dry_run": runner.dry_run,
        }
        for o in outcomes
    ]
    (out / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    (out / "table.txt").write_text(shown + "\n")
    with (out / "logs.txt").open("w") as file:
        for log in sorted(runner.work.rglob("*.log")):
            end = log.read_text(errors="replace")[-MOST_OF_A_LOG:]
            file.write(f"===== {log.relative_to(runner.work).with_suffix('')}\n{end}\n")
    return shown


if __name__ == "__main__":
    sys.exit(main())
