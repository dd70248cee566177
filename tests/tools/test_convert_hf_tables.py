"""Tables of exported models: in host memory, on disk, quantised, and without unread rows."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from megamem.config import ConfigurationError
from megamem.tools.convert.hf import tables
from megamem.tools.convert.hf.code import modeling_megamem
from megamem.tools.convert.hf.code.configuration_megamem import MegamemConfig
from megamem.tools.convert.hf.code.modeling_megamem import MegamemForCausalLM
from megamem.tools.convert.hf.folder import CODE_FILES
from megamem.tools.convert.hf.settings import config_obstacles
from megamem.tools.convert.lazy import LazyTensor, Region, of_tensor
from megamem.tools.convert.safetensors import read_folder, write_file, write_folder

CODE = Path(modeling_megamem.__file__).parent
TOKENS = torch.arange(60).view(3, 20) * 7 % 32
SIZES = {
    **{"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 32, "vocab_size": 32},
    **{"num_attention_heads": 4, "memory_layers": [0, 2], "memory_num_keys": 16},
    **{"memory_topk": 4, "memory_value_dim": 64, "memory_key_dim": 32, "memory_heads": 2},
}


def _folder(where: Path, **fields: Any) -> Path:
    """A random model, as an export writes it, in several files."""
    torch.manual_seed(5)
    model = MegamemForCausalLM(MegamemConfig(**(SIZES | fields)))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    model.save_pretrained(where, max_shard_size="50KB")
    config = json.loads((where / "config.json").read_text())
    modules = ("configuration_megamem.MegamemConfig", "modeling_megamem.MegamemForCausalLM")
    names = dict(zip(("AutoConfig", "AutoModelForCausalLM"), modules, strict=True))
    (where / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    for name in CODE_FILES:
        shutil.copyfile(CODE / name, where / name)
    return where


def _loaded(folder: Path, **how: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **{"dtype": "auto"} | how
    )


ULTRAMEM = {
    **{"memory_variant": "ultramem-v2", "memory_pool": "layer", "memory_pre_value_dim": 16},
    **{"memory_final_topk": 6, "memory_tucker_rank": 2, "memory_cores": 2, "memory_expansion": 4},
    **{"memory_share_layers": 2, "memory_rank_queries": True, "memory_keep_ffn": True},
}


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_tables_of_ultramem_elsewhere(place: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path, **ULTRAMEM)
    model = _loaded(folder)
    assert {name: [*x.weight.shape] for name, x in model.model.tables["layer_0"].items()} == {
        "v": [512, 64],
        "p": [512, 16],
    }
    there = _loaded(folder, memory_table_device=place)
    assert _logits(there).equal(_logits(model))
    for table in model.model.tables["layer_0"].values():
        before = _logits(model)
        with torch.no_grad():
            table.weight.mul_(2)
        assert not _logits(model).allclose(before)


def test_ultramem_of_transformers_trains(tmp_path: Path) -> None:
    """Also with recomputation, and where a memory is added behind a later layer."""
    how = ULTRAMEM | {"memory_variant": "ultramem", "memory_pre_value_dim": 0, "memory_skip": 1}
    how |= {"memory_layers": [0], "memory_share_layers": 1, "memory_expansion_proj": "block"}
    model = _loaded(_folder(tmp_path, **how)).train()
    found = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        found.append({name: x.grad.clone() for name, x in model.named_parameters()})
    for name, grad in found[0].items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(found[1][name], grad)


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
@pytest.mark.parametrize(
    "form", [{}, {"memory_variant": "peer"}, {"memory_pool": "layer", "memory_variant": "memory"}]
)
def test_a_table_in_host_memory_or_on_disk_says_the_same(
    form: dict[str, Any], dtype: Any, tmp_path: Path
) -> None:
    folder = _folder(tmp_path, **form)
    plain = _loaded(folder, dtype=dtype)
    tables = [name for name, _ in plain.named_parameters() if ".tables." in name]
    assert tables
    for place in ("cpu", "disk"):
        model = _loaded(folder, dtype=dtype, memory_table_device=place)
        assert _logits(model).equal(_logits(plain))
        assert _logits(copy.deepcopy(model)).equal(_logits(plain))
        held = {name for name, _ in model.named_parameters() if ".tables." in name}
        assert held == (set(tables) if place == "cpu" else set())
        # rounded with the model
        assert _logits(model.bfloat16()).equal(_logits(_loaded(folder, dtype=dtype).bfloat16()))
        # another device than the CPU is not there, so the one without numbers stands for it
        model.to("meta")
        where = {name: x.device.type for name, x in model.named_parameters()}
        assert {where.pop(name) for name in held} <= {"cpu"} and {*where.values()} == {"meta"}


def test_rows_are_read_once_and_copied_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _loaded(_folder(tmp_path), memory_table_device="cpu")
    table = model.model.tables["shared"]["v"]
    copies: list[torch.Tensor] = []
    taken = type(table)._taken

    def note(self: Any, kind: str, rows: torch.Tensor, home: torch.device) -> torch.Tensor:
        copies.append(rows)
        return taken(self, kind, rows, home)

    monkeypatch.setattr(type(table), "_taken", note)
    model(TOKENS)
    assert len(copies) == len(SIZES["memory_layers"])
    for rows in copies:
        assert len(rows) == len(rows.unique()) < TOKENS.numel() * 8


def test_a_table_in_host_memory_is_trained(tmp_path: Path) -> None:
    folder, found = _folder(tmp_path), []
    for place in ("cuda", "cpu"):
        model = _loaded(folder, memory_table_device=place)
        model(TOKENS, labels=TOKENS).loss.backward()
        found.append(model.model.tables["shared"]["v"].weight.grad)
    assert found[0].abs().sum() > 0 and found[0].allclose(found[1], atol=1e-6)


def test_what_a_table_on_disk_cannot_do_is_said(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model")
    with pytest.raises(ValueError, match='memory_table_device="cpu" to save it'):
        _loaded(folder, memory_table_device="disk").save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(ValueError, match="loaded with from_pretrained"):
        MegamemForCausalLM(MegamemConfig(**SIZES, memory_table_device="disk"))
    with pytest.raises(ValueError, match="memory_table_device is gpu; use one of cuda, cpu, disk"):
        MegamemConfig(memory_table_device="gpu")
    with pytest.raises(ValueError, match="memory_table_dtype is int2; use one of None, int8"):
        MegamemConfig(memory_table_dtype="int2")
    model = _loaded(folder, memory_table_device="disk")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"has tables\.shared\.v\.weight; copy or download"):
        model(TOKENS)


# a table in fp32, quantised one row after the other, as the format says it
def _plainly(row: torch.Tensor, kind: str) -> torch.Tensor:
    largest = {"int8": 127, "fp8": 448, "int4": 7}[kind]
    scale = row.abs().max() / largest
    if not scale:
        return row
    if kind == "fp8":
        return (row / scale).to(torch.float8_e4m3fn).float() * scale
    return (row / scale).round() * scale


def _rows(count: int, width: int) -> torch.Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    rows[3], rows[7] = 0, rows[7] * 1e-9
    return rows


def _written(folder: Path, tensors: dict[str, LazyTensor]) -> dict[str, torch.Tensor]:
    write_file(folder / "x.safetensors", tensors, {}, lambda _: None)
    return load_file(folder / "x.safetensors")


SLICES = (
    [Region((0, 0), (30, 16)), Region((30, 0), (34, 16))],
    [Region((0, 0), (64, 8)), Region((0, 8), (64, 8))],
)


def _table(values: torch.Tensor, regions: list[Region], order: torch.Tensor | None) -> LazyTensor:
    """A table in a checkpoint, whose rows are placed in some order."""
    target = None if order is None else order.__getitem__
    shape = (values.shape[0], values.shape[1])
    return LazyTensor(shape, values.dtype, (*regions,), lambda r: values[r.slices], target)


@pytest.mark.parametrize("regions", SLICES, ids=["rows", "columns"])
@pytest.mark.parametrize("kind", tables.KINDS)
def test_rows_are_quantised(
    kind: str, regions: list[Region], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "REGION_BYTES", 700)
    values, order = _rows(64, 16), torch.randperm(64)
    found = _written(tmp_path, tables.quantised(_table(values, regions, order), kind))
    numbers = modeling_megamem.unpacked(found["weight"], kind) * found["scale"]
    wanted = torch.stack([_plainly(row, kind) for row in values])
    assert numbers[order].allclose(wanted, rtol=1e-6, atol=0)
    bits = {"int8": 8, "fp8": 8, "int4": 4}[kind]
    assert found["weight"].nbytes == 64 * 16 * bits // 8 and found["scale"].nbytes == 64 * 4
    values[5, 2] = float("nan")
    with pytest.raises(ConfigurationError, match=f"NaN or infinity, which --table-dtype {kind}"):
        _written(tmp_path, tables.quantised(_table(values, regions, order), kind))


@pytest.mark.parametrize("regions", SLICES, ids=["rows", "columns"])
def test_rows_that_were_never_read_are_left_out(
    regions: list[Region], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "REGION_BYTES", 700)
    values, order = _rows(64, 16), torch.randperm(64)
    counts = torch.randint(3, (64,))
    # a region without any row
    counts[:30] = 0
    table = _table(values, regions, order)
    kept = tables.without_unread("shared", table, counts)
    found = _written(tmp_path, kept.tensors)
    assert found["weight"].shape == (kept.rows, 16) and kept.rows == (counts > 0).sum()
    for row, pair in enumerate(order.tolist()):
        place = int(found["row_of"][pair])
        assert (place >= 0) == (counts[row] > 0)
        assert place < 0 or found["weight"][place].equal(values[row])
    with pytest.raises(ConfigurationError, match="no row of the table shared has been read"):
        tables.without_unread("shared", table, torch.zeros(64, dtype=torch.int32))


@pytest.mark.parametrize("variant", ["memory+", "peer"])
@pytest.mark.parametrize("kind", [None, *tables.KINDS])
def test_a_model_reads_quantised_rows_and_lacks_some(
    variant: str, kind: str | None, tmp_path: Path
) -> None:
    """The same model, with what its table holds as numbers, says the same."""
    folder = _folder(tmp_path / "plain", memory_variant=variant)
    weights = read_folder(folder)[0]
    config = json.loads((folder / "config.json").read_text())
    smaller, plain, rows = {}, {}, {}
    for name, weight in weights.items():
        smaller[name] = of_tensor(weight)
        plain[name] = smaller[name]
        if ".tables." not in name:
            continue
        prefix = name.removesuffix("weight")
        counts = torch.arange(len(weight)) % 3
        kept = tables.without_unread(name, smaller.pop(name), counts)
        quantised = tables.quantised(kept.tensors["weight"], kind) if kind else {}
        smaller |= {prefix + key: x for key, x in (kept.tensors | quantised).items()}
        rows[prefix.removeprefix("model.tables.")[:-1]] = kept.rows
        numbers = [_plainly(row, kind) if kind else row for row in weight]
        plain[name] = of_tensor(torch.stack(numbers) * (counts > 0)[:, None])
    for what, tensors in (("plain", plain), ("smaller", smaller)):
        if what == "smaller":
            shutil.copytree(folder, tmp_path / what)
            config |= {"memory_table_rows": rows, "memory_table_dtype": kind}
            (tmp_path / what / "config.json").write_text(json.dumps(config))
        for file in (tmp_path / what).glob("*.safetensors*"):
            file.unlink()
        write_folder(tmp_path / what, tensors, {"format": "pt"}, 10**9, lambda _: None)
    wanted = _logits(_loaded(folder))
    for place in ("cuda", "disk"):
        model = _loaded(tmp_path / "smaller", memory_table_device=place)
        assert (_logits(model) - wanted).abs().max() < 1e-5
    # the numbers and their scales are not rounded with the model, and are saved
    model = _loaded(tmp_path / "smaller", memory_table_device="cpu").bfloat16().float()
    model.save_pretrained(tmp_path / "again")
    again, was = (read_folder(tmp_path / what)[0] for what in ("again", "smaller"))
    for name in was:
        if ".tables." in name and (kind or "row_of" in name):
            assert again[name].view(torch.uint8).equal(was[name].view(torch.uint8)), name


@pytest.mark.slow
@pytest.mark.parametrize(("place", "status"), [("disk", 0), ("copied", 1)])
def test_a_table_twenty_times_larger_than_memory(place: str, status: int, tmp_path: Path) -> None:
    """It is exported and read on disk; a copy in memory does not fit. Takes a minute:

    pytest -m slow tests/tools/test_convert_hf_tables.py
    """
    words = [sys.executable, "-m", "tests.tools.large_table", str(tmp_path), place]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == status, ran.stderr
    assert status == 0 or "allocate" in ran.stderr


def test_a_convolution_before_the_query_is_not_exported() -> None:
    said = config_obstacles({"query_conv": 3})
    assert len(said) == 1 and "--memory-query-conv 3" in said[0]
    assert config_obstacles({"query_conv": 0}) == config_obstacles({}) == []
