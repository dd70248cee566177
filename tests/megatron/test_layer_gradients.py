"""Gradients of memory layers' own weights under tensor parallelism: summed once a step."""

import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.megatron.optimizer import layer_gradients
from megamem.megatron.optimizer.layer_gradients import sum_once_a_step
from megamem.resolution import resolve
from tests.helpers.distributed import run_distributed
from tests.helpers.megatron_runs import TrainingLog, run_training

MEMORY = (
    *("--memory-layers", 0, 1),
    *("--memory-num-keys", 9),
    *("--memory-heads", 2),
    *("--memory-topk", 4),
    *("--memory-lr", 3e-3),
)
TP2 = ("--tensor-model-parallel-size", 2)
LAYERS, WEIGHTS, MICROBATCHES, STEPS = 2, 7, 2, 5

pytestmark = pytest.mark.gloo


def _run(ranks: int, *flags: object, each_backward: bool = False) -> TrainingLog:
    return run_training(
        "sums",
        ranks,
        *(*MEMORY, *TP2, *flags),
        module="tests.helpers.counted_sums",
        environment={"SUMS": "each_backward" if each_backward else "once a step"},
    )


def _numbers(log: TrainingLog, name: str) -> list[float]:
    """The numbers of all ranks."""
    return sorted(float(number) for number in re.findall(rf"^{name}: (\S+)$", log.stdout, re.M))


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, (), id="tp"),
        pytest.param(2, ("--calculate-per-token-loss",), id="tp, per-token loss"),
        pytest.param(
            4,
            ("--use-distributed-optimizer", "--overlap-grad-reduce", "--micro-batch-size", 1),
            id="tp and dp, distributed optimizer, overlap",
        ),
    ],
)
def test_one_sum_a_step_gives_the_steps_of_a_sum_in_every_backward(ranks, flags) -> None:
    once, before = _run(ranks, *flags), _run(ranks, *flags, each_backward=True)
    assert _numbers(once, "layer sums") == [STEPS] * ranks
    assert _numbers(before, "layer sums") == [LAYERS * WEIGHTS * MICROBATCHES * STEPS] * ranks
    # fp32 sums in another order: the ranks of all microbatches, where it was the microbatches of
    # all ranks
    assert once.losses == pytest.approx(before.losses, rel=1e-6)
    assert once.grad_norms == pytest.approx(before.grad_norms, abs=1.1e-3)
    digests = [_numbers(log, "digest") for log in (once, before)]
    assert digests[0] == pytest.approx(digests[1], rel=1e-7)


def test_without_replicated_tokens_nothing_is_summed_here() -> None:
    """Under sequence parallelism Megatron sums, because the weights are marked."""
    assert _numbers(_run(2, "--sequence-parallel"), "layer sums") == [0, 0]


class _Chunk(nn.Module):
    """What sum_once_a_step needs of Megatron's DistributedDataParallel: gradients in buffers."""

    def __init__(self) -> None:
        super().__init__()
        config = MemoryConfig(memory_layers=[0], memory_num_keys=5, memory_topk=2)
        spec = resolve(config, 8)
        pool = MemoryPool(spec, dtype=torch.float64)
        self.layer = MemoryLayer(
            spec, pool, group=dist.group.WORLD, tokens_sharded=False, dtype=torch.float64
        )
        self.finished = 0

    def prepare(self, frozen: str) -> None:
        self.layer.get_parameter(frozen).requires_grad_(False)
        for weight in self.layer.parameters():
            if weight.requires_grad:
                weight.main_grad = torch.zeros_like(weight)

    def add(self, microbatches: list[Tensor]) -> None:
        """Run forward and backward of each microbatch, and add its gradients to the buffers."""
        for hidden in microbatches:
            self.layer(hidden).square().sum().backward()
            for weight in self.layer.parameters():
                if weight.requires_grad:
                    weight.main_grad += weight.grad
                    weight.grad = None

    def finish_grad_sync(self, force_all_reduce: bool = False) -> None:
        self.finished += 1 + force_all_reduce

    def take(self) -> dict[str, Tensor]:
        """Return the gradients, and set them to zero."""
        found = {}
        for name, weight in self.layer.named_parameters():
            if weight.requires_grad:
                found[name] = weight.main_grad.clone()
                weight.main_grad.zero_()
        return found


def _sums_in_every_way() -> None:
    torch.manual_seed(3)
    microbatches = [torch.randn(5, 2, 8, dtype=torch.float64) for _ in range(2)]
    chunk, bare = _Chunk(), _Chunk()
    # without gradients of DistributedDataParallel's, layers keep their sums in the backward
    assert not sum_once_a_step([bare]) and bare.layer.gradient_group.in_backward
    chunk.prepare(frozen="output.gate.bias")
    chunk.add(microbatches)
    expected = chunk.take()

    (gradients,) = sum_once_a_step([chunk])
    assert not sum_once_a_step([chunk]), "a second optimizer would sum a second time"
    for limit in (0, 40, 2**20):
        with mock.patch.object(layer_gradients, "JOINED_BELOW", limit):
            # a loop that finishes gradients, as Megatron's does; then one that does not
            for finishes in (True, False):
                chunk.add(microbatches)
                if finishes:
                    chunk.finish_grad_sync(force_all_reduce=True)
                    torch.testing.assert_close(
                        {
                            n: w.main_grad
                            for n, w in chunk.layer.named_parameters()
                            if n in expected
                        },
                        expected,
                    )
                gradients.before_step()
                torch.testing.assert_close(chunk.take(), expected)
    assert chunk.finished == 3 * 2, "its own finish_grad_sync was not called, or not as it was"


def test_gradients_are_summed_once_however_the_loop_ends() -> None:
    run_distributed(_sums_in_every_way, 2)
