"""Memories in layers with hyper-connections (mHC), whose hidden states are several streams."""

from pathlib import Path

import pytest

from tests.helpers.checkpoints import saved_tensors
from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_tiny_training import MEMORY, SP, TP2

pytest.importorskip(
    "megatron.core.transformer.hyper_connection", reason="Megatron-Core has mHC since 0.20"
)

MODEL = (
    *("--spec", "tests.helpers.hyper_connections", "layer_spec", "--enable-mhc-connections"),
    *("--mhc-num-residual-streams", 2),
)


def _run(ranks: int, *flags: object) -> TrainingLog:
    return run_training("hyper-connections", ranks, *MODEL, *MEMORY, *flags)


@pytest.mark.gloo
@pytest.mark.parametrize("kept", [(), ("--memory-keep-ffn",)], ids=["replaced", "kept"])
def test_ranks_take_the_steps_of_one_process_and_resume(kept: tuple, tmp_path: Path) -> None:
    saving = ("--save", tmp_path, "--save-interval", 3)
    alone = _run(1, *kept, *saving)
    assert alone.losses[-1] < alone.losses[0] - 0.1
    keys = saved_tensors(tmp_path / "iter_0000003")
    layer = "decoder.layers.1."
    assert f"{layer}mlp.memory.keys.sub_keys" in keys
    assert f"{layer}mlp_hyper_connection.mapping_proj.weight" in keys
    assert (f"{layer}mlp.ffn.linear_fc1.weight" in keys) == bool(kept)

    two = _run(2, *kept, *TP2, *SP)
    assert two.losses == pytest.approx(alone.losses, rel=2e-6)
    assert two.grad_norms == pytest.approx(alone.grad_norms, abs=1.1e-3)
    resumed = _run(2, *kept, "--load", tmp_path, "--ckpt-step", 3)
    assert resumed.iterations == [4, 5]
    assert resumed.losses[0] == pytest.approx(alone.losses[3], rel=2e-6)
