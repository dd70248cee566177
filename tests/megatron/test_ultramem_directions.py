"""UltraMem's directions of a core: state of a run that checkpoints hold and every rank shares."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megamem.config import MemoryConfig
from megamem.layers.init import WeightFactory
from megamem.layers.tucker_keys import TuckerKeys
from megamem.ops import leading_directions
from megamem.resolution import resolve
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_tiny_training import DO, FULL, PP2, TP2
from tests.megatron.test_ultramem import VARIANTS

ULTRAMEM = (*VARIANTS["ultramem"], "--bf16", *DO)
LAYERS = ("--train-iters", 4, "--lr-decay-iters", 4)
KEYS = [f"decoder.layers.{layer}.mlp.memory.keys.directions" for layer in (1, 3)]
NEGATIVE = "tests.helpers.negative_directions"
RESHARDED = ("--dist-ckpt-optim-fully-reshardable",)


def _train(folder: Path, *flags: object, module: str = "megamem.run") -> TrainingLog:
    saving = ("--save", folder, "--save-interval", 2)
    return run_training(
        "directions", 2, *ULTRAMEM, *LAYERS, *RESHARDED, *saving, *flags, module=module
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of 4 steps on two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("whole")
    _train(folder, *TP2, module=NEGATIVE)
    return folder


def _same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.gloo
def test_directions_are_saved_in_fp32_and_follow_the_cores(whole: Path) -> None:
    early, late = (saved_tensors(whole / f"iter_{n:07}") for n in (2, 4))
    for key in KEYS:
        directions_2HA = late[key]
        assert directions_2HA.dtype == torch.float32 and directions_2HA.shape == (2, 2, 2)
        # unit vectors, not rounded to bf16
        torch.testing.assert_close(directions_2HA.norm(dim=-1), torch.ones(2, 2))
        assert (directions_2HA.sum(-1) < -1).all()
        assert not torch.equal(directions_2HA, early[key])
        assert not torch.equal(directions_2HA.bfloat16().float(), directions_2HA)


@pytest.mark.gloo
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), marks=pytest.mark.slow, id="resumed"),
        pytest.param(FULL, id="resumed, full recompute"),
    ],
)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    whole: Path, tmp_path: Path, flags: tuple
) -> None:
    log = _train(tmp_path, *TP2, "--load", whole, "--ckpt-step", 2, *flags)
    assert log.iterations == [3, 4]
    _same_bits(saved_tensors(tmp_path / "iter_0000004"), saved_tensors(whole / "iter_0000004"))


@pytest.mark.gloo
def test_other_ranks_get_the_same_directions(whole: Path, tmp_path: Path) -> None:
    """Two pipeline stages load the checkpoint of two tensor-parallel ranks, and save it again."""
    saving = ("--train-iters", 2, "--save-interval", 5, "--override-opt_param-scheduler")
    log = _train(tmp_path, *PP2, *saving, "--load", whole, "--ckpt-step", 2)
    assert log.iterations == []
    found, expected = (saved_tensors(folder / "iter_0000002") for folder in (tmp_path, whole))
    for key in KEYS:
        assert torch.equal(found[key], expected[key]), key


def _keys(seed: int) -> TuckerKeys:
    config = MemoryConfig(
        memory_layers=[0], memory_variant="ultramem", memory_num_keys=4, memory_topk=2
    )
    return TuckerKeys(resolve(config, 16), WeightFactory(seed=seed, name="layer_0"), std=1)


def test_watched_directions_change_after_a_step_and_after_loading() -> None:
    keys, others = _keys(1), _keys(2)
    query_T21C = torch.randn(3, 2, 1, 8)
    others.directions.fill_(-1)
    others(query_T21C)
    keys(query_T21C)
    first_2HA, keys.watched = keys.directions.clone(), True
    with torch.no_grad():
        keys.cores.copy_(others.cores)
    keys(query_T21C)
    assert torch.equal(keys.directions, first_2HA)
    keys.stale = True
    keys(query_T21C)
    # the sign is that of before
    assert torch.equal(keys.directions, -others.directions)
    assert (keys.directions.sum(-1) > 0).all()
    saved = others.state_dict() | {"cores": _keys(3).cores.detach()}
    keys.load_state_dict(saved)
    keys(query_T21C)
    wanted_2HA = leading_directions(keys.cores.double().sum(0), others.directions.double())
    assert torch.equal(keys.directions, wanted_2HA.float())
    assert (keys.directions.sum(-1) < 0).all()


def test_directions_stay_in_fp32() -> None:
    keys = _keys(1)
    keys(torch.randn(3, 2, 1, 8))
    before_2HA = keys.directions.clone()
    assert keys.bfloat16().directions.dtype == torch.float32
    assert keys.cores.dtype == torch.bfloat16
    assert torch.equal(keys.directions, before_2HA)
