"""Megatron's training loop with memory layers: every layout has the losses of one process."""

import re
from pathlib import Path

import pytest
import torch

from megamem.checkpoint import SHARED, state_key, table_key
from megamem.config import MemoryConfig
from megamem.layers.memory_pool import MemoryPool
from megamem.resolution import resolve
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.megatron_runs import TrainingLog, run_training

MEMORY = (
    *("--memory-layers", 0, 1),
    *("--memory-num-keys", 9),  # 81 rows: two ranks hold 40 and 41
    *("--memory-heads", 2),
    *("--memory-topk", 4),
    *("--memory-lr", 3e-3),
)
TP2 = ("--tensor-model-parallel-size", 2)
PP2 = ("--pipeline-model-parallel-size", 2)
SP = ("--sequence-parallel",)
DO = ("--use-distributed-optimizer",)
OVERLAP = ("--overlap-grad-reduce",)
WIDE = ("--memory-group-size", 2)  # under data parallelism: no replicas
FULL = (
    *("--recompute-granularity", "full"),
    *("--recompute-method", "uniform"),
    *("--recompute-num-layers", 1),
)
ROUTED = ("--memory-wire", "alltoall", "--memory-pieces", 3)
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules", "mlp", "core_attn")

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def alone() -> TrainingLog:
    return run_training("one process", 1, *MEMORY)


def _same_steps(log: TrainingLog, other: TrainingLog) -> None:
    # Megatron prints six digits of the loss and four of the gradient norm
    assert log.losses == pytest.approx(other.losses, rel=2e-6)
    assert log.grad_norms == pytest.approx(other.grad_norms, abs=1.1e-3)


def test_the_loss_falls_and_the_run_says_what_it_trains(alone: TrainingLog) -> None:
    assert alone.iterations == [1, 2, 3, 4, 5]
    assert alone.losses[-1] < alone.losses[0] - 0.1
    assert "layers 0, 1 are memory+: 2 heads x 4 rows, one shared table of 81 x 64" in alone.stdout
    feed_forward, attention, norms = 2 * 64 * 128, 4 * 64 * 64, 4 * 64
    query, sub_keys, output = 64 * 64 + 64, 2 * 2 * 9 * 16, 2 * (64 * 64 + 64)
    dense = 2 * (attention + norms + feed_forward)
    memories = 2 * (attention + norms + query + sub_keys + output) + 81 * 64
    # tied embeddings and a final norm
    expected = dense + memories + 128 * 64 + 2 * 64
    assert alone.parameters == {(0, 0): expected}


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((*TP2, "--memory-wire", "alltoall"), id="tp, alltoall"),
        pytest.param((*TP2, *SP, *SELECTIVE), id="tp, sequence parallel, selective recompute"),
        pytest.param((*DO, *OVERLAP, "--overlap-param-gather"), id="dp, distributed optimizer"),
        pytest.param((*OVERLAP, *FULL), id="dp, overlap, full recompute"),
        pytest.param((*TP2, "--calculate-per-token-loss"), id="tp, per-token loss"),
        pytest.param((*WIDE, *DO, *OVERLAP), id="rows over dp, distributed optimizer"),
        pytest.param((*WIDE, "--memory-mode", "auto", *FULL), id="columns over dp, recompute"),
        pytest.param((*WIDE, "--calculate-per-token-loss"), id="rows over dp, per-token loss"),
        pytest.param((*TP2, "--memory-group-size", 1), id="replicas inside tp"),
    ],
)
def test_two_ranks_take_the_steps_of_one(alone: TrainingLog, flags: tuple) -> None:
    _same_steps(run_training("two ranks", 2, *MEMORY, *flags), alone)


