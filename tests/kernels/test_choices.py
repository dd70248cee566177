"""The table of choices: what its numbers are, and which of them a kernel uses."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megamem.kernels import choices
from megamem.kernels import squared_norm as kernels
from megamem.kernels.choices import DEFAULTS, GENERAL, OPS, Choices
from megamem.ops import forms

RECORD = Path(__file__).parents[2] / "tests/bench/results/h100-a4677c2-stages.json"


def _numbers(chosen: Choices) -> dict[tuple[str, str], int]:
    return {(op, n): x for op in OPS for n, x in asdict(getattr(chosen, op)).items()}


def test_every_number_is_a_power_of_two() -> None:
    for chosen in (GENERAL, *DEFAULTS.values()):
        for name, number in _numbers(chosen).items():
            assert number > 0 and number & (number - 1) == 0, name


def test_what_differs_from_the_general_choices_was_measured_and_faster() -> None:
    records: list[dict[str, Any]] = json.loads(RECORD.read_text())["choices"]
    for capability, chosen in DEFAULTS.items():
        general = _numbers(GENERAL)
        differs = {key: x for key, x in _numbers(chosen).items() if x != general[key]}
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


def test_the_kernel_is_launched_with_the_choices(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    launched: list[dict[str, Any]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, **given: launched.append({"grid": grid, **given})

    monkeypatch.setattr(kernels, "_squared_norm_kernel", Recorder())
    grads = torch.zeros(64, 512, device=device)
    for told in ({}, {"rows": 16, "tile": 1024, "max_block_v": 256, "num_warps": 8}):
        with choices.using(GENERAL.changed("squared_norm", **told)):
            kernels.squared_norm(grads, None)
    seen = [
        (each["grid"], each["BLOCK_R"], each["BLOCK_V"], each["num_warps"]) for each in launched
    ]
    assert seen == [((1,), 4, 512, 4), ((4,), 4, 256, 8)]
