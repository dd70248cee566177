"""Memory layers in hybrid models: the pattern, the choice of layers, and Megatron's own loop."""

import re
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.training import argument_utils

from megamem.checkpoint import SHARED, table_key
from megamem.hybrid_pattern import stage_layers, symbols
from megamem.megatron.model.hybrid import LayerByNumber
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.megatron_runs import ROOT, TrainingLog, run_training

hybrid_layer_allocation = pytest.importorskip(
    "megatron.core.models.hybrid.hybrid_layer_allocation",
    reason="hybrid models came in 0.18; that 0.17 refuses them is tested with the other refusals",
)

SCRIPT = ROOT / "examples" / "pretrain_hybrid.py"
SPEC = ("--spec", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec")
READS = ("--memory-num-keys", 9, "--memory-heads", 2, "--memory-topk", 4, "--memory-lr", 3e-3)
MEMORY = ("--memory-layers", 1, 5, *READS)
TP2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel")


def _run(name: str, nproc: int, pattern: str, *flags: object, check: bool = True) -> TrainingLog:
    words = ("--hybrid-layer-pattern", pattern, "--num-layers", len(symbols(pattern)), *SPEC)
    return run_training(name, nproc, *words, *flags, script=SCRIPT, check=check)


@pytest.mark.parametrize(
    ("pattern", "stages", "virtual", "first", "last"),
    [
        ("*-*-*-", 1, None, None, None),
        ("*-*-*-", 3, None, None, None),
        ("*-*-*-", 2, None, 4, None),
        ("*-*-*-", 3, None, 1, 3),
        ("*-|*-*-", 2, None, None, None),
        ("*-|*|-*|-E", 2, 2, None, None),
        ("*-|*-*-/*-", 2, None, None, None),
    ],
)
def test_stages_are_those_that_megatron_builds(
    monkeypatch, pattern, stages, virtual, first, last
) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: stages)
    # its log messages need process groups
    monkeypatch.setattr(hybrid_layer_allocation, "log_on_each_pipeline_stage", lambda *_, **__: 0)
    main, found = pattern.split("/")[0], []
    for vp_stage, pp_rank in product(range(virtual) if virtual else [None], range(stages)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None, rank=pp_rank: rank)
        types, offset = hybrid_layer_allocation.select_pipeline_segment(
            main, object(), vp_stage, first, last
        )
        ours = stage_layers(pattern, stages, pp_rank, vp_stage, first, last)
        assert ours == list(range(offset, offset + len(types)))
        assert [symbols(pattern)[layer] for layer in ours] == types
        found += ours
    assert found == list(range(len(symbols(pattern))))


def test_a_layer_is_chosen_by_its_number() -> None:
    memory, usual = (ModuleSpec(SimpleNamespace, {"kind": kind}) for kind in ("memory", "usual"))
    spec = ModuleSpec(LayerByNumber, {"memories": {3: memory}, "otherwise": usual})
    # Megatron counts from 1
    built = [build_module(spec, layer_number=number, config=None) for number in range(1, 6)]
    assert [layer.kind for layer in built] == ["usual"] * 3 + ["memory", "usual"]
    assert [layer.layer_number for layer in built] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("is_mtp_layer", [True, False])
def test_a_layer_of_mtp_is_no_memory_of_the_model(is_mtp_layer: bool) -> None:
    """Since 0.20 stacks tell experts whether they belong to MTP, but not dense layers."""
    memory, usual = (ModuleSpec(SimpleNamespace, {"kind": kind}) for kind in ("memory", "usual"))
    spec = ModuleSpec(LayerByNumber, {"memories": {3: memory}, "otherwise": usual})
    built = build_module(spec, layer_number=4, is_mtp_layer=is_mtp_layer)
    expected = {"kind": "usual", "is_mtp_layer": True} if is_mtp_layer else {"kind": "memory"}
    assert vars(built) == {"layer_number": 4, **expected}


@pytest.mark.gloo
@pytest.mark.skipif(
    not hasattr(argument_utils, "gpt_config_from_args"),
    reason="Megatron describes models since 0.19; what older releases say is tested elsewhere",
)
def test_a_description_with_memories_trains_as_the_patched_model_does() -> None:
    """Digit for digit, and the patched constructor does not put them in again."""
    flags = ("--hybrid-layer-pattern", "*-*-*-", "--num-layers", 6, *SPEC, *MEMORY)
    script = ROOT / "tests/helpers/described_hybrid.py"
    described = run_training("described", 1, *flags, script=script)
    assert described.losses == run_training("patched", 1, *flags, script=SCRIPT).losses
    assert described.losses[-1] < described.losses[0] - 0.1
    assert "layers 1, 5 are memory+" in described.stdout


@pytest.mark.gloo
def test_ranks_take_the_steps_of_one_process_and_resume_each_others_runs(tmp_path) -> None:
    save = ("--save", tmp_path, "--save-interval", 3)
    longer = ("--train-iters", 6)
    alone = _run("one process", 1, "*-*-*-", *MEMORY, *longer, *save)
    assert alone.losses[-1] < alone.losses[0] - 0.1
    feed_forward, attention, norms = 2 * 64 * 128, 4 * 64 * 64, 6 * 2 * 64
    query, sub_keys, output = 64 * 64 + 64, 2 * 2 * 9 * 16, 2 * (64 * 64 + 64)
    memories = 2 * (query + sub_keys + output) + 81 * 64
    # tied embeddings and a final norm
    dense = 3 * attention + feed_forward + norms + 128 * 64 + 2 * 64
    assert alone.parameters == {(0, 0): dense + memories}

    load = ("--load", tmp_path, "--ckpt-step", 3)
    two = _run("two ranks", 2, "*-*-*-", *MEMORY, *longer, *TP2, *load)
    assert two.iterations == [4, 5, 6]
    # Megatron prints the second loss as a mean of two
    assert two.losses[::2] == pytest.approx(alone.losses[3::2], rel=2e-6)
    assert two.grad_norms == pytest.approx(alone.grad_norms[3:], abs=1.1e-3)
    saved = saved_tensors(tmp_path / "iter_0000003")
    assert saved[table_key(SHARED)].shape == (81, 64)


@pytest.mark.gloo
def test_stages_with_experts_and_a_table_for_each_layer() -> None:
    flags = (*("--memory-layers", 1, 3, *READS), "--memory-pool", "layer", "--num-experts", 2)
    stages = ("--pipeline-model-parallel-size", 2)
    two = _run("pp", 2, "*-|*E*-", *flags, *stages)
    assert two.losses[-1] < two.losses[0] - 0.1
    # a memory layer replaced the experts, so there is no load-balancing loss
    balance = re.findall(r"load_balancing_loss: (\S+)", two.stdout)
    assert len(balance) == 5 and all(float(loss) == 0 for loss in balance)
    # every stage has its own table
    assert all(count > 81 * 64 for count in two.parameters.values())


@pytest.mark.gloo
def test_what_cannot_work_is_said_in_one_line() -> None:
    log = _run("attention", 1, "*-*-", "--memory-layers", 2, *READS, check=False)
    assert log.returncode == 2
    assert "--memory-layers 2 is no feed-forward: --hybrid-layer-pattern *-*-" in log.stdout
    assert "has them elsewhere; use some of 1 3." in log.stdout
    log = _run("mamba", 1, "M-*-", "--memory-layers", 1, *READS, check=False)
    assert log.returncode == 2
    assert "--hybrid-layer-pattern M-*- has layers (M) that need GPU kernels" in log.stdout
