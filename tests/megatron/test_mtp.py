"""Multi-token prediction beside memory layers; its own layers have none."""

from pathlib import Path

import pytest
from megatron.training.training import num_floating_point_operations

from megamem.megatron import compat
from megamem.megatron.reports.sizes import with_memory_flops
from megamem.spec import MemorySpec
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.megatron_runs import ROOT, TrainingLog, run_training
from tests.megatron.test_reports import OF_OTHER_LAYERS, _args, _memory
from tests.megatron.test_tiny_training import PP2, SP, TP2

READS = ("--memory-num-keys", 9, "--memory-heads", 2, "--memory-topk", 4, "--memory-lr", 3e-3)
# the last layer is the one whose spec Megatron copies for multi-token prediction
VP2 = (*PP2, "--num-virtual-stages-per-pipeline-rank", 2)
GPT = (
    *("--memory-layers", 0, 3, *READS, "--mtp-num-layers", 1),
    # with tied ones Megatron fails to save a pipeline with prediction layers, memories or not
    "--untie-embeddings-and-output-weights",
)
HYBRID = (
    *("--hybrid-layer-pattern", "*-*-/*-/*-", "--num-layers", 4),
    *("--spec", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"),
    # counted in the prediction layers, number 1 is a feed-forward as well
    *("--memory-layers", 1, 3, *READS),
)
SCRIPTS = {GPT: ROOT / "examples/pretrain_gpt.py", HYBRID: ROOT / "examples/pretrain_hybrid.py"}
MODELS = [
    pytest.param(GPT, id="GPT"),
    pytest.param(
        HYBRID,
        id="hybrid",
        marks=pytest.mark.skipif(
            compat.HybridModel is None, reason="hybrid models came in Megatron-Core 0.18"
        ),
    ),
]


def _run(model: tuple, ranks: int, *flags: object) -> TrainingLog:
    return run_training("mtp", ranks, *model, *flags, script=SCRIPTS[model])


@pytest.mark.gloo
@pytest.mark.parametrize("model", MODELS)
def test_its_layers_are_dense_and_a_run_resumes_on_two_ranks(model: tuple, tmp_path: Path) -> None:
    saving = ("--save", tmp_path, "--save-interval", 2)
    alone = _run(model, 1, "--train-iters", 4, *saving)
    assert "mtp_1 loss" in alone.stdout
    assert alone.losses[-1] < alone.losses[0]
    saved = saved_tensors(tmp_path / "iter_0000002")
    weights = [key for key in saved if not key.startswith("optimizer.")]
    of_prediction = [key for key in weights if key.startswith("mtp.")]
    assert any("linear_fc1.weight" in key for key in of_prediction)
    assert not any("memory" in key for key in of_prediction)
    assert sum("memory.keys.sub_keys" in key for key in weights) == 2
    load = ("--load", tmp_path, "--ckpt-step", 2, "--train-iters", 4)
    for layout in [(*TP2, *SP), PP2 if model is GPT else TP2]:
        log = _run(model, 2, *load, *layout)
        assert log.iterations == [3, 4]
        assert log.losses[0] == pytest.approx(alone.losses[2], rel=2e-6)
        assert log.grad_norms == pytest.approx(alone.grad_norms[2:], abs=1.1e-3)


@pytest.mark.gloo
def test_virtual_stages() -> None:
    """The last chunk has the prediction layers and a memory layer."""
    log = _run(GPT, 2, *VP2)
    assert log.losses[-1] < log.losses[0] and "mtp_1 loss" in log.stdout


@pytest.mark.parametrize("pattern", [None, "*-*-"], ids=["GPT", "hybrid"])
def test_its_feed_forwards_are_counted_in_full(pattern: str | None) -> None:
    """What it adds to the FLOPs of a step does not depend on memory layers."""
    layers = {"memory_layers": [1, 3]}

    def count(spec: MemorySpec | None, depths: int) -> float:
        given = pattern + depths * "/*-" if pattern else None
        args = _args(hybrid_layer_pattern=given, mtp_num_layers=depths or None, **OF_OTHER_LAYERS)
        if spec is None:
            return num_floating_point_operations(args, 2)
        return with_memory_flops(num_floating_point_operations, spec, args, 2)

    added = count(_memory(**layers), 2) - count(_memory(**layers), 0)
    assert added == pytest.approx(count(None, 2) - count(None, 0))
    assert added > 0