NEW_FORMS = {"MEGAMEM_FORMS": "row_gradient=merged,row_adam=flags,squared_norm=triton"}


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((*DO, "--memory-reduce-rows", "touched"), id="replicas of touched rows"),
        pytest.param((*OVERLAP, *FULL, "--memory-reduce-rows", "all"), id="replicas of all rows"),
        pytest.param((*TP2, "--micro-batch-size", 1), id="tp, microbatches"),
    ],
)
def test_new_forms_take_the_same_steps(alone: TrainingLog, flags: tuple) -> None:
    log = run_training("new forms", 2, *MEMORY, *flags, environment=NEW_FORMS)
    _same_steps(log, alone)


@pytest.mark.parametrize("rows", ["all", "touched"])
def test_replicas_on_two_nodes_take_the_same_steps(alone: TrainingLog, rows: str) -> None:
    """Two replicas on each of two emulated nodes are summed inside the nodes first."""
    log = run_training(
        "two nodes",
        4,
        *(*MEMORY, "--micro-batch-size", 1),
        *("--memory-reduce-rows", rows, "--memory-group-size", 1),
        module="tests.helpers.counted_replica_sums",
        environment={"LOCAL_WORLD_SIZE": "2"},
    )
    _same_steps(log, alone)
    # each of five steps sums the flags of the rows, and one block of rows
    assert log.stdout.count("replica sums: 10 all-reduces, 10 reduce-scatters") == 4


def test_a_pool_inside_one_stage_trains_under_pipeline_parallelism(alone: TrainingLog) -> None:
    """Stages draw other dense weights than one process, so only the fall of the loss is checked."""
    log = run_training("pp", 2, *MEMORY, *PP2)
    assert log.losses[-1] < log.losses[0] - 0.1
    holders = sorted(log.parameters.values())
    # the second stage has no memory, the first has all of it
    assert sum(holders) > alone.parameters[0, 0]


def test_virtual_stages_with_a_table_for_each_layer() -> None:
    virtual = ("--num-layers-per-virtual-pipeline-stage", 1, "--memory-pool", "layer")
    two = run_training("pp vp", 2, *MEMORY, *PP2, *virtual)
    four = run_training("tp pp vp", 4, *MEMORY, *PP2, *virtual, *TP2, *SP)
    assert two.losses[-1] < two.losses[0] - 0.1
    _same_steps(four, two)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--memory-keep-ffn", "--memory-qk-norm"), id="ffn kept, q/k norm"),
        pytest.param(
            ("--memory-variant", "memory", "--memory-layers", 1, "--num-experts", 4)
            + ("--moe-layer-freq", 2, "--moe-router-topk", 2),
            id="plain memory among experts",
        ),
        pytest.param(
            ("--memory-value-dim", 48, "--memory-heads", 1, "--normalization", "RMSNorm")
            + ("--swiglu", "--untie-embeddings-and-output-weights"),
            id="narrow rows in a Llama-shaped model",
        ),
    ],
)
def test_variants_under_tensor_parallelism(flags: tuple) -> None:
    alone = run_training("one process", 1, *MEMORY, *flags)
    assert alone.losses[-1] < alone.losses[0] - 0.1
    _same_steps(run_training("tp sp", 2, *MEMORY, *flags, *TP2, *SP), alone)


def test_bf16_with_the_distributed_optimizer(alone: TrainingLog) -> None:
    log = run_training("bf16", 2, *MEMORY, *TP2, *SP, *DO, "--bf16")
    # bf16 has 8 significant bits, and near ties between scores may be decided differently
    assert log.losses == pytest.approx(alone.losses, rel=1e-2)


def test_rows_across_and_columns_within_on_four_ranks(alone: TrainingLog) -> None:
    both = ("--memory-mode", "2d", "--memory-group-size", 4)
    _same_steps(run_training("2d", 4, *MEMORY, *TP2, *SP, *both), alone)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--memory-grid", "1x2x2x1", *ROUTED, *FULL), id="recompute"),
        pytest.param(("--memory-grid", "2x1x2x1", *ROUTED, *TP2, *SP, *DO), id="rows, sp"),
        pytest.param(("--memory-grid", "1x2x1x2", *TP2, "--memory-pieces", 2), id="columns, tp"),
        pytest.param(("--memory-mode", "row", "--memory-group-size", 4, *ROUTED), id="row"),
    ],
)
def test_two_nodes_take_the_steps_of_one_process(alone: TrainingLog, flags: tuple) -> None:
    flags = (*flags, "--micro-batch-size", 1)
    nodes = {"LOCAL_WORLD_SIZE": "2"}
    _same_steps(run_training("nodes", 4, *MEMORY, *flags, environment=nodes), alone)


