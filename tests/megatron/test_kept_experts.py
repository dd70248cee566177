"""A mixture of experts that stays beside a memory: --memory-keep-ffn on a layer of experts."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from megamem.__main__ import parse
from megamem.megatron import compat
from megamem.planner.sizes import even_placement, stage_parameters, table_parameters
from megamem.tools.plan import job_from_args
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.commands import command
from tests.helpers.megatron_runs import ROOT, TrainingLog, command_line, run_training

READS = ("--memory-num-keys", 9, "--memory-heads", 2, "--memory-topk", 4, "--memory-lr", 3e-3)
EXPERTS = (
    *("--num-experts", 4, "--moe-ffn-hidden-size", 48, "--moe-router-topk", 2),
    *("--moe-shared-expert-intermediate-size", 32, "--moe-router-score-function", "sigmoid"),
    *("--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", 1e-2),
    *("--moe-router-load-balancing-type", "seq_aux_loss", "--moe-aux-loss-coeff", 1e-2),
    *("--moe-token-dispatcher-type", "alltoall"),
)
# the only layer of experts has a memory, and so has a dense one
GPT = (
    *("--moe-layer-freq", "([0]*2+[1]*1+[0]*1)", "--memory-layers", 1, 2),
    *("--memory-keep-ffn", *READS, *EXPERTS),
)
HYBRID = (
    *("--hybrid-layer-pattern", "*-*E*-", "--num-layers", 6, "--memory-layers", 3, 5),
    *("--spec", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"),
    *("--memory-keep-ffn", *READS, *EXPERTS),
)
SCRIPTS = {GPT: ROOT / "examples/pretrain_gpt.py", HYBRID: ROOT / "examples/pretrain_hybrid.py"}
hybrid = pytest.mark.skipif(
    compat.HybridModel is None, reason="hybrid models came in Megatron-Core 0.18"
)
MODELS = [
    pytest.param(GPT, id="GPT"),
    pytest.param(HYBRID, id="hybrid", marks=[pytest.mark.slow, hybrid]),
]
EP2 = ("--expert-model-parallel-size", 2)

main = command("convert")


def _run(model: tuple, ranks: int, *flags: object) -> TrainingLog:
    return run_training("kept experts", ranks, *model, *flags, script=SCRIPTS[model])


def _balance(log: TrainingLog) -> list[float]:
    """The loss of load balancing, which Megatron logs by layer number."""
    return [float(loss) for loss in re.findall(r"seq_load_balancing_loss: (\S+)", log.stdout)]


def _planned(model: tuple, *flags: object) -> int:
    """Parameters on a rank, as `megamem plan` counts them for the same command line."""
    # --cpu and the script are the launcher's
    words = [str(word) for word in command_line(*model, *flags)[2:]]
    job = job_from_args(parse("plan", [*words, "--world-size", "2"]))
    placement = even_placement(job.shape.num_layers, 1)
    [held] = stage_parameters(job.shape, job.spec, 1, placement, expert_ranks=2)
    return held.total + table_parameters(job.spec)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple], tuple[TrainingLog, Path]]:
    """A function of a model that returns its first step on one rank, and where it was saved."""

    @cache
    def start(model: tuple) -> tuple[TrainingLog, Path]:
        folder = tmp_path_factory.mktemp("start")
        saving = ("--save", folder, "--save-interval", 1, "--train-iters", 1)
        return _run(model, 1, *saving), folder

    return start


@pytest.mark.gloo
@pytest.mark.parametrize("model", MODELS)
def test_expert_parallel_ranks_take_the_steps_of_one_process(
    model: tuple, starts, tmp_path: Path
) -> None:
    """All of it: pytest -m "slow or not slow" tests/megatron/test_kept_experts.py."""
    first, start = starts(model)
    saved = saved_tensors(start / "iter_0000001")
    weights = {key for key in saved if not key.startswith("optimizer.")}
    layer = f"decoder.layers.{3 if model is HYBRID else 2}.mlp."
    assert f"{layer}memory.keys.sub_keys" in weights
    assert f"{layer}ffn.router.weight" in weights
    assert any(key.startswith(f"{layer}ffn.experts.") for key in weights)
    assert any(key.startswith(f"{layer}ffn.shared_experts.") for key in weights)
    # training moves the biases of experts, also of those that a memory is beside
    assert saved[f"{layer}ffn.router.expert_bias"].abs().max() > 0

    # from the same weights; Megatron divides its optimizer by whether there are expert ranks
    load = ("--load", start, "--no-load-optim", "--train-iters", 5)
    one = _run(model, 1, *load)
    assert one.losses[-1] < first.losses[0] - 0.1
    assert len(_balance(one)) == 4 and all(loss > 0 for loss in _balance(one))
    end = tmp_path / "end"
    two = _run(model, 2, *load, *EP2, "--save", end, "--save-interval", 4)
    assert two.iterations == [2, 3, 4, 5]
    assert two.losses == pytest.approx(one.losses, rel=2e-6)
    assert two.grad_norms == pytest.approx(one.grad_norms, abs=1.1e-3)
    assert _balance(two) == pytest.approx(_balance(one), rel=2e-6)
    assert two.parameters == {(0, 0): _planned(model, *EP2)}
    if model is HYBRID:
        return
    # resumed, they go on as if they had not stopped
    resumed = _run(model, 2, "--load", end, "--ckpt-step", 4, "--train-iters", 5, *EP2)
    assert resumed.losses == two.losses[-1:] and resumed.grad_norms == two.grad_norms[-1:]


@pytest.mark.gloo
@hybrid
def test_a_hybrid_model_trains_with_expert_parallel_ranks() -> None:
    log = _run(HYBRID, 2, *EP2)
    assert log.iterations == [1, 2, 3, 4, 5] and log.losses[-1] < log.losses[0] - 0.1
    assert len(_balance(log)) == 5 and all(loss > 0 for loss in _balance(log))
    assert log.parameters == {(0, 0): _planned(HYBRID, *EP2)}


@pytest.mark.gloo
def test_a_checkpoint_goes_out_and_comes_back(starts, tmp_path: Path, capsys) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    first, saved = starts(GPT)
    assert main(["export", str(saved), "--to", str(out)]) == 0
    assert main(["import", str(out), "--to", str(back)]) == 0
    before, after = saved_tensors(saved / "iter_0000001"), saved_tensors(back / "release")
    weights = [key for key in before if not key.startswith(("optimizer.", "rng", "rerun"))]
    assert len(weights) > 40
    for key in weights:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0, msg=key)
    # the data of the first step, which was a small one
    log = _run(GPT, 1, "--finetune", "--train-iters", 1, "--load", back)
    assert 0 < first.losses[0] - log.losses[0] < 1e-2
    # a dense model gets memories, but not one with experts
    words = ["upcycle", str(saved), "--to", str(tmp_path / "more"), "--memory-layers", "0"]
    capsys.readouterr()
    assert main(words) == 2
    assert "already has memory layers" in capsys.readouterr().err
