"""The file of `megamem tune`: it comes back as it was written; what is wrong with it is named."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamem.ops import tuning
from megamem.ops.tuning import GENERAL, Machine, OtherMachineError, Tuning

H100 = Machine("NVIDIA H100 80GB HBM3", (9, 0), "2.11.0+cu130", "3.6.0", "0123456789ab")


def a_tuning(machine: Machine = H100, **sizes: Any) -> Tuning:
    """A file's contents in which something is not as it is by default."""
    return Tuning(
        machine,
        {"dtype": "bfloat16", "topk": 32, **sizes},
        GENERAL.changed("squared_norm", tile=512, form="triton"),
        "0.1.0 abc",
        [{"op": "squared_norm", "candidate": "triton", "ms": 2.7, "chosen": True}],
    )


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tuning.json"
    for written in (a_tuning(), a_tuning(replace(H100, triton="3.7.0"))):
        tuning.write(path, written)
        assert tuning.read(path, written.machine) == tuning.read(path) == written
    assert [each.name for each in path.parent.iterdir()] == ["tuning.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "tuning.json"
    tuning.write(path, a_tuning())

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tuning.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tuning.write(path, a_tuning(topk=8))
    assert tuning.read(path) == a_tuning()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "NVIDIA A100"}, "NVIDIA H100 80GB HBM3, not with NVIDIA A100"),
        ({"capability": (8, 0)}, "compute capability 9.0, not with compute capability 8.0"),
        ({"torch": "2.15.0"}, "torch 2.11.0+cu130, not with torch 2.15.0"),
        ({"triton": "3.7.0"}, "triton 3.6.0, not with triton 3.7.0"),
        ({"kernels": "ba9876543210"}, "kernels 0123456789ab, not with kernels ba9876543210"),
    ],
)
def test_a_file_of_another_machine_names_both(tmp_path: Path, change: dict, words: str) -> None:
    path = tmp_path / "tuning.json"
    tuning.write(path, a_tuning())
    with pytest.raises(OtherMachineError, match=re.escape(f"{path} was measured with {words}")):
        tuning.read(path, replace(H100, **change))


def _edited(path: Path, edit: Any) -> None:
    tuning.write(path, a_tuning())
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda c: c.pop("machine"), "it lacks 'machine'"),
        (lambda c: c["machine"].pop("triton"), "it lacks 'triton'"),
        (lambda c: c.update(format=7), "its format is 7, and this megamem reads 1"),
        (lambda c: c["choices"].pop("forms"), "it lacks 'forms'"),
        (lambda c: c["choices"].update(fast={}), "there are no numbers of an op 'fast'"),
        (lambda c: c["choices"]["squared_norm"].update(x=1), "squared_norm has no number 'x'"),
        (lambda c: c["choices"]["squared_norm"].update(tile=3), "squared_norm.tile is 3, "),
        (lambda c: c["choices"]["squared_norm"].update(tile=True), "squared_norm.tile is True, "),
        (lambda c: c["choices"]["squared_norm"].update(tile=-4), "squared_norm.tile is -4, "),
        (lambda c: c["choices"]["squared_norm"].update(tile=2.0), "squared_norm.tile is 2.0, "),
        (lambda c: c["choices"].update(forms={"squared_norm": "x"}), "there is no form 'x' of"),
        (lambda c: c["choices"].update(forms={"x": "torch"}), "there is no form 'torch' of 'x'"),
    ],
)
def test_a_broken_file_is_described_in_one_line(tmp_path: Path, edit: Any, why: str) -> None:
    path = tmp_path / "tuning.json"
    _edited(path, edit)
    message = re.escape(f"is not a file of megamem tune ({why}")
    with pytest.raises(ValueError, match=message) as said:
        tuning.read(path, H100)
    assert "\n" not in str(said.value) and str(path) in str(said.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1, "machine": 3}', "\x00\xff"])
def test_what_is_no_such_file_is_described_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="is not a file of megamem tune") as said:
        tuning.read(path)
    assert "\n" not in str(said.value)


def test_kernels_of_another_release_come_before_numbers_that_are_unknown(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    _edited(path, lambda c: c["choices"].update(later={"tile": 4}))
    with pytest.raises(OtherMachineError):
        tuning.read(path, replace(H100, kernels="ba9876543210"))


def test_the_default_file_is_that_of_the_card(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.default_path("NVIDIA H100 80GB HBM3") == (
        tmp_path / "megamem/tuning-nvidia-h100-80gb-hbm3.json"
    )
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert tuning.default_path("x") == Path("/home/someone/.cache/megamem/tuning-x.json")


def test_this_machine_without_a_gpu() -> None:
    machine = tuning.this_machine(torch.device("cpu"))
    assert (machine.device, machine.capability) == ("cpu", (0, 0))
    assert machine.torch == torch.__version__ and len(machine.kernels) == 12
