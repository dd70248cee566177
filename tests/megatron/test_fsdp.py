"""torch's FSDP2 around memory layers: the tables stay out of it, everything else is in it."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from megamem.config import ConfigurationError, MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.megatron import compat
from megamem.megatron.model.fully_sharded import leave_tables_out, refuse_sharded, sharded_weight
from megamem.megatron.optimizer.chain import _restore_steps
from megamem.resolution import resolve
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.distributed import run_distributed
from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_tiny_training import FULL, MEMORY, SP, TP2, WIDE, _same_steps

UNTIED = ("--untie-embeddings-and-output-weights",)
FSDP = ("--use-torch-fsdp2", *UNTIED)
EVEN = ("--memory-num-keys", 8)  # two ranks divide the sub-keys
LONG = ("--train-iters", 8, "--lr-decay-iters", 8)

pytestmark = pytest.mark.gloo


def _train(ranks: int, *flags: object) -> TrainingLog:
    return run_training("fsdp", ranks, *MEMORY, *EVEN, *LONG, *flags)


trains = pytest.mark.skipif(
    not compat.RUNS_TORCH_FSDP2, reason="before Megatron-Core 0.19 it is refused: test_checks.py"
)


@dataclass(frozen=True)
class Saved:
    """A run of eight steps, and the folder of its checkpoints."""

    log: TrainingLog
    folder: Path

    def tensors(self, iteration: int) -> dict[str, Tensor]:
        return saved_tensors(self.folder / f"iter_{iteration:07}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """One process without FSDP."""
    folder = tmp_path_factory.mktemp("alone")
    return Saved(_train(1, *UNTIED, "--save", folder, "--save-interval", 8), folder)


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """FSDP on two ranks, over which the rows of the table are spread; two microbatches a step."""
    folder = tmp_path_factory.mktemp("spread")
    flags = (*WIDE, "--micro-batch-size", 1, "--save", folder, "--save-interval", 4)
    return Saved(_train(2, *FSDP, *flags), folder)


@trains
def test_weights_and_state_are_those_of_one_process(alone: Saved, spread: Saved) -> None:
    """They also have the keys and shapes of a run without FSDP."""
    _same_steps(spread.log, alone.log)
    one, two = alone.tensors(8), spread.tensors(8)
    assert {key: tensor.shape for key, tensor in two.items()} == {
        key: tensor.shape for key, tensor in one.items()
    }
    for key, tensor in one.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-5, msg=key)


@trains
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="replicas"),
        pytest.param((*WIDE, "--memory-mode", "column", *FULL), id="columns over dp, recompute"),
        pytest.param((*TP2, *SP), id="tp, sequence parallel", marks=pytest.mark.slow),
        pytest.param(
            (*TP2, "--torch-fsdp2-no-reshard-after-forward"),
            id="tp, no reshard",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_ranks_take_the_steps_of_one(alone: Saved, flags: tuple) -> None:
    """All of it: pytest -m "slow or not slow" tests/megatron/test_fsdp.py."""
    _same_steps(_train(2, *FSDP, *flags), alone.log)


@trains
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ultramem", "ultramem-v2"])
def test_ultramem_takes_the_steps_of_one(variant: str) -> None:
    """pytest -m slow tests/megatron/test_fsdp.py -k ultramem"""
    flags = ("--memory-variant", variant, "--seed", 7)
    _same_steps(_train(2, *FSDP, *flags), _train(1, *UNTIED, *flags))


@trains
def test_tables_are_scaled_as_the_model_where_the_loss_is_a_sum(alone: Saved) -> None:
    """Megatron does not divide gradients of FSDP2 by the tokens: they are means of ranks' sums."""
    tokens = 2 * 32
    log = _train(2, *FSDP, "--calculate-per-token-loss")
    assert log.losses[0] == pytest.approx(alone.log.losses[0], rel=2e-6)
    assert log.grad_norms[0] == pytest.approx(tokens * alone.log.grad_norms[0], rel=5e-4)


@trains
@pytest.mark.parametrize(
    ("ranks", "flags"), [(2, FSDP), (1, UNTIED)], ids=["replicas", "without fsdp"]
)
def test_a_run_resumes_with_another_layout(
    alone: Saved, spread: Saved, ranks: int, flags: tuple
) -> None:
    log = _train(ranks, *flags, "--load", spread.folder, "--ckpt-step", 4)
    assert log.iterations == [5, 6, 7, 8]
    # without the first two, because Megatron prints the second as a mean
    assert log.losses[-2:] == pytest.approx(alone.log.losses[-2:], rel=2e-6)
    assert log.grad_norms[-3:] == pytest.approx(alone.log.grad_norms[-3:], abs=1.1e-3)


