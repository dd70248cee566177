"""Part: `megamem tune` at the size of a real run, into a file of its own."""

import json
import os
import subprocess
import sys
from typing import Any

from tests.gpu import report
from tests.gpu.machine import ROOT

SECONDS = {"gpu": 45, "dry run": 20}
MODEL = (
    *("--num-layers", "16", "--hidden-size", "2048", "--num-attention-heads", "16"),
    *("--seq-length", "8192", "--micro-batch-size", "1", "--vocab-size", "32000", "--bf16"),
    *("--memory-layers", "4", "8", "12", "--memory-num-keys", "1024"),
)
"""8192 tokens, 4 heads that read 32 rows each, and a million rows of width 2048."""


def run(found: report.Report) -> None:
    """Run megamem tune, and add what came of each candidate."""
    path, seconds = found.out / "tuning.json", SECONDS["dry run" if found.dry_run else "gpu"]
    path.unlink(missing_ok=True)
    words = [*MODEL, "--device", found.device.type, "--out", str(path), "--seconds", str(seconds)]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if found.dry_run else {})
    command = [sys.executable, "-m", "megamem", "tune", *words]
    log = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT
    )
    (found.out / "tune_output.log").write_text(log.stdout)
    if not path.exists():
        lines = log.stdout.strip().splitlines() or ["it said nothing"]
        found.finish(False, f"megamem tune ended with status {log.returncode}: {lines[-1]}")
        return
    measured = json.loads(path.read_text())["measured"]
    for outcome in measured:
        found.add(**outcome)
    found.finish(log.returncode == 0 and bool(measured), summary_of(measured))


def summary_of(measured: list[dict[str, Any]]) -> str:
    """What was chosen instead of a default, and what was wrong."""
    wrong = [_name(each) for each in measured if each["wrong"]]
    said = [f"{len(measured) - len(wrong)} of {len(measured)} candidates correct"]
    for chosen in (each for each in measured if each["chosen"]):
        first = next(each for each in measured if each["op"] == chosen["op"])
        if chosen is not first:
            before = "" if first["ms"] is None else f" instead of {first['ms']:.3g}"
            said.append(f"{_name(chosen)} {chosen['ms']:.3g} ms{before}")
    return "; ".join(said + [f"wrong: {', '.join(wrong)}"] * bool(wrong))


def _name(outcome: dict[str, Any]) -> str:
    numbers = (f"{name}={number}" for name, number in outcome["numbers"].items())
    return " ".join((outcome["op"], outcome["form"], *numbers))


if __name__ == "__main__":
    sys.exit(report.main("tune", run))
