"""What the README says, where it can be checked."""

import dataclasses
import re
from pathlib import Path

from megamem.__main__ import COMMANDS
from megamem.config import MemoryConfig, flag
from megamem.tools.flag_table import flag_table, rewrite

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_table_of_flags_is_what_the_settings_say() -> None:
    assert rewrite(README) == README, "run: python -m megamem.tools.flag_table README.md"
    rows = flag_table().splitlines()[2:]
    assert len(rows) == len(dataclasses.fields(MemoryConfig))
    for row, field in zip(rows, dataclasses.fields(MemoryConfig), strict=True):
        assert row.startswith(f"| `{flag(field.name)}` |") and len(row.split(" | ")[-1]) > 20


def test_every_subcommand_is_named() -> None:
    for command in COMMANDS:
        assert re.search(rf"megamem(\.run| {command})\b", README), command


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 3
    for link in links:
        assert (ROOT / link).exists(), link


def test_every_flag_named_in_the_text_exists() -> None:
    known = {flag(field.name) for field in dataclasses.fields(MemoryConfig)}
    for name in re.findall(r"`(--memory-[a-z-]+)", README):
        assert name in known, name
