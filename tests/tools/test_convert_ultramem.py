"""Checkpoints of the released code of UltraMem and UltraMemV2, converted and loaded by Megatron."""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from megamem.checkpoint import SAVED, placement_key, table_key
from megamem.config import ConfigurationError, MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.layers.variants import pool_of
from megamem.resolution import resolve
from megamem.saved_settings import take_settings
from megamem.spec import MemorySpec
from megamem.tools.convert.reference import Converted
from megamem.tools.convert.released import convert_released
from megamem.tools.convert.released_file import Released, read_released
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.commands import command
from tests.helpers.megatron_runs import run_training
from tests.tools import corpus
from tests.tools.released_model import Sizes, loss_of, memory_of, random_checkpoint

main = command("convert")
FLAGS = re.compile(r"--load (\S+) (--num-layers .*)")
V1 = Sizes()
V2 = Sizes(second=True, way="full", memory_heads=1, share=1 / 4, expansion=1)
KINDS: dict[str, tuple[Sizes, dict[str, Any]]] = {
    "v1": (V1, {}),
    "v1, one block": (replace(V1, expansion=1, memory_heads=1), {"seed": 3}),
    "v2": (V2, {"seed": 3}),
    "v2, expanded": (replace(V2, expansion=2), {}),
    "v2, every memory reads all rows": (replace(V2, share=1, expansion=2), {}),
    "v2, copies": (replace(V2, share=1, expansion=2), {"separate_tables": True}),
    "v2, copies of a half": (replace(V2, share=0.5), {"separate_tables": True}),
    "v2, two queries of four": (replace(V2, own_queries=True, memory_heads=2), {}),
    "v2, four queries": (replace(V2, own_queries=True), {"queries": "ranks"}),
}


def _released(sizes: Sizes, **config: Any) -> Released:
    return Released(sizes.config() | config, random_checkpoint(sizes))


def layer_of(
    converted: Converted, layer: int, dtype: torch.dtype = torch.float64
) -> tuple[MemoryLayer, MemorySpec]:
    """A memory layer with its tables, from a converted checkpoint and its settings alone."""
    args = argparse.Namespace(**vars(MemoryConfig()))
    take_settings(args, {SAVED: converted.settings}, "it")
    # the released code adds no loss of its own
    config = replace(MemoryConfig.from_args(args), memory_core_aux_weight=0)
    spec = resolve(config, converted.settings["hidden_size"])
    pool = MemoryPool(spec, pool_of(layer, spec), dtype=dtype)
    found = MemoryLayer(spec, pool, layer=layer, dtype=dtype)
    prefix = f"decoder.layers.{layer}.mlp.memory."
    tensors = {name: tensor.whole() for name, tensor in converted.tensors.items()}
    found.load_state_dict(
        {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    )
    for table in pool:
        weight, placement = tensors[table_key(table.name)], tensors[placement_key(table.name)]
        table.load_state_dict({"weight": weight, "placement": placement})
    return found, spec


@pytest.mark.parametrize("kind", KINDS)
def test_memories_compute_what_the_released_ones_do(kind: str) -> None:
    """Forward and backward, in float64."""
    sizes, how = KINDS[kind]
    source = _released(sizes)
    weights = {name: x.double() for name, x in source.weights.items()}
    number = len(sizes.spans) - 1
    layer, spec = layer_of(convert_released(source, **how), sizes.spans[number][0])
    shares = len(sizes.spans) if kind == "v2, every memory reads all rows" else 1
    assert spec.share_layers == shares
    assert spec.placement == ("stored" if sizes.expansion > 1 else "seed")
    x = torch.randn(9, sizes.hidden, dtype=torch.float64, requires_grad=True)
    keys = weights[f"transformer.mem_blocks.{number}.keys"].requires_grad_()
    core = weights[f"transformer.mem_blocks.{number}.tucker_core.1"].requires_grad_()
    truth = memory_of(weights, sizes, number, x, how.get("queries") == "ranks")
    mine = layer(x[:, None])[:, 0]
    torch.testing.assert_close(mine, truth)
    assert truth.std() > 0.1
    grad = torch.randn_like(truth)
    wanted = torch.autograd.grad(truth, [x, keys, core], grad)
    found = torch.autograd.grad(mine, [x, layer.keys.sub_keys, layer.keys.cores], grad)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1].permute(1, 0, 2, 4, 3))
    torch.testing.assert_close(found[2][1], wanted[2])


def save(source: Released, folder: Path) -> Path:
    """Write a folder as the released code does."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": source.model}))
    torch.save(source.weights, folder / "model.pt")
    return folder


def loss_after(
    capsys: pytest.CaptureFixture, target: Path, data: Path, ranks: int, *flags: object
) -> float:
    """The first loss of Megatron's loop on a converted checkpoint, with the flags printed."""
    said = " ".join(capsys.readouterr().out.split())
    advice = FLAGS.search(said)
    assert advice is not None, said
    assert advice[1] == str(target)
    log = run_training(
        "converted",
        ranks,
        *("--load", advice[1], *advice[2].split(), "--train-iters", 1, *flags),
        data=("--data-path", data, "--split", "100,0,0", "--eval-iters", 0),
    )
    assert "successfully loaded checkpoint" in log.stdout
    return log.losses[0]


