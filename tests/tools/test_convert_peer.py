"""Conversions of PEER layers: from published checkpoints, upcycled, to safetensors and back."""

import re
from pathlib import Path

import pytest
import torch

from megamem.config import MemoryConfig
from megamem.layers.memory_pool import MemoryPool
from megamem.reference.placement import place_rows
from megamem.resolution import resolve
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.commands import command
from tests.helpers.megatron_runs import run_training
from tests.tools import corpus
from tests.tools.reference_model import Sizes, loss_of, random_checkpoint
from tests.tools.test_convert_reference import _convert, _loss, _save
from tests.tools.test_convert_upcycle import _first_loss, _upcycle

main = command("convert")
SIZES = Sizes(gated=False, experts=True)
U, V = "layers.0.feed_forward.values_u.weight", "layers.0.feed_forward.values_v.weight"


def test_the_reference_is_taken_over_and_goes_out_and_in_again(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Megatron's loss is that of the published layer, and a round trip changes no weight."""
    checkpoint = random_checkpoint(SIZES)
    data, tokens = corpus.build(tmp_path, SIZES.vocabulary)
    target, exported = tmp_path / "converted", tmp_path / "exported"
    assert _convert([_save(checkpoint, tmp_path)], target, "--memory-placement-seed", "7") == 0
    assert _loss(target, capsys, data, 1) == pytest.approx(
        loss_of(checkpoint, SIZES, tokens), rel=2e-6
    )
    saved = saved_tensors(target / "release")
    rows = place_rows(torch.arange(81), 9, 7)
    assert torch.equal(saved["memory_values.shared.weight"][rows], checkpoint[V])
    assert torch.equal(saved["memory_values.shared.u.weight"][rows], checkpoint[U])

    assert main(["export", str(target), "--to", str(exported)]) == 0
    back = tmp_path / "back"
    assert main(["import", str(exported), "--to", str(back), "--memory-placement-seed", "7"]) == 0
    again = saved_tensors(back / "release")
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in saved.items())


def test_u_that_differs_by_layer_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = random_checkpoint(SIZES)
    checkpoint["layers.2.feed_forward.values_u.weight"] = torch.randn(81, SIZES.hidden)
    source = _save(checkpoint, tmp_path)
    assert _convert([source], tmp_path / "to") == 2
    assert "layers 0 and 2 have different tables" in capsys.readouterr().err
    assert _convert([source], tmp_path / "to", "--separate-tables") == 0
    saved = saved_tensors(tmp_path / "to/release")
    rows = place_rows(torch.arange(81), 9, 0)
    for layer in (0, 2):
        theirs = checkpoint[f"layers.{layer}.feed_forward.values_u.weight"]
        assert torch.equal(saved[f"memory_values.layer_{layer}.u.weight"][rows], theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({U: None}, "lacks layers.0.feed_forward.values_u.weight"),
        ({V: None}, "lacks layers.0.feed_forward.values_v.weight"),
        (
            {U: torch.ones(81, 40)},
            r"values_u.weight has shape \[81, 40\], but must have \[81, 64\]",
        ),
        ({V: torch.ones(80, 64)}, "values_v.weight with 80 rows .* contradict"),
        (
            {"layers.0.feed_forward.value_proj.bias": torch.ones(64)},
            "value_proj.bias is beside the tables of a PEER layer",
        ),
    ],
)
def test_files_that_are_no_peer(
    tmp_path: Path, capsys: pytest.CaptureFixture, change: dict, message: str
) -> None:
    checkpoint = random_checkpoint(SIZES) | change
    checkpoint = {name: weight for name, weight in checkpoint.items() if weight is not None}
    assert _convert([_save(checkpoint, tmp_path)], tmp_path / "to") == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said


def test_upcycled_beside_the_feed_forward_it_adds_nothing_at_first(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """v is zero and u is not, so the loss is the dense model's, and the experts can learn."""
    # with a learning rate of 0 the saved weights are those of the first loss
    still = ("--train-iters", 1, "--lr", 0, "--min-lr", 0)
    dense = tmp_path / "dense"
    log = run_training("dense", 1, "--save", dense, "--save-interval", 1, *still)
    flags = ("--memory-layers", 1, 3, "--memory-num-keys", 9, "--memory-topk", 4)
    flags += ("--memory-variant", "peer", "--memory-keep-ffn")
    assert _upcycle(dense, tmp_path / "to", *flags, "--seed", 99) == 0
    assert "the loss at step 0 is that of the dense model" in capsys.readouterr().out
    new = saved_tensors(tmp_path / "to/release")
    config = MemoryConfig(
        memory_layers=[1, 3], memory_num_keys=9, memory_topk=4, memory_variant="peer"
    )
    _, u = MemoryPool(resolve(config, 64, seed=99))
    assert torch.equal(new["memory_values.shared.u.weight"], u.weight)
    assert not new["memory_values.shared.weight"].any()
    assert _first_loss(tmp_path / "to", *flags) == log.losses[0]
