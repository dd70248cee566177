"""Memory layers in Megatron-Bridge: its package, its recipe, loop, optimizer and checkpoints.

    bash tests/bridge.sh            makes the environment that this needs, and runs it

The runs are on CPUs. Beside what the CPU runtime replaces for every run of Megatron, one thing is
not the real one: transformer_engine, in one module that nothing calls (see megamem/cpu/bridge.py).
"""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamem import MemoryConfig, resolve
from megamem.checkpoint import SAVED, settings_of, state_key, table_key
from megamem.planner.sizes import memory_flops_per_token
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.commands import under_torchrun

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv" / "bridge" / "bin" / "python"
RECIPE = str(ROOT / "examples" / "bridge_recipe.py")
OTHER_MODELS = ("-m", "tests.helpers.bridge_models")
MEMORY = ("--memory-layers", 1, 2, "--memory-num-keys", 16, "--memory-topk", 8)
TRAINING = ("train.train_iters=6", "scheduler.lr_decay_iters=6")
IN_FP32 = ("mixed_precision=null", "optimizer.bf16=false")
USUAL = ("model.hidden_dropout=0", "model.attention_dropout=0", *IN_FP32, *TRAINING)
SHARED = ("--memory-group-size", 2, "--memory-wire", "alltoall")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gloo,
    # a broken environment is an error, and bash tests/bridge.sh makes one if there is none
    pytest.mark.skipif(
        not PYTHON.exists(), reason="there is no .venv/bridge; bash tests/bridge.sh makes it"
    ),
]


_run = partial(under_torchrun, python=PYTHON, timeout=400)


def _losses(said: str) -> dict[int, tuple[str, str]]:
    """Iteration -> loss and gradient norm, as they are printed."""
    line = r"iteration +(\d+)/.* lm loss: (\S+) .* grad norm: (\S+) "
    return {int(number): (loss, norm) for number, loss, norm in re.findall(line, said)}


def _close(
    some: dict[int, tuple[str, str]], others: dict[int, tuple[str, str]], rel: float
) -> bool:
    """Whether they are of the same iterations, and equal up to rounding."""
    numbers = [[float(x) for pair in found.values() for x in pair] for found in (some, others)]
    return list(some) == list(others) and numbers[0] == pytest.approx(numbers[1], rel=rel)


def _flops(folder: Path) -> float:
    """FLOPs of a run until it saved."""
    state = torch.load(folder / "train_state.pt", weights_only=True)
    return float(state["floating_point_operations_so_far"])


