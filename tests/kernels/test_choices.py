"""The table of choices: what its numbers are, and which of them a kernel uses."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megamem.kernels import (
    choices,
    embedding_bag,
    row_adam,
    row_gradient,
    sort_lookups,
    squared_norm,
)
from megamem.kernels.choices import DEFAULTS, GENERAL, OPS, Choices
from megamem.ops import AdamOptions, forms
from megamem.tools import known_answers

# an op of known answers -> the kernel whose choices it uses
KERNEL_OF = {"squared_norm": "squared_norm", "product_topk": "product_topk"}
KERNEL_OF |= dict.fromkeys(("adamw_", "rowwise_adamw_", "sgd_"), "row_adam")
RECORD = Path(__file__).parents[2] / "tests/bench/results/h100-a4677c2-stages.json"


def _numbers(chosen: Choices) -> dict[tuple[str, str], int]:
    return {(op, n): x for op in OPS for n, x in asdict(getattr(chosen, op)).items()}


def test_every_number_but_one_is_a_power_of_two() -> None:
    for chosen in (GENERAL, *DEFAULTS.values()):
        for name, number in _numbers(chosen).items():
            assert number > 0
            assert number & (number - 1) == 0 or name == ("product_topk", "fused_stages")


def test_what_differs_from_the_general_choices_was_measured_and_faster() -> None:
    records: list[dict[str, Any]] = json.loads(RECORD.read_text())["choices"]
    for capability, chosen in DEFAULTS.items():
        general = _numbers(GENERAL)
        differs = {key: x for key, x in _numbers(chosen).items() if x != general[key]}
        if forms.FORMS["product_topk"]["fused"].record is None:
            # numbers of a form that is not a default on any GPU
            differs = {key: x for key, x in differs.items() if not key[1].startswith("fused_")}
        backed = {}
        for record in records:
            if record["capability"] == list(capability) and record["right"]:
                assert record["ms"] < record["general_ms"]
                backed |= {(record["op"], n): x for n, x in record["choice"].items()}
        assert differs.items() <= backed.items()
        assert not chosen.forms, "a form that is the default on a GPU stands in megamem.ops.forms"


def test_other_cards_and_the_cpu_use_the_general_choices() -> None:
    assert choices.of_capability((8, 0)) is choices.of_capability((12, 0)) is GENERAL
    assert choices.of_capability((9, 0)) is DEFAULTS[9, 0]
    if not torch.cuda.is_available():
        assert choices.current() is GENERAL


def test_what_a_process_was_told_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    told = GENERAL.changed("squared_norm", tile=512, form="triton")
    assert told.squared_norm.tile == 512 and told.squared_norm.rows == GENERAL.squared_norm.rows
    assert not GENERAL.forms
    with choices.using(told):
        assert choices.current() is told
        with choices.using(None):
            assert choices.current() is not told
        assert choices.current() is told
        assert forms.pick("squared_norm") == "triton"
        assert forms.pick("squared_norm", otherwise="torch") == "triton"
        monkeypatch.setenv(forms.ENVIRONMENT, "squared_norm=torch")
        assert forms.pick("squared_norm") == "torch"
        monkeypatch.delenv(forms.ENVIRONMENT)
    assert choices.current() is not told and forms.pick("squared_norm") == "torch"


def test_a_block_that_raises_leaves_no_choices_behind() -> None:
    before = choices.current()
    with pytest.raises(ZeroDivisionError), choices.using(GENERAL.changed("squared_norm", rows=8)):
        raise ZeroDivisionError
    assert choices.current() is before


class Recorder:
    """Takes the place of a kernel, and keeps the keywords of its launches."""

    def __init__(self) -> None:
        self.launched: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **given: self.launched.append({"grid": grid, **given})

    def seen(self, *names: str) -> list[tuple[Any, ...]]:
        return [tuple(each[name] for name in names) for each in self.launched]


def test_the_norm_is_launched_with_its_choices(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(squared_norm, "_squared_norm_kernel", recorder := Recorder())
    grads = torch.zeros(64, 512, device=device)
    for told in ({}, {"rows": 16, "tile": 1024, "max_block_v": 256, "num_warps": 8}):
        with choices.using(GENERAL.changed("squared_norm", **told)):
            squared_norm.squared_norm(grads, None)
    seen = recorder.seen("grid", "BLOCK_R", "BLOCK_V", "num_warps")
    assert seen == [((1,), 4, 512, 4), ((4,), 4, 256, 8)]


def test_a_bag_is_launched_with_its_choices(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(embedding_bag, "_bag_kernel", recorder := Recorder())
    table, ids = torch.zeros(4, 2048, device=device), torch.zeros(6, dtype=torch.int64)
    lookups = (ids.to(device), torch.ones(6, device=device), torch.tensor([0, 6], device=device))
    for told in ({}, {"max_block_v": 512, "unroll": 4, "compact_block": 2}):
        with choices.using(GENERAL.changed("embedding_bag", **told)):
            embedding_bag.sum_bags(table, *lookups)
    seen = recorder.seen("grid", "BLOCK_V", "UNROLL")
    assert seen == [((1, 2), 1024, 8), ((1, 4), 512, 4)]


def test_the_row_gradient_is_launched_with_its_choices(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    recorders = {name: Recorder() for name in ("_row_pass", "_merge", "_unsort", "_mark")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(row_gradient, f"{name}_kernel", recorder)
    table, ids = torch.zeros(4, 2048, device=device), torch.zeros(3000, dtype=torch.int32)
    weights, bags = torch.ones(3000, device=device), torch.tensor([0, 3000], device=device)
    lookups = sort_lookups.sort_by_torch(ids.to(device), weights, bags, 4)
    touched = torch.zeros(4, dtype=torch.bool, device=device)
    told = {"max_block_v": 512, "unroll": 2, "merge_tile": 16, "block_m": 512}
    told |= {"target_chunks": 8, "min_chunk": 64, "max_chunk": 128}
    for each in ({}, told):
        with choices.using(GENERAL.changed("row_gradient", **each)):
            row_gradient.row_gradient(lookups, table[:1], table, table, None, True, touched)
    names = ("grid", "chunk", "MIN_CHUNK", "BLOCK_V")
    assert recorders["_row_pass"].seen(*names, "UNROLL", "num_warps") == [
        ((94, 8), 32, 32, 256, 4, 1),
        ((24, 4), 128, 64, 512, 2, 1),
    ]
    assert recorders["_merge"].seen(*names, "TILE") == [
        ((94, 8), 32, 32, 256, 8),
        ((24, 4), 128, 64, 512, 16),
    ]
    assert recorders["_unsort"].seen("grid", "BLOCK_M") == [((12, 1), 256), ((6, 1), 512)]
    assert recorders["_mark"].seen("grid", "BLOCK_M") == [((12,), 256), ((6,), 512)]


def test_the_sort_is_launched_with_its_choices(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    for name in ("_count_kernel", "_scatter_kernel"):
        monkeypatch.setattr(sort_lookups, name, recorder := Recorder())
    ids = torch.zeros(5000, dtype=torch.int32, device=device)
    lookups = (ids, ids.float(), torch.tensor([0, 5000], device=device), 2**20)
    for told in ({}, {"radix": 32, "tile": 512, "max_programs": 4, "num_warps": 2}):
        with choices.using(GENERAL.changed("sort_lookups", **told)):
            sort_lookups.sort_by_radix(*lookups)
    seen = recorder.seen("grid", "NUM_DIGITS", "TILE", "num_warps")
    assert seen == [((3,), 1024, 2048, 8)] * 2 + [((4,), 32, 512, 2)] * 4


def test_a_step_is_launched_with_its_choices(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """A step on every row with a moment per row has numbers of its own."""
    monkeypatch.setattr(row_adam, "_update_kernel", recorder := Recorder())
    table = torch.zeros(8, 2048, device=device)
    full, by_row = torch.zeros_like(table), torch.zeros(8, device=device)
    rows = torch.arange(8, device=device)
    options = vars(AdamOptions(step=1, lr=1e-3))
    told = GENERAL.changed("row_adam", tile=512, max_block_v=256, num_warps=8)
    for chosen in (GENERAL, DEFAULTS[9, 0], told):
        with choices.using(chosen):
            row_adam.update_rows_(table, table, None, full, **options)
            row_adam.update_rows_(table, table, None, by_row, **options)
            row_adam.update_rows_(table, table, None, by_row, rows, **options)
    general, of_told = ((8,), 1, 1024, 4), ((4,), 2, 256, 8)
    assert recorder.seen("grid", "BLOCK_R", "BLOCK_V", "num_warps") == [
        *(general, general, general),
        *(general, ((8,), 1, 2048, 4), general),
        *(of_told, ((8,), 1, 1024, 8), of_told),
    ]


# a minute for each card, so one of them is in the quick tests
@pytest.mark.parametrize(
    "capability",
    [
        pytest.param(capability, marks=[pytest.mark.slow] if place else [])
        for place, capability in enumerate(DEFAULTS)
    ],
)
def test_the_choices_of_a_card_give_the_known_answers(
    device: str, capability: tuple[int, int]
) -> None:
    differ = {op for op in OPS if getattr(DEFAULTS[capability], op) != getattr(GENERAL, op)}
    answers = [answer for answer in known_answers.ANSWERS if KERNEL_OF.get(answer.op) in differ]
    assert len(answers) >= len(differ)
    with choices.using(DEFAULTS[capability]):
        outcomes = known_answers.run(torch.device(device), 4096, answers=answers)
    assert [outcome.wrong for outcome in outcomes] == [None] * len(answers)
