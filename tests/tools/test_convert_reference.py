"""Consolidated checkpoints of the published implementation, converted and loaded by Megatron."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megamem.reference.placement import place_rows
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.commands import command
from tests.helpers.megatron_runs import run_training
from tests.tools import corpus
from tests.tools.reference_model import Sizes, loss_of, random_checkpoint

main = command("convert")
SIZES = Sizes()
FLAGS = re.compile(r"--load (\S+) (--num-layers .*)")
QUERIES = "layers.0.attention.wq.weight"


def _convert(source: list[Path], target: Path, *flags: str, heads: int = SIZES.heads) -> int:
    words = [*map(str, source), "--to", str(target), "--num-attention-heads", str(heads)]
    return main(["reference", *words, *flags])


def _save(checkpoint: dict[str, Tensor], folder: Path) -> Path:
    path = folder / "consolidated.pth"
    torch.save({"model": checkpoint}, path)
    return path


def _loss(folder: Path, capsys: pytest.CaptureFixture, data: Path, ranks: int, *flags) -> float:
    """The first loss of Megatron's loop on the converted checkpoint, with the flags printed."""
    said = " ".join(capsys.readouterr().out.split())
    advice = FLAGS.search(said)
    assert advice is not None, said
    words = ["--load", advice[1], *advice[2].split()]
    assert advice[1] == str(folder)
    log = run_training(
        "converted",
        ranks,
        *words,
        *("--memory-topk", SIZES.topk, "--train-iters", 1, *flags),
        data=("--data-path", data, "--split", "100,0,0", "--eval-iters", 0),
    )
    assert "successfully loaded checkpoint" in log.stdout
    return log.losses[0]


@pytest.mark.parametrize("gated", [True, False], ids=["memory+", "memory"])
def test_megatron_computes_what_the_reference_does(
    tmp_path: Path, capsys: pytest.CaptureFixture, gated: bool
) -> None:
    sizes = replace(SIZES, gated=gated)
    checkpoint = random_checkpoint(sizes)
    data, tokens = corpus.build(tmp_path, sizes.vocabulary)
    truth = loss_of(checkpoint, sizes, tokens)
    # the loss differs between the two forms of rotary embedding
    assert abs(truth - loss_of(checkpoint, sizes, tokens, neighbours=False)) > 0.01
    target = tmp_path / "converted"
    assert _convert([_save(checkpoint, tmp_path)], target) == 0
    assert _loss(target, capsys, data, 1) == pytest.approx(truth, rel=2e-6)


@pytest.mark.gloo
def test_on_two_ranks_in_bf16_with_other_choices(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Two files, rotary pairs as halves, another placement, a table per layer, rounding to bf16."""
    sizes = SIZES
    checkpoint = random_checkpoint(sizes)
    own = {name: weight for name, weight in checkpoint.items() if name.startswith("layers.2.")}
    own["layers.2.feed_forward.values.weight"] = torch.randn(81, 40)
    checkpoint |= own
    files = [tmp_path / "a.pth", tmp_path / "b.safetensors"]
    torch.save({name: w for name, w in checkpoint.items() if name not in own}, files[0])
    save_file({name: weight.contiguous() for name, weight in own.items()}, files[1])
    target = tmp_path / "converted"
    flags = ("--rope", "halves", "--memory-placement-seed", "7", "--dtype", "bf16")
    assert _convert(files, target, *flags) == 2
    assert "layers 0 and 2 have different tables" in capsys.readouterr().err
    assert _convert(files, target, *flags, "--separate-tables") == 0

    rounded = {name: weight.bfloat16() for name, weight in checkpoint.items()}
    saved = saved_tensors(target / "release")
    rows = place_rows(torch.arange(81), 9, 7)
    for layer in sizes.memories:
        table = saved[f"memory_values.layer_{layer}.weight"]
        assert torch.equal(table[rows], rounded[f"layers.{layer}.feed_forward.values.weight"])
    data, tokens = corpus.build(tmp_path, sizes.vocabulary)
    truth = loss_of(rounded, sizes, tokens, neighbours=False)
    loss = _loss(target, capsys, data, 2, "--tensor-model-parallel-size", 2)
    assert loss == pytest.approx(truth, rel=2e-6)


def test_odd_biases_are_said_and_taken(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = random_checkpoint(SIZES)
    name = "layers.2.feed_forward.value_proj.bias"
    checkpoint[name][3] = float("inf")
    assert _convert([_save(checkpoint, tmp_path)], tmp_path / "to") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"Warning: {name} contains infinities or NaN" in said
    saved = saved_tensors(tmp_path / "to/release")
    assert saved["decoder.layers.2.mlp.memory.output.proj.bias"][3] == float("inf")


class _Code:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.feed_forward.w2.weight": None}, r"lacks layers.1.feed_forward.w2.weight"),
        ({"tok_embeddings.weight": None}, r"lacks tok_embeddings.weight"),
        ({"lm_head.weight": torch.ones(2)}, r"do not belong to a consolidated .*lm_head.weight"),
        ({"layers.0.feed_forward.values_u.weight": torch.ones(2)}, r"beside the tables of a PEER"),
        ({"layers.0.feed_forward.gating.weight": torch.ones(1, 64)}, r"a scalar gate"),
        (
            {"layers.1.attention.wo.weight": torch.ones(64, 63)},
            r"shape \[64, 63\], but must have \[64, 64\]",
        ),
        ({"layers.0.feed_forward.values.weight": torch.ones(80, 40)}, r"contradict"),
        ({"step": 3}, r"its step is not a tensor"),
    ],
)
def test_files_that_are_not_what_they_say(
    tmp_path: Path, capsys: pytest.CaptureFixture, change: dict, message: str
) -> None:
    checkpoint = random_checkpoint(SIZES) | change
    checkpoint = {name: weight for name, weight in checkpoint.items() if weight is not None}
    assert _convert([_save(checkpoint, tmp_path)], tmp_path / "to") == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.count("\n") == 1 and not (tmp_path / "to").exists()


def test_no_memory_layers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = _save(random_checkpoint(replace(SIZES, memories=())), tmp_path)
    assert _convert([path], tmp_path / "to") == 2
    assert "no layer has feed_forward.keys" in capsys.readouterr().err


def test_the_wrong_number_of_heads(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert _convert([_save(random_checkpoint(SIZES), tmp_path)], tmp_path / "to", heads=5) == 2
    assert "--num-attention-heads 5 does not divide" in capsys.readouterr().err


def test_code_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"tok_embeddings.weight": _Code()}, tmp_path / "evil.pth")
    assert _convert([tmp_path / "evil.pth"], tmp_path / "to") == 2
    assert "would run code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken"])
def test_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes) -> None:
    for name, message in (
        ("x.pth", "was not written by torch.save"),
        ("x.safetensors", "is not a safetensors"),
    ):
        (tmp_path / name).write_bytes(content)
        assert _convert([tmp_path / name], tmp_path / "to") == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert _convert([tmp_path / "absent.pth"], tmp_path / "to") == 2
    assert "absent.pth is not a file" in capsys.readouterr().err


def test_a_folder_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "to"
    target.mkdir()
    (target / "mine").write_text("kept")
    assert _convert([_save(random_checkpoint(SIZES), tmp_path)], target) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in target.iterdir()] == ["mine"]
