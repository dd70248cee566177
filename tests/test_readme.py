"""What the README says, where it can be checked."""

import dataclasses
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from megatron.training import argument_utils

import megamem
from megamem.__main__ import COMMANDS
from megamem.config import MemoryConfig, flag
from megamem.megatron.startup.features import FEATURES
from megamem.tools import markers, support
from megamem.tools.bench_table import markdown, read_records
from megamem.tools.flag_table import flag_table, rewrite
from tests.bench import stage_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *(ROOT / "megamem").rglob("*.md"), ROOT / ".github/CONTRIBUTING.md"]
FLAGS, KERNELS = "megamem/FLAGS.md", "megamem/kernels/README.md"


def test_the_table_of_flags_is_what_the_settings_say() -> None:
    page = (ROOT / FLAGS).read_text()
    assert rewrite(page) == page, f"run: python -m megamem.tools.flag_table {FLAGS}"
    rows = flag_table().splitlines()[2:]
    assert len(rows) == len(dataclasses.fields(MemoryConfig))
    for row, field in zip(rows, dataclasses.fields(MemoryConfig), strict=True):
        assert row.startswith(f"| `{flag(field.name)}` |") and len(row.split(" | ")[-1]) > 20


def test_the_support_matrix_is_what_the_table_of_features_says() -> None:
    assert support.rewrite(README) == README, "run: python -m megamem.tools.support README.md"
    for feature in FEATURES:
        assert f"| {feature.name} |" in README
    # a refusal stands there with its reason
    assert "| refused: it has no way to leave parameters out, so it would flatten" in README


def test_the_tables_of_measurements_are_what_the_records_say() -> None:
    page = (ROOT / KERNELS).read_text()
    rewritten = stage_table.rewrite(page)
    assert rewritten == page, f"run: python -m tests.bench.stage_table {KERNELS}"
    stages = [
        row["stage"] for run in stage_table.records() for row in run["rows"] if "stage" in row
    ]
    assert len(stages) > 5 and all(stage in page for stage in stages)
    records = [
        r for path in sorted(stage_table.RESULTS.glob("*.jsonl")) for r in read_records(path)
    ]
    table = markers.rewrite(page, "bench", markdown(records).rstrip("\n"))
    command = f"python -m megamem bench --table tests/bench/results/*.jsonl --into {KERNELS}"
    assert table == page, f"run: {command}"


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
    text = "".join(page.read_text() for page in PAGES)
    for command in COMMANDS:
        assert re.search(rf"megamem(\.run| {command})\b", text), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)]*)\)", page.read_text())
    for link in links:
        path, _, place = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if place:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert place in anchors, link
    assert links or page.name in ("FLAGS.md", "CONTRIBUTING.md")


def test_the_plain_torch_of_the_readme_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    # the interpreter would take minutes
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    (code,) = [block for block in _python(README) if "TableOptimizer(" in block]
    names: dict = {}
    torch.manual_seed(1)
    exec(code, names)
    assert names["loss"] < 0.1
    assert not any(table.weight.requires_grad for table in names["pool"])


def test_the_names_of_the_readme_exist() -> None:
    blocks = _python(README)
    assert len(blocks) == 5
    imported = re.findall(r"^from megamem import (.+)$", "\n".join(blocks), re.MULTILINE)
    names = {name for line in imported for name in line.split(", ")}
    assert len(names) > 10 and names <= set(megamem.__all__)
    # releases before 0.19 have nothing to describe models with, and are told what to use instead
    of_descriptions = {"MemoryGPTModelConfig", "MemoryHybridModelConfig"}
    describes = hasattr(argument_utils, "gpt_config_from_args")
    has_bridge = find_spec("megatron.bridge") is not None
    for name in megamem.__all__:
        if name in of_descriptions and not describes:
            with pytest.raises(ImportError, match="0.19 or later.*memory_layer_spec"):
                getattr(megamem, name)
        elif name == "add_memory_layers" and not has_bridge:
            with pytest.raises(ImportError, match="need its release 0.6"):
                getattr(megamem, name)
        else:
            assert getattr(megamem, name) is not None
    with pytest.raises(AttributeError, match="has no attribute memory"):
        megamem.memory  # noqa: B018


def _python(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


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
    text = "".join(page.read_text() for page in PAGES)
    for name in re.findall(r"`(--memory-[a-z-]+)", text):
        assert name in known, name
