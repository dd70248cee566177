"""UltraMem and UltraMemV2 go on from checkpoints: on other ranks, with other flags, sparsely."""

from pathlib import Path

import pytest
import torch

from megamem.checkpoint import table_key
from megamem.ops import leading_directions
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_tiny_training import DO, PP2, SP, TP2, WIDE
from tests.megatron.test_ultramem import SHARED, SIZES, VARIANTS
from tests.megatron.test_ultramem_skip import SKIP

LONG = ("--train-iters", 6, "--lr-decay-iters", 6)
RUNS = {"ultramem": SKIP, "ultramem-v2": VARIANTS["ultramem-v2"]}
TABLES = {
    "ultramem": ["layer_0", "layer_2"],
    "ultramem-v2": [f"layer_{layer}{table}" for layer in range(4) for table in ("", ".p")],
}
LIMIT = 5
SLOW = pytest.mark.slow

pytestmark = pytest.mark.gloo

Saved = dict[str, tuple[TrainingLog, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Runs of one process, and the folders of what they saved after half of their steps."""
    found = {}
    for name, flags in RUNS.items():
        folder = tmp_path_factory.mktemp(name)
        saving = ("--save", folder, "--save-interval", 3)
        found[name] = run_training(name, 1, *flags, *LONG, *saving), folder
    return found


@pytest.mark.parametrize("variant", ["ultramem", pytest.param("ultramem-v2", marks=SLOW)])
def test_other_ranks_take_all_settings_from_the_checkpoint(saved: Saved, variant: str) -> None:
    whole, folder = saved[variant]
    flags = ("--load", folder, "--ckpt-step", 3, "--use-checkpoint-args", "--memory-lr", 3e-3)
    # the order of the data depends on the seed, which is not taken
    flags += ("--seed", 7 if variant == "ultramem-v2" else 1234)
    log = run_training("args", 2, *LONG, *flags, *TP2, *SP)
    assert log.iterations == [4, 5, 6]
    # without the second, which Megatron prints as the mean of the first two
    found, wanted = log.losses[::2], whole.losses[3::2]
    assert found == pytest.approx(wanted, rel=2e-6)
    assert log.grad_norms == pytest.approx(whole.grad_norms[3:], abs=1.1e-3)


@pytest.mark.parametrize("variant", [pytest.param("ultramem", marks=SLOW), "ultramem-v2"])
def test_finetuning_moves_a_few_rows_of_each_table_and_nothing_else(
    saved: Saved, tmp_path: Path, variant: str
) -> None:
    _, folder = saved[variant]
    sparse = ("--memory-finetune-rows", LIMIT, "--memory-optimizer", "sgd", "--memory-lr", 0.1)
    starting = ("--load", folder, "--finetune", "--seed", 11, "--lr-warmup-iters", 0)
    saving = ("--save", tmp_path, "--save-interval", 2, "--train-iters", 2)
    log = run_training("finetuned", 1, *RUNS[variant], *sparse, *starting, *saving)
    assert log.iterations == [1, 2] and all(norm > 0 for norm in log.grad_norms)
    old, new = (
        saved_tensors(path) for path in (folder / "iter_0000006", tmp_path / "iter_0000002")
    )
    tables = {table_key(table) for table in TABLES[variant]}
    for key in tables:
        moved = (old[key] != new[key]).any(1).sum()
        assert 0 < moved <= 2 * LIMIT, key
    directions = [key for key in old if key.endswith("keys.directions")]
    assert len(directions) == len({table.removesuffix(".p") for table in TABLES[variant]})
    for key in directions:
        # a checkpoint holds those of the last forward, before the last step
        core_HAA = old[key.replace("directions", "cores")].double().sum(0)
        assert torch.equal(new[key], leading_directions(core_HAA, old[key].double()).float()), key
    others = {key for key in old if not key.startswith("optimizer.")} - tables - {*directions}
    assert len(others) > 20
    for key in others:
        assert torch.equal(old[key], new[key]), key


ROWS_COLUMNS = [
    (2, (*TP2,)),
    (2, (*TP2, *SP, "--memory-mode", "column")),
    (4, (*TP2, "--memory-mode", "2d", "--memory-group-size", 4)),
    (1, ()),
]
MORE_RANKS = [
    (1, ()),
    (2, (*TP2, *SP)),
    (4, ("--tensor-model-parallel-size", 4, "--memory-wire", "alltoall")),
    (2, WIDE),
]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "lazy_adamw", "rowwise_adamw"])
@pytest.mark.parametrize(
    ("variant", "layouts"),
    [
        pytest.param("ultramem", ROWS_COLUMNS, id="ultramem, modes"),
        pytest.param("ultramem", MORE_RANKS, id="ultramem, ranks"),
        pytest.param("ultramem-v2", MORE_RANKS, id="ultramem-v2, ranks"),
    ],
)
def test_each_layout_goes_on_where_another_has_ended(
    tmp_path: Path, variant: str, layouts: list, optimizer: str
) -> None:
    """pytest -m slow tests/megatron/test_ultramem_resume.py, 6 minutes with all others."""
    length, each = 8, 2
    flags = (*RUNS[variant], "--memory-optimizer", optimizer)
    flags += ("--train-iters", length, "--lr-decay-iters", length)
    whole = run_training("uninterrupted", 1, *flags)
    saving = ("--save", tmp_path, "--save-interval", each, "--exit-interval", each)
    losses: list[float] = []
    for number, (ranks, layout) in enumerate(layouts):
        loading = ("--load", tmp_path) if number else ()
        log = run_training(f"layout {number}", ranks, *flags, *layout, *saving, *loading)
        assert log.iterations == [each * number + 1, each * number + 2]
        # Megatron prints the mean of the first two steps of a run in the second place
        losses += [log.losses[0], 2 * log.losses[1] - log.losses[0]]
    wanted = [whole.losses[0], 2 * whole.losses[1] - whole.losses[0], *whole.losses[2:]]
    assert losses == pytest.approx(wanted, rel=4e-6)


VP2 = (*PP2, "--num-virtual-stages-per-pipeline-rank", 2)
STAGES = {
    "ultramem, skipping": SKIP,
    "ultramem, both stages": ("--memory-variant", "ultramem", "--memory-layers", 1, 3, *SIZES),
    "ultramem-v2": VARIANTS["ultramem-v2"],
    "ultramem-v2, shared by two": SHARED,
    # layers 0 and 2 are two virtual stages of one rank
    "ultramem-v2, shared by virtual stages": (*SHARED, "--memory-layers", 0, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "flags"),
    [
        pytest.param("ultramem, skipping", 2, PP2),
        pytest.param("ultramem, skipping", 4, (*PP2, *WIDE, *DO)),
        pytest.param("ultramem, both stages", 2, VP2),
        pytest.param("ultramem-v2", 2, PP2),
        pytest.param("ultramem-v2", 4, (*VP2, *TP2, *SP)),
        pytest.param("ultramem-v2, shared by two", 4, (*PP2, *TP2)),
        pytest.param("ultramem-v2, shared by virtual stages", 2, VP2),
    ],
)
def test_stages_take_the_steps_of_one_process(
    tmp_path: Path, name: str, ranks: int, flags: tuple
) -> None:
    """Stages draw other initial weights than one process, so both start from one checkpoint."""
    sharded = (*DO, "--dist-ckpt-optim-fully-reshardable") if DO[0] in flags else ()
    run = (*STAGES[name], *LONG, "--micro-batch-size", 1, *sharded)
    saving = ("--save", tmp_path, "--save-interval", 3, "--exit-interval", 3)
    run_training("start", 1, *run, *saving)
    alone = run_training("alone", 1, *run, "--load", tmp_path)
    log = run_training("stages", ranks, *run, "--load", tmp_path, *flags)
    assert log.iterations == alone.iterations == [4, 5, 6]
    assert log.losses == pytest.approx(alone.losses, rel=2e-6)
    assert log.grad_norms == pytest.approx(alone.grad_norms, abs=1.1e-3)