def test_steps_are_restored_in_every_optimizer_of_a_chain() -> None:
    """Fused optimizers have them in groups, those of torch for each weight."""
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    fused, plain = (torch.optim.SGD([weight]) for weight in weights)
    fused.param_groups[0]["step"] = 0
    plain.state[weights[1]] = {"step": torch.zeros(())}
    members: list[Any] = [SimpleNamespace(optimizer=fused), SimpleNamespace(optimizer=plain)]
    saved = {
        0: {"optimizer": {"param_groups": [{"step": 3}], "state": {}}},
        1: {"param_groups": [{}], "state": {"common_step": torch.tensor(4.0)}},
    }
    _restore_steps(ChainedOptimizer(members), saved)
    assert fused.param_groups[0]["step"] == 3 and "step" not in plain.param_groups[0]
    assert plain.state[weights[1]]["step"] == 4


class Model(nn.Module):
    """A memory layer in a layer, with the table beside it, as Megatron's models have them."""

    def __init__(self) -> None:
        super().__init__()
        config = MemoryConfig(memory_layers=[0], memory_num_keys=16, memory_topk=2)
        spec = resolve(config, 16)
        pool = MemoryPool(spec)
        self.layer = nn.Sequential(MemoryLayer(spec, pool))
        self.tables = pool.tables
        for table in pool:
            table.leave_to_optimizer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _tables_are_left_out() -> None:
    model = Model()
    (table,) = model.tables.values()
    weight, rows = table.weight, table.weight.clone()
    others = sum(w.numel() for w in model.parameters()) - weight.numel()
    x, plain = torch.randn(3, 1, 16), Model()
    expected = plain(x)
    mesh = init_device_mesh("cpu", (2,))
    wrap = leave_tables_out(fully_shard)
    for module in (model.layer, model):
        wrap(module, mesh=mesh, reshard_after_forward=True)

    assert table.weight is weight and torch.equal(weight, rows)
    left = [name for name, w in model.named_parameters() if not isinstance(w, DTensor)]
    assert left == ["tables.v.weight"], left
    assert model.layer[0].keys.sub_keys.placements == (Shard(2),)

    gathered: list[int] = []
    # torch has renamed it
    name = next(n for n in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, n))
    gather = getattr(dist, name)

    def counted(output: Tensor, *args: Any, **options: Any) -> Any:
        gathered.append(output.numel())
        return gather(output, *args, **options)

    with mock.patch.object(dist, name, counted):
        out = model(x)
        out.sum().backward()
    torch.testing.assert_close(out, expected)
    # for the forward and for the backward
    assert gathered == [others, others]
    refuse_sharded(dict(model.tables))

    fully_shard(plain, mesh=mesh)
    with pytest.raises(ConfigurationError, match="to value table v, .* call keep_tables"):
        refuse_sharded(dict(plain.tables))


def test_a_table_is_neither_sharded_nor_gathered() -> None:
    run_distributed(_tables_are_left_out, 2)


class Part(SimpleNamespace):
    """What one of several ranks has of a weight [3, length] of FSDP2, which shards columns."""

    def __init__(self, whole: Tensor, rank: int, ranks: int) -> None:
        parts = whole.chunk(ranks, 1)
        local = parts[rank] if rank < len(parts) else whole[:, :0]
        mesh = SimpleNamespace(size=lambda: ranks, get_local_rank=lambda: rank)
        super().__init__(
            _local_tensor=local, device_mesh=mesh, placements=(Shard(1),), shape=whole.shape
        )

    def dim(self) -> int:
        return len(self.shape)


@pytest.mark.parametrize(("length", "ranks"), [(8, 2), (9, 2), (2, 4), (9, 4)])
def test_parts_in_a_checkpoint_make_up_the_weight(length: int, ranks: int) -> None:
    """torch gives every rank as much as the first, until there is nothing left."""
    whole, found = torch.arange(3.0 * length).view(3, length), torch.zeros(3, length)
    for rank in range(ranks):
        entry: Any = SimpleNamespace(key="weight", replica_id=(0, 3, rank))
        weight: Any = Part(whole, rank, ranks)
        part = sharded_weight(entry, weight)
        assert part.key == "weight" and part.replica_id == (0, 3, 0)
        assert part.data is weight._local_tensor and part.global_shape == (3, length)
        assert part.axis_fragmentations == (None if length % ranks else (1, ranks))
        start = part.global_offset[1]
        found[:, start : start + part.local_shape[1]] += part.data
    assert torch.equal(found, whole)