MODELS = {
    "v1": (V1, 1),
    "v2": (replace(V2, share=1, expansion=2, own_queries=True), 2),
}


@pytest.mark.gloo
@pytest.mark.parametrize("kind", MODELS)
def test_megatron_computes_what_the_released_model_does(
    tmp_path: Path, capsys: pytest.CaptureFixture, kind: str
) -> None:
    sizes, ranks = MODELS[kind]
    source = _released(sizes)
    data, tokens = corpus.build(tmp_path, sizes.vocabulary)
    truth = loss_of(source.weights, sizes, tokens)
    folder, target = save(source, tmp_path / "source"), tmp_path / "converted"
    assert main(["ultramem", str(folder), "--to", str(target)]) == 0
    loss = loss_after(capsys, target, data, ranks, "--tensor-model-parallel-size", ranks)
    assert loss == pytest.approx(truth, rel=2e-6)


@pytest.mark.parametrize("kind", ["v1", "v1, one block", "v2, every memory reads all rows"])
def test_it_goes_out_and_in_again(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Rows with several pairs of sub-keys stay as they are placed; others come in pairs' order."""
    sizes, _ = KINDS[kind]
    there, out, back = (tmp_path / name for name in ("there", "out", "back"))
    seed = ("--memory-placement-seed", "7")
    folder = save(_released(sizes), tmp_path / "source")
    assert main(["ultramem", str(folder), "--to", str(there), *seed]) == 0
    assert main(["export", str(there), "--to", str(out)]) == 0
    assert main(["import", str(out), "--to", str(back), *seed]) == 0
    was, found = (saved_tensors(path / "release") for path in (there, back))
    assert was.keys() == found.keys()
    assert all(tensor.equal(found[key]) for key, tensor in was.items())
    if sizes.expansion > 1:
        words = ["import", str(out), "--to", str(tmp_path / "other")]
        assert main([*words, "--memory-placement-seed", "8"]) == 2
        assert "--memory-placement-seed 8 differs from 7" in capsys.readouterr().err


def _without(name: str) -> dict[str, Tensor]:
    found = random_checkpoint(V1)
    del found[name]
    return found


REFUSED = {
    "norm": (
        Released(V1.config() | {"layer_norm_type": "default"}, {}),
        "layer_norm_type: default",
    ),
    "clip": (Released(V1.config() | {"clip_qkv": 8}, {}), "clip_qkv: 8, which a GPT of Megatron"),
    "lacks": (
        Released(V1.config(), _without("transformer.blocks.1.ff_out.weight")),
        "lacks transformer.blocks.1.ff_out.weight",
    ),
    "more": (
        Released(V1.config(), random_checkpoint(V1) | {"transformer.wpe.weight": torch.ones(2)}),
        "has transformer.wpe.weight, which no released model",
    ),
    "no memories": (Released(V1.config(), random_checkpoint(replace(V1, way="0:0"))), "lacks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_models_are_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, message = REFUSED[case]
    if case == "no memories":
        dense = {n: x for n, x in source.weights.items() if ".mem_blocks." not in n}
        source, message = replace(source, weights=dense), "has no transformer.mem_blocks"
    folder = save(source, tmp_path / "source")
    assert main(["ultramem", str(folder), "--to", str(tmp_path / "to")]) == 2
    said = capsys.readouterr().err
    assert message in said and not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("sizes", "config", "message"),
    [
        (V1, {"mem_insert_way": "0:1/2:2"}, "spans differ in length"),
        (V1, {"mem_insert_way": "0:2/2:4"}, "after layer 4 of 4"),
        (V1, {"mem_insert_way": "0:1/1:2"}, "spans overlap"),
        (replace(V2, way="0:0/2:2", share=0.5), {"mem_insert_way": "0:1/2:3"}, "adds its output"),
        (replace(V2, memory_heads=3), {}, "has 3 heads|have 3 heads"),
        (replace(V2, share=0.5), {}, "in a ring .*use --separate-tables"),
    ],
)
def test_memories_that_megamem_does_not_have(sizes: Sizes, config: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        convert_released(_released(sizes, **config))


def test_a_folder_without_the_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not hold config.yaml and model.pt"):
        read_released(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"")
    (tmp_path / "config.yaml").write_text("model: {n_heads: 2}")
    with pytest.raises(ConfigurationError, match="not the config of a model with memories"):
        read_released(tmp_path)


def test_what_is_left_out_is_said() -> None:
    for queries, count in (("released", 1), ("ranks", 0)):
        source = _released(replace(V2, own_queries=True))
        found = convert_released(source, queries=queries)
        assert len(found.warnings) == count
    assert "the released forward fails" in convert_released(_released(V2)).warnings[0]
    copied = convert_released(_released(replace(V2, share=0.5)), separate_tables=True)
    assert "copied to each" in copied.warnings[1]