@pytest.fixture(scope="module")
def alone() -> dict[int, tuple[str, str]]:
    """Six steps of one process."""
    return _losses(_run(1, RECIPE, *MEMORY, *USUAL))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Six steps of two data-parallel ranks that share the table; checkpoints after 3 and 6."""
    folder = tmp_path_factory.mktemp("bridge")
    saves = (f"checkpoint.save={folder}", "checkpoint.save_interval=3")
    board = (f"logger.tensorboard_dir={folder}/board", "logger.tensorboard_log_interval=1")
    return _run(2, RECIPE, *MEMORY, *SHARED, *USUAL, *saves, *board), folder


def test_ranks_that_share_a_table_train_as_one_process(alone, saved) -> None:
    assert list(alone) == [1, 2, 3, 4, 5, 6] and _close(_losses(saved[0]), alone, 1e-5)
    assert float(alone[6][0]) < float(alone[1][0]) - 0.05
    assert "64 = 16.38 k parameters, 8.192 k on each of 2 ranks" in saved[0]


def test_a_run_goes_on_as_if_it_had_not_ended(saved) -> None:
    """Digit for digit."""
    load = (f"checkpoint.load={saved[1]}", "checkpoint.ckpt_step=3")
    rest = _losses(_run(2, RECIPE, *MEMORY, *SHARED, *USUAL, *load))
    assert rest == {number: _losses(saved[0])[number] for number in (4, 5, 6)}


def test_one_process_goes_on_from_the_checkpoint_of_two_ranks(alone, saved) -> None:
    load = (f"checkpoint.load={saved[1]}", "checkpoint.ckpt_step=3")
    rest = _losses(_run(1, RECIPE, *MEMORY, *USUAL, *load))
    assert _close(rest, {number: alone[number] for number in (4, 5, 6)}, 1e-4)


def test_the_checkpoint_holds_tables_and_says_what_they_are(saved) -> None:
    folder = saved[1] / "iter_0000006"
    found = saved_tensors(folder)
    for key in (table_key("shared"), state_key("shared", "exp_avg")):
        assert found[key].shape == (256, 64) and found[key].any()
    config = MemoryConfig(memory_layers=[1, 2], memory_num_keys=16, memory_topk=8)
    settings = settings_of(resolve(config, 64))
    assert dist_checkpointing.load_common_state_dict(str(folder))[SAVED] == settings


def test_another_memory_is_refused(saved) -> None:
    load = (f"checkpoint.load={saved[1] / 'iter_0000003'}",)
    said = _run(1, RECIPE, *MEMORY, "--memory-qk-norm", *USUAL, *load, check=False)
    assert "ConfigurationError: --memory-qk-norm is given, but --load" in said
    assert "was trained without it; drop --memory-qk-norm." in said


def test_how_the_memory_is_used_is_on_tensorboard(saved) -> None:
    for name in ("rows_used/layer_1", "top1_weight/layer_2", "grad_norm/shared"):
        board = EventAccumulator(str(saved[1] / "board" / name.split("/")[1])).Reload()
        numbers = board.Scalars(f"memory/{name}")
        assert [each.step for each in numbers] == [1, 2, 3, 4, 5, 6]
        assert all(each.value > 0 for each in numbers)
    assert len(re.findall("^ memory: rows used", saved[0], re.MULTILINE)) == 6


def test_without_the_flag_the_recipe_is_as_it_was(saved, tmp_path: Path) -> None:
    """What it loses in FLOPs by memory layers is what they take less than feed-forwards."""
    save = f"checkpoint.save={tmp_path}"
    said = _run(1, RECIPE, *USUAL, save, "checkpoint.save_interval=6")
    assert list(_losses(said)) == [1, 2, 3, 4, 5, 6] and "megamem: layers" not in said
    spec = resolve(MemoryConfig(memory_layers=[1, 2], memory_num_keys=16, memory_topk=8), 64)
    feed_forward = 3 * 2 * 2 * 64 * 256
    tokens = 6 * 8 * 32
    more = 2 * (memory_flops_per_token(spec) - feed_forward) * tokens
    dense = _flops(tmp_path / "iter_0000006")
    assert _flops(saved[1] / "iter_0000006") - dense == pytest.approx(more, rel=1e-3)


@pytest.mark.parametrize(
    "layout",
    [
        ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
        ("model.pipeline_model_parallel_size=2",),
    ],
    ids=["tensor", "pipeline"],
)
def test_other_ranks_go_on_from_a_checkpoint(layout: tuple[str, ...], tmp_path: Path) -> None:
    """Tensor- and pipeline-parallel ranks continue what one process began."""
    plain = ("ddp.use_distributed_optimizer=false", "optimizer.use_distributed_optimizer=false")
    saves = (f"checkpoint.save={tmp_path}", "checkpoint.save_interval=3")
    truth = _losses(_run(1, RECIPE, *MEMORY, *USUAL, *plain, *saves))
    load = (f"checkpoint.load={tmp_path}", "checkpoint.ckpt_step=3")
    rest = _losses(_run(2, RECIPE, *MEMORY, *USUAL, *plain, *layout, *load))
    assert _close(rest, {number: truth[number] for number in (4, 5, 6)}, 2e-3)


def test_it_trains_in_bf16_and_evaluates() -> None:
    evaluation = ("validation.eval_iters=2", "validation.eval_interval=3")
    said = _run(1, RECIPE, *MEMORY, *TRAINING, *evaluation)
    losses = _losses(said)
    assert float(losses[6][0]) < float(losses[1][0]) - 0.05
    found = re.findall(r"validation loss at iteration (\d) .* lm loss value: (\S+)", said)
    assert [number for number, _ in found][:2] == ["3", "6"]
    assert all(float(loss) < 7.1 for _, loss in found)


@pytest.mark.parametrize(("model", "layers"), [("builder", (1, 2)), ("hybrid", (3, 5))])
def test_other_kinds_of_models_get_memory_layers(model: str, layers: tuple[int, int]) -> None:
    memory = ("--memory-layers", *layers, "--memory-num-keys", 16, "--memory-topk", 8)
    said = _run(1, *OTHER_MODELS, model, *memory, *TRAINING)
    assert f"megamem: layers {layers[0]}, {layers[1]} are memory+" in said
    losses = _losses(said)
    assert float(losses[6][0]) < float(losses[1][0]) - 0.01


def test_what_megatron_does_with_all_parameters_spares_the_tables(alone) -> None:
    """Norms, hashes and random initialization, although the ranks hold different rows."""
    norm = "logger.log_params_norm=true"
    hashes = "train.check_weight_hash_across_dp_replicas_interval=2"
    draws = "rng.data_parallel_random_init=true"
    both = _run(2, RECIPE, *MEMORY, *SHARED, *USUAL, norm, hashes, draws)
    one = _run(1, RECIPE, *MEMORY, *USUAL, norm)
    norms = [re.findall(r" params norm: (\S+) ", said) for said in (both, one)]
    assert len(norms[0]) == 6 and norms[0] == norms[1]
    assert _close(_losses(both), alone, 1e-5)


def test_what_cannot_work_is_refused_in_words() -> None:
    words = ("checkpoint.also_save_hf_checkpoint=true", "checkpoint.hf_source_path=anywhere")
    said = _run(1, RECIPE, *MEMORY, *USUAL, *words, "dist.use_torch_fsdp2=true", check=False)
    assert "ConfigurationError: 2 settings cannot work" in said
    assert "config.dist.use_torch_fsdp2 is True, but value tables are" in said
    assert "config.checkpoint.also_save_hf_checkpoint is True" in said
    flags = ("--memory-layers", 4, "--memory-lr-schedule", "constant")
    said = _run(1, RECIPE, *flags, *USUAL, check=False)
    assert "--memory-layers 4 is out of range" in said
    assert "--memory-lr-schedule constant needs a learning rate" in said
