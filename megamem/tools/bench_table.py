"""What the benchmark found, and how it looks: in a terminal, in a file, in the README."""

import json
from dataclasses import dataclass, fields
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


def read_records(path: Path) -> list[Record]:
    """The records of a --json file.

    Raises:
        ValueError: a line is not such a record, or there is none.
    """
    known = {field.name for field in fields(Record)}
    records = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if not isinstance(record, dict) or set(record) != known:
            raise ValueError(f"{line[:60]!r} is not one")
        records.append(Record(**record))
    if not records:
        raise ValueError("it is empty")
    return records


HEADINGS = (
    *("op", "shape", "dtype", "rows picked"),
    *("ms", "MB", "GB/s", "% of copy", "torch ms", "speed-up", "published ms"),
)


def cells(record: Record) -> tuple[str, ...]:
    """A line of the table, under HEADINGS."""
    r = record
    return (
        r.op,
        numbers(r.shape),
        r.dtype,
        r.distribution,
        f"{r.ms:.3f}",
        f"{r.bytes / 1e6:.1f}",
        f"{r.gbps:.1f}",
        f"{100 * r.fraction:.0f}",
        "" if r.baseline_ms is None else f"{r.baseline_ms:.3f}",
        "" if r.speedup is None else f"{r.speedup:.1f}x",
        "" if r.published_ms is None else f"{r.published_ms:.3f}",
    )


def rich_table(records: list[Record]) -> Table:
    table = Table(box=None)
    for n, title in enumerate(HEADINGS):
        table.add_column(title, justify="left" if n < 4 else "right", no_wrap=True)
    for record in records:
        table.add_row(*cells(record))
    return table


def markdown(records: list[Record]) -> str:
    """The README's table: what was measured, and on what, at which commit, by which command."""
    first = records[0]
    lines = [
        f"{first.device}, a large copy {first.ceiling_gbps:.0f} GB/s; commit {first.commit}; "
        f"`{first.command}`",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * 4 + "---:|" * (len(HEADINGS) - 4),
    ]
    lines += ["| " + " | ".join(cells(record)) + " |" for record in records]
    return "\n".join(lines) + "\n"


def numbers(shape: dict[str, int]) -> str:
    """T=8192 L=128"""
    return " ".join(f"{letter}={number}" for letter, number in shape.items())
