"""Memory layers added to a dense checkpoint, from which Megatron's loop then starts."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.resolution import resolve
from megamem.tools.convert import torch_dist, upcycle
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.commands import command
from tests.helpers.megatron_runs import ROOT, run_training

main = command("convert")
MEMORY = ("--memory-layers", 1, 3, "--memory-num-keys", 9, "--memory-topk", 4)
KEEP = "--memory-keep-ffn"
FIRST_STEP = ("--train-iters", 1)
LLAMA = ("--swiglu", "--normalization", "RMSNorm", "--untie-embeddings-and-output-weights")


def _dense(folder: Path, *flags: object) -> Path:
    saving = ("--save", folder, "--save-interval", 2, "--train-iters", 2)
    run_training("dense", 1, *saving, *flags)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases, LayerNorm and tied embeddings a dense layer has every kind of key."""
    return _dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _dense(tmp_path_factory.mktemp("llama"), *LLAMA)


def _upcycle(source: Path, target: Path, *flags: object) -> int:
    return main(["upcycle", str(source), "--to", str(target), *map(str, flags)])


def _first_loss(folder: Path, *flags: object, ranks: int = 1) -> float:
    log = run_training("start", ranks, "--load", folder, "--finetune", *FIRST_STEP, *flags)
    assert "successfully loaded checkpoint" in log.stdout
    return log.losses[0]


