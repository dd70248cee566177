"""Records of the benchmark, as a table in a terminal and in Markdown."""

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from rich.table import Table


@dataclass(frozen=True)
class Record:
    """One measured case, as --json writes it."""

    device: str
    op: str
    shape: dict[str, int]
    dtype: str
    distribution: str
    ms: float
    bytes: int
    gbps: float
    ceiling_gbps: float
    fraction: float
    baseline: str
    baseline_ms: float | None
    speedup: float | None
    published_ms: float | None
    error: float
    commit: str
    command: str
    # records of earlier commits do not have the following fields
    failures: tuple[str, ...] = ()
    """Rivals that raised an exception, with the exception."""
    torch: str = ""
    triton: str = ""
    """The versions of torch and Triton."""


def read_records(path: Path) -> list[Record]:
    """The records of a --json file.

    Raises:
        ValueError: a line is not a record, or the file is empty.
    """
    known = {field.name for field in fields(Record)}
    needed = {field.name for field in fields(Record) if field.default is MISSING}
    records = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if not isinstance(record, dict) or not needed <= set(record) <= known:
            raise ValueError(f"{line[:60]!r} is not a record")
        record["failures"] = tuple(record.get("failures", ()))
        records.append(Record(**record))
    if not records:
        raise ValueError("the file is empty")
    return records


HEADINGS = (
    *("op", "shape", "dtype", "rows picked"),
    *("ms", "MB", "GB/s", "% of copy", "torch ms", "speed-up", "published ms"),
)


def cells(record: Record) -> tuple[str, ...]:
    """The cells of a row of the table, under HEADINGS."""
    r = record
    wide = " (fp32)" if r.baseline.endswith("in fp32") else ""
    return (
        r.op,
        numbers(r.shape),
        r.dtype,
        r.distribution,
        f"{r.ms:.3f}",
        f"{r.bytes / 1e6:.1f}",
        f"{r.gbps:.1f}",
        f"{100 * r.fraction:.0f}",
        "" if r.baseline_ms is None else f"{r.baseline_ms:.3f}{wide}",
        "" if r.speedup is None else f"{r.speedup:.1f}x",
        "" if r.published_ms is None else f"{r.published_ms:.3f}",
    )


def rich_table(records: list[Record]) -> Table:
    """The table for a terminal."""
    table = Table(box=None)
    for n, title in enumerate(HEADINGS):
        table.add_column(title, justify="left" if n < 4 else "right", no_wrap=True)
    for record in records:
        table.add_row(*cells(record))
    return table


def failures(records: list[Record]) -> list[str]:
    """A sentence for each exception of a rival, with the cases in which it was raised."""
    cases: dict[str, list[str]] = {}
    for record in records:
        for failure in record.failures:
            cases.setdefault(failure, []).append(f"{record.op} {numbers(record.shape)}")
    return [f"{failure} (in {', '.join(dict.fromkeys(of))})" for failure, of in cases.items()]


def markdown(records: list[Record]) -> str:
    """A Markdown table for each run, under a line with device, commit and command.

    Columns that are empty in all records of a run are left out.
    """
    runs: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        runs.setdefault((r.device, r.commit, r.command, r.torch, r.triton), []).append(r)
    return "\n".join(_run(found) for found in runs.values())


def _run(records: list[Record]) -> str:
    first = records[0]
    versions = "".join(
        f", {name} {version}"
        for name, version in (("torch", first.torch), ("Triton", first.triton))
        if version
    )
    rows = [cells(record) for record in records]
    used = [n for n in range(len(HEADINGS)) if any(row[n] for row in rows)]
    lines = [
        f"{first.device}, a large copy {first.ceiling_gbps:.0f} GB/s{versions}; commit "
        f"{first.commit}; `{first.command}`",
        "",
        "| " + " | ".join(HEADINGS[n] for n in used) + " |",
        "|" + "".join("---|" if n < 4 else "---:|" for n in used),
    ]
    lines += ["| " + " | ".join(row[n] for n in used) + " |" for row in rows]
    lines += ["", *(f"Not compared: {failure}." for failure in failures(records))]
    return "\n".join(lines) + ("\n" if lines[-1] else "")


def numbers(shape: dict[str, int]) -> str:
    """A shape as text, such as "T=8192 L=128"."""
    return " ".join(f"{letter}={number}" for letter, number in shape.items())
