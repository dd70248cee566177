"""Part: time every op of `megamem bench` at one real size, compared with torch, and with the
published kernels if PUBLISHED names a checkout of facebookresearch/memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.gpu import report
from tests.gpu.machine import ROOT

MIN_MS = {"gpu": 50, "dry run": 1}


def run(found: report.Report) -> None:
    """Run megamem bench --quick, and add its records as soon as they are written."""
    path = found.out / "bench.jsonl"
    path.unlink(missing_ok=True)
    min_ms = MIN_MS["dry run" if found.dry_run else "gpu"]
    words = ["--quick", "--min-ms", str(min_ms), "--json", str(path)]
    if (published := os.environ.get("PUBLISHED")) and not found.dry_run:
        words += ["--published", published]
    command = [sys.executable, "-m", "megamem", "bench", *words]
    said = found.out / "bench_output.log"
    with said.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    read = 0
    while True:
        try:
            status: int | None = process.wait(1.0)
        except subprocess.TimeoutExpired:
            status = None
        records = _records(path)
        for record in records[read:]:
            found.add(**record)
        read = len(records)
        if status is not None:
            break
    problems = _problems(said.read_text())
    summary = f"{read} cases correct"
    if status != 0 and not problems:
        problems = [f"megamem bench ended with status {status}; see the log"]
    elif not problems and not found.dry_run:
        summary += f"; {_slowest(found.rows)}"
    found.finish(status == 0 and read > 0 and not problems, "; ".join([summary, *problems]))


def _problems(said: str) -> list[str]:
    """The lines about errors and about cases that were skipped for lack of memory."""
    marks = ("megamem: error: ", "skipped: ")
    return [line.strip() for line in said.splitlines() if line.strip().startswith(marks)]


def _records(path: Path) -> list[dict[str, Any]]:
    """The records in the complete lines of a file that may still grow."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]


def _slowest(rows: list[dict[str, Any]]) -> str:
    """A sentence about the rival that is faster by the largest factor, if one is."""
    behind = []
    for row in rows:
        for rival in ("baseline_ms", "published_ms"):
            if row.get(rival) and row[rival] < row["ms"]:
                behind.append((row["ms"] / row[rival], row["op"], row["distribution"], rival))
    if not behind:
        return "no rival is faster"
    ratio, op, distribution, rival = max(behind)
    name = "the published kernel" if rival == "published_ms" else "torch"
    return (
        f"rivals are faster in {len(behind)} cases, at most {name} by {ratio:.2f}x in {op}, "
        f"{distribution}"
    )


if __name__ == "__main__":
    sys.exit(report.main("bench", run))
