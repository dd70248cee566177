"""Part: runs the tests that are marked gpu.

Tests that need ten GB or more run one after the other in a separate process, as several at once
would not fit. In a dry run no test is marked gpu, so it runs other tests instead.
"""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.gpu import report
from tests.gpu.machine import ROOT

LARGE = ("tests/ops/test_large_tables.py", "tests/kernels/test_known_answers.py")
# matches files that may have tests marked gpu; tests/conftest.py marks those with a device argument
USES_A_DEVICE = re.compile(r"def \w+\([^)]*\bdevice\b|\bDEVICES\b|mark\.gpu\b")
DRY_RUN = ("tests/reference/test_placement.py", "tests/reference/test_philox.py")
# each worker needs some hundred MB of GPU memory besides its tensors
MOST_WORKERS = 8
NO_TESTS = 5


@dataclass(frozen=True)
class Counts:
    """The results in a JUnit XML file."""

    passed: int
    skipped: int
    failed: dict[str, str]
    """Test -> the first line of its error."""

    @classmethod
    def read(cls, path: Path) -> "Counts":
        """Read a JUnit XML file."""
        passed = skipped = 0
        failed = {}
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            found = {child.tag: child for child in case}
            bad = found.get("failure", found.get("error"))
            if bad is not None:
                name = f"{case.get('classname')}::{case.get('name')}".removeprefix("::")
                why = bad.get("message") or bad.text or ""
                failed[name] = (why.strip().splitlines() or [""])[0][:300]
            elif "skipped" in found:
                skipped += 1
            else:
                passed += 1
        return cls(passed, skipped, failed)


def files() -> list[str]:
    """The test files that may have tests marked gpu; others need not be imported."""
    found = (ROOT / "tests").rglob("test_*.py")
    return sorted(
        str(path.relative_to(ROOT)) for path in found if USES_A_DEVICE.search(path.read_text())
    )


def workers() -> int:
    """The number of processes for pytest-xdist; 0 if it is not installed."""
    if importlib.util.find_spec("xdist") is None:
        return 0
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)) // 2)


def run(found: report.Report) -> None:
    """Run pytest -m gpu, and count passed, failed and skipped tests."""
    parallel = ["-n", str(workers())] if workers() > 1 else []
    if found.dry_run:
        groups = {"other tests": [*DRY_RUN, "-m", "not slow and not gpu"]}
    else:
        small = [name for name in files() if name not in LARGE]
        groups = {"gpu": [*small, "-m", "gpu", *parallel], "large": [*LARGE, "-m", "gpu"]}
    running = {name: _start(found, name, words) for name, words in groups.items()}
    problems, counts = [], []
    for name, process in running.items():
        status = process.wait()
        path = _xml(found, name)
        if not path.exists():
            problems.append(
                f"pytest of group {name} ended with status {status} and no report; see the log"
            )
            continue
        counts.append(Counts.read(path))
        found.add(group=name, status=status, passed=counts[-1].passed, skipped=counts[-1].skipped)
        for test, why in counts[-1].failed.items():
            found.add(failed=test, why=why)
        if status == NO_TESTS or (status == 0 and not counts[-1].passed):
            problems.append(f"pytest of group {name} ran no test")
        elif status and not counts[-1].failed:
            problems.append(f"pytest of group {name} ended with status {status}; see the log")
    failed = {test: why for one in counts for test, why in one.failed.items()}
    summary = f"{sum(c.passed for c in counts)} passed, {len(failed)} failed"
    if skipped := sum(c.skipped for c in counts):
        summary += f", {skipped} skipped"
    if found.dry_run:
        summary += " (other tests, which need no GPU)"
    shown = [*problems, *(f"{test}: {why}" for test, why in failed.items())][:3]
    found.finish(not problems and not failed, "; ".join([summary, *shown]))


def _xml(found: report.Report, name: str) -> Path:
    return found.out / f"tests {name}.xml"


def _start(found: report.Report, name: str, words: list[str]) -> subprocess.Popen:
    path = _xml(found, name)
    path.unlink(missing_ok=True)
    # a file that cannot be imported counts as failed, and the others still run
    options = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=short")
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={path}", *words]
    return subprocess.Popen(command, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(report.main("tests", run))
