"""UltraMem and UltraMemV2 in Megatron's training loop."""

import pytest

from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_tiny_training import SP, TP2, _same_steps

pytestmark = pytest.mark.gloo

SIZES = (
    *("--memory-num-keys", 9),  # 81 rows: two ranks hold 40 and 41
    *("--memory-topk", 6, "--memory-final-topk", 5),
    *("--memory-lr", 3e-3),
)
VARIANTS = {
    "ultramem": ("--memory-variant", "ultramem", "--memory-layers", 1, 3, *SIZES),
    # a memory in every layer
    "ultramem-v2": ("--memory-variant", "ultramem-v2", "--memory-layers", 0, 1, 2, 3, *SIZES),
}


@pytest.fixture(scope="module")
def alone() -> dict[str, TrainingLog]:
    """A run of one process for each variant."""
    return {name: run_training(name, 1, *flags) for name, flags in VARIANTS.items()}


def _attention_norms_and_feed_forward() -> int:
    return 4 * 64 * 64 + 4 * 64 + 2 * 64 * 128


# with tied embeddings and a final norm
MODEL = 4 * _attention_norms_and_feed_forward() + 128 * 64 + 2 * 64
TABLES = {"ultramem": 81 * 32, "ultramem-v2": 81 * (32 + 8)}
LAYERS = {
    # query D x 2 C, 4 N keys of each of two ranks per head, cores, two gains, E V x D
    "ultramem": 64 * 64 + 2 * 2 * 18 * 32 * 2 + 2 * 2 * 4 + 2 * 32 + 4 * 32 * 64,
    # a query for each of two ranks, keys, cores, two gains, D x P, V x D
    "ultramem-v2": 2 * 64 * 64 + 2 * 9 * 32 * 2 + 2 * 4 + 2 * 32 + 64 * 8 + 32 * 64,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_falls_and_parameters_are_counted(
    alone: dict[str, TrainingLog], variant: str
) -> None:
    log = alone[variant]
    assert log.iterations == [1, 2, 3, 4, 5]
    assert log.losses[-1] < log.losses[0] - 0.1
    number = 2 if variant == "ultramem" else 4
    expected = MODEL + number * (TABLES[variant] + LAYERS[variant])
    assert log.parameters == {(0, 0): expected}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_take_the_steps_of_one(alone: dict[str, TrainingLog], variant: str) -> None:
    _same_steps(run_training("two ranks", 2, *VARIANTS[variant], *TP2, *SP), alone[variant])
