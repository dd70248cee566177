"""Sparse finetuning in Megatron's training loop: which rows change, are counted and are kept."""

import argparse
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from megamem.checkpoint import SHARED, state_key, table_key
from megamem.config import MemoryConfig
from megamem.megatron.startup.saved_model import checkpoint_problems
from megamem.resolution import resolve
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.helpers.reads import FOLDER, reads
from tests.megatron.test_tiny_training import DO, OVERLAP, SP, TP2, WIDE
from tests.optimizer.test_sparse_rows import best_rows

# every batch reads only a few of the rows
MEMORY = (
    *("--memory-layers", 0, 1),
    *("--memory-num-keys", 25),
    *("--memory-heads", 1),
    *("--memory-topk", 2),
    *("--memory-lr", 0.1),
)
ROWS, LIMIT = 625, 5
SPARSE = ("--memory-finetune-rows", LIMIT, "--memory-optimizer", "sgd", "--memory-metrics", "on")
# the first step of a warm-up has a learning rate of zero
SPARSE += ("--lr-warmup-iters", 0)
# Megatron compares the length of a resumed run's schedule with that of the run before
LONGER = ("--override-opt-param-scheduler", "--train-iters")
WEIGHT, HITS, BATCHES = table_key(SHARED), state_key(SHARED, "hits"), state_key(SHARED, "batches")

pytestmark = pytest.mark.gloo


def _run(name: str, ranks: int, folder: Path, *flags: object, iterations: int) -> TrainingLog:
    """Train, save at the end, and write the reads of each step to folder / reads."""
    (folder / "reads").mkdir(parents=True)
    return run_training(
        name,
        ranks,
        *(*MEMORY, *LONGER, iterations, "--save", folder, "--save-interval", iterations, *flags),
        module="tests.helpers.reads",
        environment={FOLDER: str(folder / "reads")},
    )


def _saved(folder: Path) -> dict[str, Tensor]:
    (last,) = folder.glob("iter_*")
    return saved_tensors(last)


def _moved(before: Tensor, after: Tensor) -> list[int]:
    return (before != after).any(1).nonzero().squeeze(1).tolist()


def _chosen(folder: Path, before: dict[str, Tensor]) -> list[int]:
    """The rows to train by the definition, from the lookups of a run and its background."""
    hits, batches = [0] * ROWS, 0
    if HITS in before:
        hits, batches = before[HITS].tolist(), int(before[BATCHES])
    rows: set[int] = set()
    for lookups in reads(folder / "reads"):
        rows.update(best_rows([lookups[row] for row in range(ROWS)], hits, batches, LIMIT))
    return sorted(rows)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of five ordinary steps of two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("before")
    _run("before", 2, folder, *TP2, *SP, iterations=5)
    return folder


@pytest.fixture(scope="module")
def finetuned(before: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingLog, Path]:
    """Three steps of sparse finetuning in one process."""
    folder = tmp_path_factory.mktemp("finetuned")
    starting = ("--load", before, "--finetune", "--seed", 7)
    return _run("finetuned", 1, folder, *starting, *SPARSE, iterations=3), folder


def test_a_checkpoint_counts_the_batches_that_read_each_row(before: Path) -> None:
    expected = torch.zeros(ROWS, dtype=torch.int32)
    for lookups in (steps := reads(before / "reads")):
        assert sum(lookups.values()) == 4 * 32 * 2 * 2
        expected[list(lookups)] += 1
    saved = _saved(before)
    assert len(steps) == 5 and saved[BATCHES].tolist() == [5]
    assert torch.equal(saved[HITS], expected)
    assert expected.unique().numel() > 3, "all rows are read alike: nothing is tested"


def test_finetuning_moves_the_chosen_rows_and_nothing_else(
    before: Path, finetuned: tuple[TrainingLog, Path]
) -> None:
    log, folder = finetuned
    old, new = _saved(before), _saved(folder)
    moved = _moved(old[WEIGHT], new[WEIGHT])
    assert LIMIT <= len(moved) <= 3 * LIMIT
    assert moved == _chosen(folder, old)
    others = {key for key in old if not key.startswith("optimizer.")} | {HITS, BATCHES}
    assert len(others) > 20
    for key in others - {WEIGHT}:
        assert torch.equal(old[key], new[key]), key
    shown = re.findall(r"rows trained (\S+) \| read by (\S+)% of lookups", log.stdout)
    assert [float(rows) for rows, _ in shown] == [LIMIT] * 3
    hits, batches = old[HITS].tolist(), int(old[BATCHES])
    for lookups, (_, share) in zip(reads(folder / "reads"), shown, strict=True):
        rows = best_rows([lookups[row] for row in range(ROWS)], hits, batches, LIMIT)
        theirs = sum(lookups[row] for row in rows)
        assert float(share) == pytest.approx(100 * theirs / sum(lookups.values()), abs=0.06)
    assert all(norm > 0 for norm in log.grad_norms)