def test_pieces_under_virtual_stages() -> None:
    virtual = (*PP2, "--num-layers-per-virtual-pipeline-stage", 1, "--micro-batch-size", 1)
    rows = run_training("rows", 4, *MEMORY, *virtual, *WIDE)
    grid = ("--memory-grid", "1x2x1x1", "--memory-pieces", 3)
    _same_steps(run_training("columns of nodes", 4, *MEMORY, *virtual, *grid), rows)


def test_weights_are_rounded_alike_in_every_layout(alone: TrainingLog) -> None:
    rounded = ("--memory-lookup-weights", "bf16")
    one = run_training("one process", 1, *MEMORY, *rounded)
    # 8 significant bits of the weights
    assert one.losses != alone.losses and one.losses == pytest.approx(alone.losses, rel=2e-3)
    flags = ("--memory-grid", "1x2x1x1", *rounded)
    _same_steps(run_training("columns of nodes", 2, *MEMORY, *flags), one)


@pytest.mark.parametrize("kind", ["lazy_adamw", "rowwise_adamw", "sgd"])
def test_lean_optimizers_take_the_same_steps_on_columns(kind: str) -> None:
    flags = ("--memory-optimizer", kind, "--memory-clip-grad", 0.01)
    alone = run_training(kind, 1, *MEMORY, *flags)
    assert alone.losses[-1] < alone.losses[0] - 0.1
    _same_steps(run_training(kind, 2, *MEMORY, *flags, *WIDE, "--memory-mode", "column"), alone)


def test_a_gradient_clipped_apart_is_not_in_the_models_norm(alone: TrainingLog) -> None:
    apart = run_training("apart", 1, *MEMORY, "--memory-clip-grad", 1.0)
    assert apart.losses[0] == alone.losses[0]
    assert apart.grad_norms[0] < alone.grad_norms[0] - 5e-3


def test_bf16_rounded_at_random_needs_no_fp32_copy(alone: TrainingLog, tmp_path: Path) -> None:
    saving = ("--save", tmp_path, "--save-interval", 5)
    flags = ("--bf16", "--memory-stochastic-rounding", *saving)
    log = run_training("random rounding", 2, *MEMORY, *TP2, *flags)
    assert log.losses == pytest.approx(alone.losses, rel=1e-2)
    saved = saved_tensors(tmp_path / "iter_0000005")
    assert saved[table_key(SHARED)].dtype == torch.bfloat16
    assert state_key(SHARED, "exp_avg") in saved and state_key(SHARED, "master") not in saved


def test_a_nan_on_one_rank_makes_all_ranks_skip_the_batch(alone: TrainingLog) -> None:
    log = run_training(
        "nan",
        2,
        *(*MEMORY, *WIDE),
        module="tests.helpers.faulty",
        environment={"FAULT": "nan 1 3"},
    )
    assert log.stdout.count("the gradient of value table shared is not finite") == 1
    assert "rank 1: the gradient of value table shared" in log.stdout
    assert log.skipped == [0, 0, 1, 0, 0]
    # Megatron prints no loss for a batch that it skips
    assert log.losses[:2] == pytest.approx(alone.losses[:2], rel=2e-6)
    assert log.iterations == [1, 2, 4, 5] and log.losses[-1] < alone.losses[0] - 0.1


