"""UltraMem and UltraMemV2 in Megatron's training loop."""

import pytest

from megamem.config import ConfigurationError
from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_checks import _check
from tests.megatron.test_tiny_training import (
    DO,
    FULL,
    OVERLAP,
    ROUTED,
    SELECTIVE,
    SP,
    TP2,
    WIDE,
    _same_steps,
)

SIZES = (
    *("--memory-num-keys", 9),  # 81 rows: two ranks hold 40 and 41
    *("--memory-topk", 6, "--memory-final-topk", 5),
    *("--memory-lr", 3e-3),
)
VARIANTS = {
    "ultramem": ("--memory-variant", "ultramem", "--memory-layers", 1, 3, *SIZES),
    # a memory in every layer; with this seed no lookup is decided by rounding
    "ultramem-v2": (
        *("--memory-variant", "ultramem-v2", "--memory-layers", 0, 1, 2, 3, *SIZES),
        *("--seed", 7),
    ),
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


@pytest.mark.gloo
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


SLOW = pytest.mark.slow


@pytest.mark.gloo
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, (*TP2, *SP, *SELECTIVE), id="tp, sp, selective recompute"),
        pytest.param(2, (*TP2, *ROUTED, *FULL), marks=SLOW, id="tp, alltoall, pieces, recompute"),
        pytest.param(2, (*TP2, "--memory-group-size", 1), marks=SLOW, id="replicas inside tp"),
        pytest.param(2, (*DO, *OVERLAP, "--overlap-param-gather"), marks=SLOW, id="dp, do"),
        pytest.param(2, (*WIDE, *DO, *OVERLAP, *FULL), marks=SLOW, id="rows over dp"),
        pytest.param(1, ("--micro-batch-size", 1), marks=SLOW, id="accumulation"),
        pytest.param(4, (*TP2, *SP, "--memory-group-size", 4), marks=SLOW, id="rows over tp, dp"),
    ],
)
def test_ranks_take_the_steps_of_one_process(
    alone: dict[str, TrainingLog], variant: str, ranks: int, flags: tuple
) -> None:
    """The slow ones: pytest -m slow tests/megatron/test_ultramem.py, 3 minutes."""
    log = run_training("ranks", ranks, *VARIANTS[variant], *flags)
    _same_steps(log, alone[variant])


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, (*WIDE, "--memory-mode", "column", *FULL), id="columns over dp"),
        pytest.param(2, (*TP2, *SP, "--memory-mode", "column"), id="columns over tp"),
        pytest.param(
            4, (*TP2, *SP, "--memory-mode", "2d", "--memory-group-size", 4), id="rows and columns"
        ),
    ],
)
def test_columns_take_the_steps_of_one_process(
    alone: dict[str, TrainingLog], ranks: int, flags: tuple
) -> None:
    log = run_training("columns", ranks, *VARIANTS["ultramem"], *flags)
    _same_steps(log, alone["ultramem"])


SHARED = (*VARIANTS["ultramem-v2"], "--memory-share-layers", 2)


@pytest.mark.gloo
def test_neighbours_of_a_stage_share_tables() -> None:
    """Tensor-parallel ranks hold half of both tables, each of which two layers read."""
    alone = run_training("one process", 1, *SHARED)
    assert alone.losses[-1] < alone.losses[0] - 0.05
    # keys for both layers' rows: isqrt(2 * 81) = 12 of them a side
    layer = LAYERS["ultramem-v2"] + 2 * (12 - 9) * 32 * 2
    assert alone.parameters == {(0, 0): MODEL + 4 * (layer + TABLES["ultramem-v2"])}
    _same_steps(run_training("tp", 2, *SHARED, *TP2, *SP), alone)


V2 = {"memory_variant": "ultramem-v2", "memory_share_layers": 2, "memory_topk": 8}


def test_tables_of_several_stages_are_refused() -> None:
    _check(memory={**V2, "memory_layers": [0, 1, 4, 5]}, pipeline_model_parallel_size=2)
    # both are on the first stage, on different virtual ones
    virtual = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    _check(memory={**V2, "memory_layers": [0, 4]}, **virtual)
    with pytest.raises(ConfigurationError, match="2 makes layers 1, 4 share tables, but they are"):
        _check(memory={**V2, "memory_layers": [1, 4]}, pipeline_model_parallel_size=2)
    with pytest.raises(ConfigurationError, match="2 makes layers 1, 2 share tables, but they are"):
        _check(memory={**V2, "memory_layers": [1, 2]}, **virtual)


def test_sets_of_different_sizes_are_refused() -> None:
    said = "2 does not divide the 3 layers of --memory-layers 0 1 2, .*; use one of 1, 3"
    with pytest.raises(ConfigurationError, match=said):
        _check(memory={**V2, "memory_layers": [0, 1, 2]})
