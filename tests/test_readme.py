"""What the README says, where it can be checked."""

import dataclasses
import json
import re
from pathlib import Path

from megamem.__main__ import COMMANDS
from megamem.config import MemoryConfig, flag
from megamem.tools import markers
from megamem.tools.bench_table import markdown, read_records
from megamem.tools.flag_table import flag_table, rewrite
from tests.bench import stage_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_table_of_flags_is_what_the_settings_say() -> None:
    assert rewrite(README) == README, "run: python -m megamem.tools.flag_table README.md"
    rows = flag_table().splitlines()[2:]
    assert len(rows) == len(dataclasses.fields(MemoryConfig))
    for row, field in zip(rows, dataclasses.fields(MemoryConfig), strict=True):
        assert row.startswith(f"| `{flag(field.name)}` |") and len(row.split(" | ")[-1]) > 20


def test_the_tables_of_measurements_are_what_the_records_say() -> None:
    rewritten = stage_table.rewrite(README)
    assert rewritten == README, "run: python -m tests.bench.stage_table README.md"
    stages = [
        row["stage"] for run in stage_table.records() for row in run["rows"] if "stage" in row
    ]
    assert len(stages) > 5 and all(stage in README for stage in stages)
    records = [
        r for path in sorted(stage_table.RESULTS.glob("*.jsonl")) for r in read_records(path)
    ]
    table = markers.rewrite(README, "bench", markdown(records).rstrip("\n"))
    command = "python -m megamem bench --table tests/bench/results/*.jsonl --into README.md"
    assert table == README, f"run: {command}"


def test_stages_are_shown_of_runs_on_a_gpu_alone(tmp_path: Path) -> None:
    """A results.json of tests/gpu.sh lists its parts; of these the stages count, and no dry run."""
    of_part = {"device": "X100", "torch": "2", "triton": "3", "commit": "c", "command": "bash"}
    rows = [{"stage": "layer forward", "ms": 4.25, "tokens": 8}, {"kernel": "k", "ms": 1.0}]
    parts = [
        {**of_part, "part": "warm", "rows": [{"job": 1}], "started": "2", "dry_run": False},
        {**of_part, "part": "stages", "rows": rows, "started": "2", "dry_run": False},
    ]
    (tmp_path / "run.json").write_text(json.dumps(parts))
    (tmp_path / "dry.json").write_text(json.dumps([{**parts[1], "dry_run": True}]))
    (found,) = stage_table.records(tmp_path)
    shown = stage_table.tables([found])
    assert "X100" in shown and "| layer forward | 4.25 |  |  |" in shown and " k " not in shown


def test_every_subcommand_is_named() -> None:
    for command in COMMANDS:
        assert re.search(rf"megamem(\.run| {command})\b", README), command


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 3
    for link in links:
        assert (ROOT / link).exists(), link


def test_every_script_that_is_named_exists() -> None:
    """In the README, in what contributors read, and in workflows."""
    pages = [ROOT / "README.md", *(ROOT / ".github").rglob("*.*")]
    named = {
        (page, path) for page in pages for path in re.findall(r"bash (\S+\.sh)", page.read_text())
    }
    assert len({path for _, path in named}) >= 5 and len({page for page, _ in named}) >= 4
    for page, path in named:
        assert (ROOT / path).exists(), f"{path}, named in {page}"
    for page in (ROOT / ".github").glob("*.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{link}, named in {page}"


def test_every_flag_named_in_the_text_exists() -> None:
    known = {flag(field.name) for field in dataclasses.fields(MemoryConfig)}
    for name in re.findall(r"`(--memory-[a-z-]+)", README):
        assert name in known, name