def test_the_loss_at_step_0_is_unchanged(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = _first_loss(dense)
    assert _upcycle(dense, tmp_path / "kept", *MEMORY, KEEP) == 0
    assert "the loss at step 0 is that of the dense model" in capsys.readouterr().out
    assert _first_loss(tmp_path / "kept", *MEMORY, KEEP) == before
    # what was added is known where the checkpoint is loaded
    start = ("--load", tmp_path / "kept", "--finetune", *FIRST_STEP)
    other = run_training("start", 1, *start, *MEMORY, check=False)
    assert other.returncode != 0 and "was trained with it; add --memory-keep-ffn" in other.stdout


def test_a_conversion_says_nothing_but_its_result(dense: Path, tmp_path: Path) -> None:
    """In a process of its own, in which it is the first to import Megatron."""
    words = ["convert", "upcycle", dense, "--to", tmp_path / "up", *MEMORY]
    command = [sys.executable, "-m", "megamem", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("Wrote 47 tensors")


@pytest.mark.gloo
def test_plain_memories_of_a_llama_on_two_ranks(llama: Path, tmp_path: Path) -> None:
    """The memory variant has no projection, so the tables are zero; there is one per layer."""
    flags = (*MEMORY, KEEP, "--memory-variant", "memory", "--memory-pool", "layer")
    assert _upcycle(llama, tmp_path / "to", *flags) == 0
    two = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
    loss = _first_loss(tmp_path / "to", *LLAMA, *flags, *two, ranks=2)
    assert loss == pytest.approx(_first_loss(llama, *LLAMA), rel=1e-6)


ULTRAMEM = {
    "ultramem": ("--memory-variant", "ultramem", "--memory-layers", 0, 2, "--memory-skip", 1),
    "ultramem-v2": ("--memory-variant", "ultramem-v2", "--memory-layers", 0, 1, 2, 3),
}


@pytest.mark.parametrize("variant", ULTRAMEM)
def test_ultramem_beside_the_feed_forwards_of_a_llama(
    llama: Path, variant: str, tmp_path: Path
) -> None:
    """The loss at step 0 is unchanged, and new weights are those of a new run with the seed."""
    sizes = ("--memory-num-keys", 9, "--memory-topk", 4, "--memory-final-topk", 5)
    flags = (*ULTRAMEM[variant], *sizes)
    assert _upcycle(llama, tmp_path / "to", *flags, "--seed", 99) == 0
    assert _first_loss(tmp_path / "to", *LLAMA, *flags) == _first_loss(llama, *LLAMA)
    new = saved_tensors(tmp_path / "to/release")
    config = MemoryConfig(
        memory_variant=variant,
        memory_layers=[0, 2] if variant == "ultramem" else [0, 1, 2, 3],
        memory_num_keys=9,
        memory_topk=4,
        memory_final_topk=5,
    )
    spec = resolve(config, 64, seed=99, num_layers=4, ffn_width=128)
    pool = MemoryPool(spec, "layer_2")
    layer = MemoryLayer(spec, pool, layer=2).state_dict()
    for table in pool:
        assert torch.equal(new[f"memory_values.{table.name}.weight"], table.weight)
        assert table.weight.std() > 0.01
    for name, weight in layer.items():
        saved = new[f"decoder.layers.2.mlp.memory.{name}"]
        assert torch.equal(saved, weight * 0 if name == "output.proj.weight" else weight), name


def test_replaced_feed_forwards_change_the_loss_and_it_is_said(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert _upcycle(dense, tmp_path / "to", *MEMORY) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the loss at step 0 is higher" in said and "--memory-keep-ffn" in said
    assert _first_loss(tmp_path / "to", *MEMORY) != pytest.approx(_first_loss(dense), rel=1e-4)


def test_weights_are_the_dense_ones_and_the_initial_ones(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New weights are those of a new run with the seed, in however many shards they are drawn."""
    monkeypatch.setattr(upcycle, "REGION_BYTES", 1000)
    flags = ("--seed", 99, "--memory-placement-seed", 3)
    assert _upcycle(dense, tmp_path / "to", *MEMORY, *flags) == 0
    old = saved_tensors(dense / "iter_0000002")
    new = saved_tensors(tmp_path / "to/release")
    qkv = "self_attention.linear_qkv.weight"
    for layer in range(4):
        stacked = old[f"decoder.layers.{qkv}"][layer]
        assert torch.equal(new[f"decoder.layers.{layer}.{qkv}"], stacked)
    norm = old["decoder.layers.mlp.linear_fc1.layer_norm_bias"]
    assert torch.equal(new["decoder.layers.3.pre_mlp_layernorm.bias"], norm[3])
    assert torch.equal(new["decoder.layers.2.mlp.linear_fc1.layer_norm_bias"], norm[2])
    assert not any(key.startswith("decoder.layers.1.mlp.linear") for key in new)
    assert not any("optimizer" in key for key in new)

    config = MemoryConfig(
        memory_layers=[1, 3], memory_num_keys=9, memory_topk=4, memory_placement_seed=3
    )
    table = MemoryPool(resolve(config, 64, seed=99)).values
    assert torch.equal(new["memory_values.shared.weight"], table.weight)
    assert torch.equal(new["memory_values.shared.placement"], table.placement)
    assert new["decoder.layers.1.mlp.memory.output.proj.weight"].std() > 0.01
    assert new["decoder.layers.1.mlp.memory.output.proj.weight"].std() < 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "name them with --memory-layers"),
        (("--memory-layers", 4), "--memory-layers 4 is beyond the checkpoint's layers; use 0 to 3"),
        (("--memory-layers", 1, "--memory-topk", 9, "--memory-num-keys", 8), "--memory-topk 9"),
        (("--memory-layer", 1, 2, "x"), "unrecognized|invalid|ambiguous|int value"),
    ],
)
def test_impossible_memories(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: tuple, message: str
) -> None:
    assert _upcycle(dense, tmp_path / "to", *flags) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.count("\n") == 1 and not (tmp_path / "to").exists()


def test_what_is_no_dense_checkpoint(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert _upcycle(tmp_path, tmp_path / "to", *MEMORY) == 2
    assert "is not a torch_dist checkpoint" in capsys.readouterr().err
    assert _upcycle(dense, tmp_path / "one", *MEMORY) == 0
    assert _upcycle(tmp_path / "one", tmp_path / "to", *MEMORY) == 2
    assert "already has memory layers" in capsys.readouterr().err


def test_an_index_that_names_code_is_not_read(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "metadata.json").write_text((dense / "iter_0000002/metadata.json").read_text())
    # a pickle that would touch a file
    path = str(tmp_path / "ran")
    code = f"cpathlib\nPath.touch\n(cpathlib\nPath\n(V{path}\ntRtR.".encode()
    (folder / ".metadata").write_bytes(code)
    assert _upcycle(folder, tmp_path / "to", *MEMORY) == 2
    said = capsys.readouterr().err
    assert "contains pathlib.Path.touch, which no index of Megatron's does" in said
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_is_named(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(dense, tmp_path / "copy")
    for file in (tmp_path / "copy/iter_0000002").glob("*.distcp"):
        file.unlink()
    assert _upcycle(tmp_path / "copy", tmp_path / "to", *MEMORY) == 2
    assert "the checkpoint may be damaged" in capsys.readouterr().err
    # an incomplete result does not count as a checkpoint
    assert not (tmp_path / "to" / torch_dist.TRACKER).exists()


def test_a_bf16_run_steps_from_these_weights(tmp_path: Path) -> None:
    """The optimizer's fp32 copies start from these weights, too: a small rate changes little."""
    source = _dense(tmp_path / "dense", "--bf16")
    assert _upcycle(source, tmp_path / "to", *MEMORY, "--seed", 77) == 0
    rate = ("--lr", 1e-5, "--min-lr", 1e-6, "--train-iters", 2)
    saving = ("--save", tmp_path / "saved", "--save-interval", 2)
    flags = (*MEMORY, "--bf16", *rate, *saving)
    run_training("steps", 1, "--load", tmp_path / "to", *flags)
    before, after = (
        saved_tensors(tmp_path / name) for name in ("to/release", "saved/iter_0000002")
    )
    for key in ("memory_values.shared.weight", "decoder.layers.0.self_attention.linear_qkv.weight"):
        assert before[key].dtype == after[key].dtype == torch.bfloat16
        step = (before[key].float() - after[key].float()).abs().max()
        assert 0 < step < 1e-3 < before[key].float().std(), key
