"""examples/pretrain_gpt.py trains what Megatron-LM's own script trains, on every layout."""

import os
from pathlib import Path

import megatron.core
import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.helpers.megatron_runs import TrainingLog, run_training
from tests.megatron.test_tiny_training import MEMORY

TP2 = ("--tensor-model-parallel-size", 2)
PP2 = ("--pipeline-model-parallel-size", 2)
OTHER_MODEL = (
    *("--swiglu", "--normalization", "RMSNorm", "--position-embedding-type", "learned_absolute"),
    *("--untie-embeddings-and-output-weights", "--calculate-per-token-loss"),
)
RELEASE = ".".join(megatron.core.__version__.split(".")[:2])
# what pretrain_gpt.py of Megatron-LM core_r0.19.0 logs with the flags of megatron_runs.py: losses
# and gradient norms, on one rank in fp32 ...
MEGATRONS = [4.879103, 4.881019, 4.717732, 4.554267, 4.481049], [2.156, 2.047, 1.926, 1.815, 1.708]
# ... and with OTHER_MODEL in bf16 on two pipeline ranks of two virtual stages each
MEGATRONS_OTHER = (
    [4.837579, 4.833281, 4.773983, 4.72625, 4.706303],
    [1.292, 1.257, 1.225, 1.297, 1.213],
)
if RELEASE == "0.17":  # what that of core_v0.17.1 logs; it draws other first weights
    MEGATRONS = (
        [4.88797, 4.897782, 4.693193, 4.549511, 4.444397],
        [2.305, 1.917, 1.825, 1.647, 1.608],
    )
    MEGATRONS_OTHER = (
        [4.850945, 4.848958, 4.783191, 4.720712, 4.682535],
        [1.398, 1.174, 1.182, 1.188, 1.227],
    )


def assert_same_training(log: TrainingLog, expected: tuple[list, list], precision: float) -> None:
    """Equal within what another order of additions changes, between layouts and processors."""
    losses, grad_norms = expected
    assert log.iterations == [1, 2, 3, 4, 5]
    assert log.losses == pytest.approx(losses, rel=precision)
    assert log.grad_norms == pytest.approx(grad_norms, rel=10 * precision, abs=2e-3)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("nproc", "flags"),
    [
        (1, ()),
        (2, (*TP2, "--sequence-parallel")),
        (2, ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")),
    ],
    ids=["one", "tp2+sp", "dp2+distributed optimizer"],
)
def test_losses_are_megatrons(nproc, flags):
    log = run_training("pretrain_gpt", nproc, *flags)
    assert_same_training(log, MEGATRONS, 1e-5)
    assert sorted(log.validation) == ["test", "validation"]
    # embeddings, four layers of attention and feed-forward; nine norms
    matrices, norms = 128 * 64 + 4 * (4 * 64 * 64 + 2 * 64 * 128), 9 * 2 * 64
    assert log.parameters[0, 0] == matrices // (2 if TP2[0] in flags else 1) + norms


@pytest.mark.gloo
def test_pipeline_with_virtual_stages_trains_another_model():
    log = run_training(
        "pp2 x vp2", 2, *PP2, "--num-layers-per-virtual-pipeline-stage", 1, "--bf16", *OTHER_MODEL
    )
    assert_same_training(log, MEGATRONS_OTHER, 2e-3)
    assert log.parameters.keys() == {(0, 0), (0, 1)}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, str]:
    """Three files of documents that count upwards: soon predicted, hence a loss that falls fast."""
    prefixes = {}
    for name, documents in {"train": 40, "valid": 8, "test": 8}.items():
        prefix = str(tmp_path_factory.mktemp("data") / name)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
        for first in range(documents):
            builder.add_document(torch.arange(first, first + 50) % 100, [50])
        builder.finalize(f"{prefix}.idx")
        prefixes[name] = prefix
    return prefixes


@pytest.mark.gloo
def test_real_data_with_tensor_parallelism(datasets):
    blend = ("0.3", datasets["train"], "0.7", datasets["train"])
    data = ("--train-data-path", *blend, "--valid-data-path", datasets["valid"])
    log = run_training(
        "real data", 2, *TP2, *OTHER_MODEL, "--train-iters", 20, "--lr-decay-iters", 20, data=data
    )
    assert log.losses[-1] < 4.4 < 4.7 < log.losses[0]
    assert log.validation["validation"] < 4.4


@pytest.mark.gloo
def test_damaged_data_is_refused(datasets):
    prefix = datasets["test"]
    Path(f"{prefix}.bin").write_bytes(b"cut")
    log = run_training("damaged", 1, *MEMORY, data=("--data-path", prefix), check=False)
    errors = [line for line in log.stdout.splitlines() if line.startswith("megamem: error")]
    assert log.returncode == 2 and len(errors) == 1, log.tail()
    assert f"--data-path {prefix}: the .bin file has 3 bytes" in errors[0]


@pytest.mark.slow
@pytest.mark.skipif("MEGATRON_LM" not in os.environ, reason="MEGATRON_LM names no checkout")
@pytest.mark.parametrize("flags", [(), (*TP2, "--sequence-parallel"), PP2, ("--bf16",)], ids=str)
def test_equals_the_script_of_a_checkout(flags):
    theirs = Path(os.environ["MEGATRON_LM"]) / "pretrain_gpt.py"
    nproc = 2 if "2" in map(str, flags) else 1
    # a checkout brings its own Megatron, which must not have been imported from elsewhere
    expected = run_training("theirs", nproc, *flags, *OTHER_MODEL, script=theirs, cold=True)
    ours = run_training("ours", nproc, *flags, *OTHER_MODEL)
    assert (ours.losses, ours.grad_norms) == (expected.losses, expected.grad_norms)
    assert ours.validation == expected.validation
