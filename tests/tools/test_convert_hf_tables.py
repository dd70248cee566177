"""Tables of exported models: in host memory, on disk, quantised, and without unread rows."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megamem.tools.convert.hf.code import modeling_megamem
from megamem.tools.convert.hf.code.configuration_megamem import MegamemConfig
from megamem.tools.convert.hf.code.modeling_megamem import MegamemForCausalLM
from megamem.tools.convert.hf.folder import CODE_FILES

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
    model = MegamemForCausalLM(MegamemConfig(**SIZES, **fields))
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