def test_ranks_that_hold_columns_resume_it_and_skip_a_batch_with_a_nan(
    finetuned: tuple[TrainingLog, Path], tmp_path: Path
) -> None:
    """The gradient is not finite in a row that is not chosen, and the batch is skipped."""
    _, folder = finetuned
    log = run_training(
        "resumed",
        2,
        *(*MEMORY, *SPARSE, *LONGER, 6, "--load", folder, *WIDE, "--memory-mode", "column"),
        *("--save", tmp_path, "--save-interval", 6),
        module="tests.helpers.faulty",
        environment={"FAULT": "nan 1 2"},
    )
    assert log.skipped == [0, 1, 0]
    assert "rank 1: the gradient of value table shared is not finite" in log.stdout
    old, new = _saved(folder), _saved(tmp_path)
    assert LIMIT <= len(_moved(old[WEIGHT], new[WEIGHT])) <= 2 * LIMIT
    assert old.keys() == new.keys()
    for key in old.keys() - {WEIGHT}:
        assert torch.equal(old[key], new[key]), key


def test_bf16_and_the_distributed_optimizer_stay_bit_for_bit(before: Path, tmp_path: Path) -> None:
    """Weights, fp32 copies and moments stay, also with the background of another checkpoint."""
    # the other format saves uninitialised padding between parameters
    flags = (
        "--bf16",
        *DO,
        *OVERLAP,
        "--overlap-param-gather",
        "--dist-ckpt-optim-fully-reshardable",
    )
    first, second = tmp_path / "first", tmp_path / "second"
    _run("bf16", 2, first, *flags, iterations=2)
    sparse = (*SPARSE, "--memory-background", before, "--load", first)
    _run("bf16 finetuned", 2, second, *flags, *sparse, iterations=4)
    old, new, background = _saved(first), _saved(second), _saved(before)
    master = state_key(SHARED, "master")
    assert _moved(old[master], new[master]) == _chosen(second, background)
    assert 0 < len(_moved(old[WEIGHT], new[WEIGHT])) <= 2 * LIMIT
    lost = {state_key(SHARED, name) for name in ("exp_avg", "exp_avg_sq")}
    assert old.keys() - lost == new.keys()
    frozen = new.keys() - {WEIGHT, master, HITS, BATCHES}
    states = {key.split(".")[2] for key in frozen if key.startswith("optimizer.state.")}
    assert states == {"exp_avg", "exp_avg_sq", "param"}
    for key in frozen:
        assert torch.equal(old[key], new[key]), key
    for key in (HITS, BATCHES):
        assert torch.equal(new[key], background[key]) and not torch.equal(new[key], old[key])


def _without_counters(folder: Path, copy: Path) -> Path:
    """A checkpoint as it was saved before read counts existed."""
    shutil.copytree(folder, copy)
    (last,) = copy.glob("iter_*")
    metadata = FileSystemReader(str(last)).read_metadata()
    for key in (HITS, BATCHES):
        del metadata.state_dict_metadata[key]
    with (last / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    return copy


def test_a_checkpoint_without_counters_still_loads(before: Path, tmp_path: Path) -> None:
    old = _without_counters(before, tmp_path / "old")
    folder = tmp_path / "finetuned"
    log = _run("old", 2, folder, *TP2, *SPARSE, "--load", old, "--finetune", iterations=2)
    assert f"--load {old} has no read counts" in log.stdout
    new = _saved(folder)
    assert _moved(_saved(old)[WEIGHT], new[WEIGHT]) == _chosen(folder, {})
    assert not new[HITS].any() and not new[BATCHES].any()

    config = MemoryConfig(
        memory_layers=[0, 1],
        memory_num_keys=25,
        memory_heads=1,
        memory_topk=2,
        memory_optimizer="sgd",
        memory_finetune_rows=LIMIT,
        memory_background=str(old),
    )
    (problem,) = checkpoint_problems(resolve(config, 64), argparse.Namespace(load=None))
    assert f"--memory-background {old} has no read counts for table shared" in problem
