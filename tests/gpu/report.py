"""The results of a part in a JSON file, written row by row, so that an interruption loses none."""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tests.gpu import machine

UNFINISHED = "was not finished"


class Report:
    """The results of one part, written to OUT/PART.json after every change.

    Keys of the file: part, ok, skipped (why the part did not run, or ""), summary (the main numbers
    in one line), rows, seconds, scale, started, command, and facts about the machine.
    """

    def __init__(self, part: str, out: Path, scale: int) -> None:
        self.part, self.out, self.scale = part, out, scale
        self.rows: list[dict[str, Any]] = []
        self.ok, self.skipped, self.summary = False, "", UNFINISHED
        self._facts = machine.facts()
        self._started, self._clock = datetime.now(UTC), time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        self._write()

    @property
    def device(self) -> torch.device:
        """The GPU, or the CPU of a dry run."""
        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def dry_run(self) -> bool:
        """Whether the part runs on a CPU."""
        return self._facts["dry_run"]

    def divided(self, size: int, least: int = 1) -> int:
        """A size of a real run, divided by the scale, but not below `least`."""
        return max(min(size, least), size // self.scale)

    def add(self, **row: Any) -> None:
        """Add a row, and print it for the log."""
        self.rows.append(row)
        if self.summary.startswith(UNFINISHED):
            self.summary = f"{UNFINISHED}; {len(self.rows)} rows so far"
        sys.stdout.write(f"{json.dumps(row)}\n")
        sys.stdout.flush()
        self._write()

    def finish(self, ok: bool, summary: str) -> None:
        """Set the result of the part."""
        self.ok, self.summary = ok, summary
        self._write()

    def skip(self, why: str) -> None:
        """Mark the part as skipped, which is not a pass."""
        self.ok, self.skipped, self.summary = False, why, why
        self._write()

    def _write(self) -> None:
        content = {
            "part": self.part,
            "ok": self.ok,
            "skipped": self.skipped,
            "summary": self.summary,
            "rows": self.rows,
            "seconds": round(time.monotonic() - self._clock, 2),
            "scale": self.scale,
            "started": self._started.isoformat(timespec="seconds"),
            "command": os.environ.get("MEGAMEM_GPU_COMMAND", " ".join(sys.argv)),
            **self._facts,
        }
        # replaced as a whole, as the runner may read the file after it has killed this process
        path = self.out / f"{self.part}.json"
        path.with_suffix(".part").write_text(json.dumps(content, indent=1))
        path.with_suffix(".part").replace(path)


def main(part: str, run: Callable[[Report], None], argv: Sequence[str] | None = None) -> int:
    """Run `python -m tests.gpu.PART`; return 0 if the part passed or was skipped, else 1."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.gpu.{part}", description=run.__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu/parts"), help="folder for PART.json"
    )
    scale = "divide all sizes by this number (default: 1 on a GPU, 64 on a CPU)"
    parser.add_argument("--scale", type=int, help=scale)
    options = parser.parse_args(argv)
    scale = options.scale or (1 if torch.cuda.is_available() else 64)
    report = Report(part, options.out.resolve(), scale)
    try:
        run(report)
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        report.finish(False, f"{type(error).__name__}: {first}"[:300])
    sys.stdout.write(f"{part}: {report.summary}\n")
    return 0 if report.ok or report.skipped else 1
