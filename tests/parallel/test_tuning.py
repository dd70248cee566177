"""All ranks use the choices that rank 0 reads, whatever files the other ranks have."""

import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megamem.config import MemoryConfig
from megamem.kernels import choices
from megamem.ops import tuning
from megamem.parallel.tuning import load_tuning
from megamem.resolution import resolve
from megamem.spec import MemorySpec
from tests.helpers.distributed import run_distributed

BF16 = torch.bfloat16


def _spec(file: Path | str | None = None, topk: int = 32) -> MemorySpec:
    settings: dict[str, Any] = {"memory_layers": [0], "memory_topk": topk}
    return resolve(MemoryConfig(**settings, memory_tuning=file and str(file)), 16)


def _write(path: Path, tile: int, **sizes: Any) -> Path:
    """A file of this machine with a form and a tile that are not the default."""
    chosen = tuning.GENERAL.changed("squared_norm", tile=tile, form="triton")
    machine = tuning.this_machine(torch.device("cpu"))
    tuning.write(path, tuning.Tuning(machine, {"dtype": "bfloat16", "topk": 32, **sizes}, chosen))
    return path


@pytest.fixture(autouse=True)
def _own_choices():
    with choices.using(None):
        yield


def test_a_named_file_is_used(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.json", 512, V=64)
    said = load_tuning(_spec(path), BF16)
    expected = (
        f"megamem: kernels use the choices of {path}, measured at dtype=bfloat16 topk=32 V=64"
    )
    assert said == expected
    assert choices.current().squared_norm.tile == 512
    assert load_tuning(_spec("off"), BF16) == load_tuning(_spec(), BF16) == ""
    assert choices.current() is choices.GENERAL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 8}, "was measured for topk 8, not topk 32; run python -m megamem tune again."),
        ({"dtype": "float32"}, "was measured for dtype float32, not dtype bfloat16;"),
    ],
)
def test_a_file_for_another_run_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = _write(tmp_path / "a.json", 512, **change)
    with pytest.raises(ValueError, match=re.escape(f"--memory-tuning: {path} {message}")):
        load_tuning(_spec(path), BF16)
    assert choices.current() is choices.GENERAL


def test_a_named_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match=f"--memory-tuning: {path}: No such file"):
        load_tuning(_spec(path), BF16)
    path.write_text("{")
    with pytest.raises(ValueError, match=f"--memory-tuning: {path} is not a file of megamem tune"):
        load_tuning(_spec(path), BF16)


def _with_card(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """This machine seems to have a GPU; nothing is launched on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


def _of_card(path: Path, name: str, tile: int = 256) -> None:
    _write(path, tile)
    read = tuning.read(path)
    machine = replace(read.machine, device=name, capability=(9, 0))
    tuning.write(path, replace(read, machine=machine))


def test_the_file_of_the_card_in_the_cache_is_used_unless_it_is_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _with_card(monkeypatch, "NVIDIA A")
    _of_card(tuning.default_path("NVIDIA A"), "NVIDIA A")
    assert "tuning-nvidia-a.json" in load_tuning(_spec(), BF16)
    assert choices.current().squared_norm.tile == 256
    assert load_tuning(_spec("off"), BF16) == ""
    _with_card(monkeypatch, "NVIDIA B")
    assert load_tuning(_spec(), BF16) == ""


@pytest.mark.parametrize("broken", [True, False])
def test_a_file_in_the_cache_that_cannot_be_used_is_ignored_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _with_card(monkeypatch, "NVIDIA A")
    path = tuning.default_path("NVIDIA A")
    _of_card(path, "NVIDIA OTHER")
    if broken:
        path.write_text("{")
    with caplog.at_level(logging.WARNING, "megamem"):
        assert load_tuning(_spec(), BF16) == ""
    (said,) = caplog.messages
    why = "is not a file of megamem tune" if broken else "with NVIDIA OTHER, not with NVIDIA A;"
    assert said.startswith(f"the tuning file is ignored: {path}") and why in said


def _ranks_read_different_files(folder: str) -> None:
    """Rank 1 has another file under the same name, as in the cache folder of another host."""
    rank = dist.get_rank()
    os.chdir(Path(folder) / str(rank))
    said = load_tuning(_spec("tuning.json"), BF16)
    assert said.startswith("megamem: kernels use the choices of tuning.json")
    assert choices.current().squared_norm.tile == 512
    # rank 1 alone has a file that is broken, which nobody reads
    if rank == 1:
        Path("tuning.json").write_text("{")
    dist.barrier()
    load_tuning(_spec("tuning.json"), BF16)
    # a file that rank 0 cannot use is refused on all ranks, before one of them waits for another
    if rank == 0:
        Path("tuning.json").write_text("{")
    dist.barrier()
    with pytest.raises(ValueError, match="tuning.json is not a file of megamem tune"):
        load_tuning(_spec("tuning.json"), BF16)


def _ranks_differ(folder: str) -> None:
    """Ranks with different cards, and then with different forms of ops."""
    rank, real = dist.get_rank(), tuning.this_machine
    path = Path(folder) / "0" / "tuning.json"
    with pytest.MonkeyPatch.context() as patch:
        card = {"device": "NVIDIA A", "capability": (9, 0)}
        machine = replace(real(torch.device("cpu")), **(card if rank else {}))
        patch.setattr(tuning, "this_machine", lambda _: machine)
        message = "holds for one kind of GPU, but rank 0 has cpu and rank 1 has NVIDIA A"
        with pytest.raises(ValueError, match=message):
            load_tuning(_spec(path), BF16)
        assert load_tuning(_spec(), BF16) == ""
        assert choices._of_process is choices.GENERAL
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGAMEM_FORMS", "squared_norm=triton" if rank else "")
        message = "it selects nothing on rank 0 and squared_norm=triton on rank 1; set it alike"
        with pytest.raises(ValueError, match=message):
            load_tuning(_spec(path), BF16)


@pytest.mark.gloo
@pytest.mark.parametrize("check", [_ranks_read_different_files, _ranks_differ])
def test_two_ranks_agree(tmp_path: Path, check: Any) -> None:
    for rank, tile in enumerate((512, 1024)):
        _write(tmp_path / str(rank) / "tuning.json", tile)
    run_distributed(check, 2, str(tmp_path))