@pytest.mark.parametrize("check", [True, False], ids=["Megatron stops", "Megatron skips"])
def test_a_nan_in_one_ranks_table_is_named(tmp_path: Path, check: bool) -> None:
    flags = () if check else ("--no-check-for-nan-in-loss-and-grad",)
    log = run_training(
        "nan in the table",
        2,
        *(*MEMORY, *WIDE, "--save", tmp_path, "--save-interval", 2, *flags),
        module="tests.helpers.faulty",
        environment={"FAULT": "nan-table 1 3"},
        check=False,
    )
    said = re.findall(r"rank \d: value table shared is not finite.*", log.stdout)
    # rank 1 holds 41 of the 81 rows, from row 40
    assert said and all(line.startswith("rank 1:") for line in said)
    assert re.search(r"in 1 of the 41 rows on this rank, first in row ([4-7]\d|80);", said[0])
    if check:
        # the batch after the one that broke it
        assert log.returncode != 0 and log.iterations == [1, 2, 3]
    else:
        assert log.returncode == 0 and log.skipped == [0, 0, 0, 1, 1]


def test_microbatches_add_up_to_the_batch(alone: TrainingLog) -> None:
    _same_steps(run_training("accumulation", 1, *MEMORY, "--micro-batch-size", 1), alone)


def test_a_table_without_rate_and_decay_keeps_its_initial_values(tmp_path: Path) -> None:
    """The learning rate is that of the table, and two ranks start with the rows of one process."""
    still = ("--memory-lr", 0, "--memory-weight-decay", 0)
    log = run_training("still", 2, *MEMORY, *TP2, *still, "--save", tmp_path, "--save-interval", 5)
    assert log.losses[-1] < log.losses[0] - 0.1
    config = MemoryConfig(memory_layers=[0, 1], memory_num_keys=9, memory_topk=4)
    start = MemoryPool(resolve(config, 64, seed=1234)).values.weight
    assert torch.equal(saved_tensors(tmp_path / "iter_0000005")[table_key(SHARED)], start)


def test_without_memory_layers_the_hooks_change_nothing(tmp_path: Path) -> None:
    """The checkpoint of a dense run has the same names and, bit for bit, the same contents."""
    saving = ("--train-iters", 3, "--save-interval", 3, "--save")
    run_training("hooks", 2, *TP2, *saving, tmp_path / "hooks")
    bare = "tests.helpers.without_hooks"
    run_training("no hooks", 2, *TP2, *saving, tmp_path / "none", module=bare)
    hooks, none = (saved_tensors(tmp_path / name / "iter_0000003") for name in ("hooks", "none"))
    assert hooks.keys() == none.keys() and len(none) > 20
    for name, tensor in none.items():
        assert torch.equal(hooks[name], tensor), name


def test_memory_off_is_off(tmp_path: Path) -> None:
    """Once the flags are known, one rank looks for a checkpoint with memories, and that is all."""

    def counts(kind: str, *flags: object) -> tuple[list[set[str]], list[int]]:
        log = run_training(
            kind,
            2,
            *("--train-iters", 2, *flags),
            module="tests.helpers.counted",
            environment={"COUNTED": kind},
        )
        calls = [set(line.split()) for line in re.findall(r"^calls: (.*)$", log.stdout, re.M)]
        return calls, [int(n) for n in re.findall(r"^collectives: (\d+)$", log.stdout, re.M)]

    bare_calls, bare = counts("bare")
    calls, collectives = counts("hooked")
    assert len(calls) == len(collectives) == 2 and min(collectives) > 5
    assert collectives == bare
    # ranks come in no order, and some of the launcher runs on one of them alone
    own = [found - set().union(*bare_calls) for found in calls]
    looking = {name for found in own for name in found if name.startswith("saved_model.")}
    assert {name for found in own for name in found} - looking == {
        "patches.core_transformer_config_from_args",
        "patches.setup_model_and_optimizer",
        "config.collect",
    }
    # only the first rank does this
    assert sum(bool(found & looking) for found in own) == 1
    # the same counters are not zero with memory layers
    with_memory, more = counts("hooked", *MEMORY)
    assert min(more) > max(bare) and all(len(found) > 40 for found in with_memory)
