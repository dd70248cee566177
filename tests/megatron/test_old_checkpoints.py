"""What older commits saved loads, and goes on as it did there.

checkpoints/COMMIT.tar.xz holds checkpoints of iteration 3 that the commit of that name wrote, from
the runs below; LOSSES are those of its own iterations 4 to 6.
"""

import tarfile
from pathlib import Path

import megatron.core
import pytest
from packaging.version import Version

from tests.helpers.megatron_runs import run_training

pytestmark = [
    pytest.mark.gloo,
    pytest.mark.skipif(
        Version(megatron.core.__version__) < Version("0.19"),
        reason="written by Megatron 0.19, whose checkpoints older releases cannot read",
    ),
]

ARCHIVE = Path(__file__).parent / "checkpoints/a4677c2.tar.xz"
SMALL = (
    *("--num-layers", 2),
    *("--hidden-size", 16),
    *("--num-attention-heads", 2),
    *("--ffn-hidden-size", 16),
    *("--vocab-size", 30),
    *("--make-vocab-size-divisible-by", 1),
    *("--seq-length", 16),
    *("--max-position-embeddings", 16),
    *("--train-iters", 6),
    *("--lr-decay-iters", 6),
)
MEMORIES = {
    # two ranks that shared the table saved it
    "memory+": (
        *("--memory-layers", 0, 1),
        *("--memory-num-keys", 6),
        *("--memory-heads", 2),
        *("--memory-topk", 3),
        *("--memory-optimizer", "lazy_adamw"),
    ),
    "peer": (
        *("--memory-layers", 1),
        *("--memory-variant", "peer"),
        *("--memory-num-keys", 5),
        *("--memory-heads", 2),
        *("--memory-topk", 2),
        *("--memory-key-dim", 8),
        *("--memory-optimizer", "rowwise_adamw"),
        "--memory-qk-norm",
    ),
}
LOSSES = {
    "memory+": [3.362774, 3.358189, 3.362436],
    "peer": [3.380544, 3.371473, 3.363252],
}


@pytest.mark.parametrize(("variant", "ranks"), [("memory+", 1), ("peer", 1), ("memory+", 2)])
def test_goes_on_as_the_commit_that_saved_it(variant: str, ranks: int, tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    wide = ("--memory-group-size", 2) if ranks == 2 else ()
    flags = (*SMALL, *MEMORIES[variant], *wide, "--load", tmp_path / variant)
    log = run_training(f"{variant} of {ARCHIVE.stem}", ranks, *flags)
    assert log.iterations == [4, 5, 6]
    # another processor may round differently
    assert log.losses == pytest.approx(LOSSES[variant], rel=1e-6 if ranks == 1 else 1e-5)
