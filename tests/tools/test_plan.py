"""The command `megamem plan`: its output, its JSON file, and its errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megamem.__main__ import parse
from megamem.megatron import compat
from megamem.ops import tuning
from megamem.planner import PRESETS
from megamem.planner.sizes import total_parameters
from megamem.spec import Grid
from megamem.tools.plan import job_from_args
from megamem.tools.plan_model import shape_from_args
from tests.helpers.commands import command
from tests.helpers.megatron_runs import MODEL, ROOT, SWITCHES, TRAINING, run_training

main = command("plan")
BIG = ("--preset", "1.3b", "--memory-num-keys", "8192", "--world-size", "128")


def _written(path: Path, capability: tuple[int, int], **numbers: int) -> str:
    """A file of `megamem tune` with other numbers for the row gradient."""
    chosen = tuning.GENERAL.changed("row_gradient", **numbers)
    machine = tuning.Machine("NVIDIA X", capability, "2", "3", "0")
    tuning.write(path, tuning.Tuning(machine, {}, chosen))
    return str(path)


def test_the_plan_follows_the_choices_of_a_tuning_file(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    buffers = {}
    words = [*BIG, "--memory-group-size", "128", "--json", str(tmp_path / "plan.json")]
    file = _written(tmp_path / "tuning.json", (9, 0), min_chunk=1, max_chunk=1)
    for more in ((), ("--memory-tuning", "off"), ("--memory-tuning", file)):
        assert main([*words, *more]) == 0
        plan = json.loads((tmp_path / "plan.json").read_text())
        buffers[more[-1:]] = plan["layouts"][plan["asked"]]["bytes"]["buffers"]
    assert buffers[()] == buffers[("off",)] < buffers[(file,)]
    assert tuning.current() is tuning.GENERAL
    capsys.readouterr()
    assert main([*words, "--memory-tuning", _written(Path(file), (8, 0))]) == 2
    assert "was measured on NVIDIA X, but the plan is for H100; " in capsys.readouterr().err
    Path(file).write_text("{")
    assert main([*words, "--memory-tuning", file]) == 2
    assert "--memory-tuning: " in capsys.readouterr().err


def _shape(*words: object):
    return shape_from_args(parse("plan", [str(word) for word in words]))


def test_the_tables_and_the_advice(capsys: pytest.CaptureFixture) -> None:
    assert main(BIG) == 0
    said = capsys.readouterr().out
    for words in ("138,747.7", "137,439.0", "grid 16x1x8x1", "2d 2 x 4", "H200", "KiB", "estimate"):
        assert words in said, words
    grid, pieces = re.findall(
        r"^Recommended: --memory-grid (\S+) --memory-pieces (\d)", said, re.M
    )[0]
    assert Grid.parse(grid).size == 128 and Grid.parse(grid).node_columns > 1 and int(pieces) > 1
    assert "Without these flags the layout is row over 1, which does not fit: 24" in said
    assert main([*BIG, "--memory-group-size", "2"]) == 0
    assert "Your flags select row over 2, which does not fit: 12" in capsys.readouterr().out


def test_the_tables_are_shown_where_nothing_fits(capsys: pytest.CaptureFixture) -> None:
    assert main([*BIG[:4], "--world-size", "8"]) == 1
    said = capsys.readouterr().out
    assert "row over 8" in said and "Estimated stages" in said and "Recommended" not in said
    assert "No layout fits: 8 x H100" in said and "Use --world-size 72 " in said
    assert "The default layout is row over 1, which does not fit" in said


@pytest.mark.parametrize(
    ("words", "batch"),
    [
        ((), "4,096 sequences of 2,048 tokens: 16 microbatches of 4 on each of 64 data-"),
        # as few more as the ranks take
        (("--world-size", "48"), "4,032 sequences of 2,048 tokens: 21 microbatches of 4 on each"),
        (("--world-size", "4096"), "16,384 sequences of 2,048 tokens: 1 microbatch of 4 on each"),
        (("--global-batch-size", "256"), "256 sequences of 2,048 tokens: 1 microbatch of 4"),
        (("--micro-batch-size", "2"), "4,096 sequences of 2,048 tokens: 32 microbatches of 2"),
    ],
)
def test_a_preset_has_a_stated_batch(capsys, words: tuple, batch: str) -> None:
    assert main(["--preset", "134m", "--memory-num-keys", "64", "--world-size", "64", *words]) == 0
    assert f"A step is {batch}" in capsys.readouterr().out


def test_a_command_line_can_be_pasted_with_torchrun(tmp_path: Path) -> None:
    usual = [str(word) for pair in (MODEL | TRAINING).items() for word in pair]
    run = f"torchrun --nproc-per-node 2 -m megamem.run pretrain_gpt.py {' '.join(usual)}"
    path = tmp_path / "plan.json"
    assert main([f"{run} --memory-layers 1 2 > log", "--fill", "0.5", "--json", str(path)]) == 0
    plan = json.loads(path.read_text())
    assert plan["cluster"]["world_size"] == 2 and plan["fill"] == 0.5
    assert plan["memory"]["layers"] == [1, 2] and plan["cluster"]["global_batch_size"] == 4


def test_every_stage_says_whether_it_was_measured(capsys: pytest.CaptureFixture) -> None:
    batches = ("--world-size", "8", "--micro-batch-size", "4", "--global-batch-size", "64")
    assert main(["--preset", "1.3b", "--memory-num-keys", "1024", *batches]) == 0
    said = capsys.readouterr().out
    rows = re.findall(r"^ (\S.*?) +(forward|backward|step) +([\d. ]+\S) +(\S.*?) *$", said, re.M)
    stages = {name: (phase, numbers.split(), measured) for name, phase, numbers, measured in rows}
    phase, numbers, measured = stages["row gradient"]
    assert (phase, measured) == ("backward", "on an H100")
    # three layers and two microbatches
    assert float(numbers[1]) == pytest.approx(6 * float(numbers[0]), abs=0.1)
    assert stages["gate"][2] == "no, estimated" and len(stages["gradient norm"][1]) == 1
    (each, step), *_ = re.findall(r"^ sum +([\d.]+) +([\d.]+) *$", said, re.M)
    assert float(each) > float(numbers[0]) and float(step) > 6 * float(each)


def test_rates_of_links_are_flags(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Half the rate takes twice the time; the layout is the one asked for, and in one piece."""
    path, took = tmp_path / "plan.json", {}
    words = [*BIG, "--memory-group-size", "128", "--json", str(path)]
    for more in ((), ("--link-gbytes", "175"), ("--network-gbytes", "22.5")):
        assert main([*words, *more]) == 0
        plan = json.loads(path.read_text())
        took[more[:1]] = plan["layouts"][plan["asked"]]["seconds"]["h100"]
    usual, slow, far = took.values()
    assert slow["inside"] == pytest.approx(2 * usual["inside"])
    assert far["across"] == pytest.approx(2 * usual["across"])
    assert (slow["across"], far["inside"]) == (usual["across"], usual["inside"])
    capsys.readouterr()
    assert main([*words, "--link-gbytes", "0"]) == 2
    assert "--link-gbytes 0 must be greater than 0" in capsys.readouterr().err


def test_the_written_plan(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "plan.json"
    assert main([*BIG, "--memory-group-size", "128", "--json", str(path)]) == 0
    plan = json.loads(path.read_text())
    assert plan["parameters"]["value table"] == 137_438_953_472
    asked = plan["layouts"][plan["asked"]]
    assert plan["asked"] == "grid 16x1x8x1" and asked["flags"] == "--memory-grid 16x1x8x1"
    assert asked["layout"] == {
        **{"mode": "row", "group_size": 128, "column_ranks": 1},
        **{"node_rows": 16, "node_columns": 1},
    }
    assert asked["bytes"]["weights"] == 2 * 137_438_953_472 / 128
    kinds = ("dense", "weights", "gradients", "optimizer", "buffers")
    assert asked["bytes"]["total"] == pytest.approx(sum(asked["bytes"][kind] for kind in kinds))
    assert plan["layouts"][plan["recommended"]]["fits"]
    assert plan["layouts"]["row over 1"]["fits"] is False
    best = plan["layouts"][plan["recommended"]]
    assert set(best["seconds"]) == {"h100", "h200", "b200"}
    assert best["flags"].endswith("--memory-pieces 4") and best["pieces"] == 4
    step = best["seconds"]["h100"]
    assert step["exchange"] == pytest.approx(step["inside"] + step["across"] - step["hidden"])
    assert plan["gpus_needed"]["adamw"]["h100"] > plan["gpus_needed"]["adamw"]["b200"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_plans(name: str, capsys: pytest.CaptureFixture) -> None:
    tp = "1" if name != "8b" else "8"
    assert main(["--preset", name, "--world-size", "64", "--tensor-model-parallel-size", tp]) == 0


def test_flags_overrule_a_preset() -> None:
    words = ["--preset", "373m", "--num-layers", "30", "--memory-layers", "1", "2"]
    job = job_from_args(parse("plan", words))
    assert (job.shape.num_layers, job.shape.hidden_size) == (30, 1024)
    assert list(job.spec.layers) == [1, 2]
    assert job.cluster.half_precision and job.cluster.use_distributed_optimizer


def test_the_command_line_of_a_run_can_be_pasted() -> None:
    """Flags that change no size are ignored; the default is one model replica."""
    usual = [str(word) for pair in (MODEL | TRAINING).items() for word in pair]
    words = [*usual, *SWITCHES, "--memory-layers", "1", "--tensor-model-parallel-size", "2"]
    job = job_from_args(parse("plan", [*words, "--global-batch-size", "4", "--mock-data"]))
    assert (job.cluster.world_size, job.cluster.microbatches) == (2, 2)
    assert not job.cluster.half_precision


OTHER = (
    *("--swiglu", "--normalization", "RMSNorm", "--untie-embeddings-and-output-weights"),
    *("--group-query-attention", "--num-query-groups", 2, "--ffn-hidden-size", 96),
)
BIASED = (
    *("--position-embedding-type", "learned_absolute", "--qk-layernorm"),
    *("--add-qkv-bias", "--kv-channels", 24, "--vocab-size", 129),
)


MIXED = (
    *("--num-experts", 4, "--moe-layer-freq", "([0]*1+[1]*3)", "--moe-ffn-hidden-size", 48),
    *("--moe-shared-expert-intermediate-size", 32, "--moe-shared-expert-gate"),
)
PREDICTING = ("--mtp-num-layers", 2, "--swiglu", "--normalization", "RMSNorm")


@pytest.mark.parametrize(
    "flags",
    [(), OTHER, BIASED, MIXED, PREDICTING],
    ids=["plain", "llama", "biased", "experts", "multi-token prediction"],
)
def test_counts_are_megatrons(flags: tuple) -> None:
    """The planner counts as many parameters as a model has that Megatron builds."""
    log = run_training("count", 1, "--train-iters", 1, *flags)
    usual = [word for pair in (MODEL | TRAINING).items() for word in pair]
    shape = _shape(*usual, *SWITCHES, *flags)
    assert log.parameters == {(0, 0): total_parameters(shape, None)["total"]}


@pytest.mark.skipif(compat.HybridModel is None, reason="hybrid models came in 0.18")
def test_counts_of_hybrid_models_are_megatrons() -> None:
    spec = ("--spec", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec")
    flags = (*("--hybrid-layer-pattern", "*-*E*-", "--num-layers", 6), "--num-experts", 4)
    script = ROOT / "examples" / "pretrain_hybrid.py"
    log = run_training("hybrid", 1, "--train-iters", 1, *flags, *spec, script=script)
    usual = [word for pair in (MODEL | TRAINING).items() for word in pair]
    counted = total_parameters(_shape(*usual, *SWITCHES, *flags), None)
    assert log.parameters == {(0, 0): counted["total"]} and counted["experts"] > 0


LLAMA = (
    "--swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights "
    "--position-embedding-type rope --seq-length 4096 "
)


@pytest.mark.parametrize(
    ("flags", "total"),
    [
        (
            "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
            "--group-query-attention --num-query-groups 8 --num-experts 8 --vocab-size 32000",
            46_702_792_704,
        ),
        (
            "--num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128 "
            "--multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128 "
            "--qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm --num-experts 256 "
            "--moe-layer-freq ([0]*3+[1]*58) --moe-ffn-hidden-size 2048 --moe-router-topk 8 "
            "--moe-shared-expert-intermediate-size 2048 --vocab-size 129280",
            671_026_404_352,
        ),
    ],
    ids=["Mixtral 8x7B", "DeepSeek-V3"],
)
def test_published_mixtures_of_experts(flags: str, total: int) -> None:
    """Their checkpoints have as many; DeepSeek's also has a bias for each expert, not trained."""
    shape = _shape(*(LLAMA + flags).split())
    assert total_parameters(shape, None)["total"] == total


def test_a_published_state_space_model() -> None:
    """Mamba 2 of 130M parameters, whose embedding has 50288 rows."""
    shape = _shape(
        *("--hybrid-layer-pattern", "M" * 24, "--hidden-size", 768, "--num-attention-heads", 12),
        *("--mamba-num-groups", 1, "--mamba-state-dim", 128, "--vocab-size", 50288),
        *("--make-vocab-size-divisible-by", 16, "--seq-length", 2048, "--disable-bias-linear"),
        *("--normalization", "RMSNorm", "--position-embedding-type", "none"),
    )
    assert total_parameters(shape, None)["total"] == 128_989_632


def test_active_parameters_are_shown(capsys: pytest.CaptureFixture) -> None:
    flags = "--num-experts 8 --moe-ffn-hidden-size 512 --moe-router-topk 2"
    words = ["--preset", "134m", "--memory-num-keys", "64", "--world-size", "8", *flags.split()]
    assert main([*words, "--expert-model-parallel-size", "4"]) == 0
    said = capsys.readouterr().out
    numbers = dict(re.findall(r"^ (\S.*?) +([\d,]+\.\d) *$", said, re.M))
    total, active = (float(numbers[name]) for name in ("total", "active for one token"))
    # six experts of nine layers, and the table but for 128 rows in each of three layers
    idle = 9 * 6 * 3 * 768 * 512 + 64 * 64 * 768 - 3 * 128 * 768
    assert total - active == pytest.approx(idle / 1e6, abs=0.11)


@pytest.mark.parametrize(
    ("flags", "gradient", "state", "of_table"),
    [
        ("", 4, 8, 4),
        ("--bf16", 4, 12, 4),
        ("--fp16", 2, 16, 2),
        ("--fp16 --accumulate-allreduce-grads-in-fp32", 4, 12, 4),
        ("--bf16 --grad-reduce-in-bf16", 2, 16, 2),
        ("--bf16 --use-torch-fsdp2", 2, 16, 4),
        ("--bf16 --optimizer sgd", 4, 8, 4),
        ("--bf16 --optimizer-cpu-offload", 4, 0, 4),
        ("--bf16 --optimizer-cpu-offload --optimizer-offload-fraction 0.25", 4, 9, 4),
        # Transformer Engine stores half of an fp32 weight beside its bf16 copy
        ("--bf16 --use-precision-aware-optimizer", 4, 10, 4),
        (
            "--bf16 --use-precision-aware-optimizer --main-grads-dtype bf16 --exp-avg-dtype bf16 "
            "--exp-avg-sq-dtype fp8",
            2,
            5,
            2,
        ),
    ],
)
def test_bytes_of_the_models_gradients_and_state(
    flags: str, gradient: int, state: float, of_table: int
) -> None:
    """Also those of the gradients of the table, which FSDP2 leaves alone."""
    plain = [*BIG, "--use-distributed-optimizer", *flags.split()]
    args = parse("plan", plain)
    # the preset is in bf16
    args.bf16 = "--bf16" in flags
    job = job_from_args(args)
    assert (job.cluster.gradient_bytes, job.cluster.optimizer_bytes) == (gradient, state)
    assert job.state.gradient == of_table


SIZES = "--hidden-size 64 --num-attention-heads 4 --seq-length 32 --vocab-size 128 --bf16 "


def _placement(flags: str):
    words = (SIZES + flags).split()
    return job_from_args(parse("plan", [*words, "--memory-layers", "1"])).placement


@pytest.mark.parametrize(
    ("flags", "shape"),
    [
        ("--num-layers-per-virtual-pipeline-stage 1", {"virtual_pipeline_model_parallel_size": 4}),
        ("--num-virtual-stages-per-pipeline-rank 2", {"virtual_pipeline_model_parallel_size": 2}),
        ("--decoder-first-pipeline-num-layers 1", {"num_layers_in_first_pipeline_stage": 1}),
        ("--decoder-last-pipeline-num-layers 3", {"num_layers_in_last_pipeline_stage": 3}),
        (
            "--pipeline-model-parallel-layout Et*2|t*3|t|ttL",
            {
                "pipeline_model_parallel_layout": "Et*2|t*3|t|ttL",
                "virtual_pipeline_model_parallel_size": 2,
            },
        ),
        ("", {}),
    ],
)
def test_stages_are_megatrons(flags: str, shape: dict) -> None:
    ours = _placement(f"--num-layers 8 --pipeline-model-parallel-size 2 {flags}")
    config = TransformerConfig(
        num_layers=8,
        hidden_size=64,
        num_attention_heads=4,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        **shape,
    )
    chunks = shape.get("virtual_pipeline_model_parallel_size")
    theirs = [
        [
            compat.stage_layers(config, chunk if chunks else None, stage)
            for chunk in range(chunks or 1)
        ]
        for stage in range(2)
    ]
    assert [[list(chunk) for chunk in stage] for stage in ours] == theirs


def test_stages_of_a_pattern() -> None:
    two = _placement("--hybrid-layer-pattern *-|*-*-|*|- --pipeline-model-parallel-size 2")
    assert two == (((0, 1), (6,)), ((2, 3, 4, 5), (7,)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preset", "1.3b", "--memory-num-key", "8"), "did you mean --memory-num-keys?"),
        (("--preset", "2b"), "invalid choice: '2b'"),
        (("--num-layers", "2"), "--hidden-size, --num-attention-heads, --seq-length, --vocab-size"),
        (
            ("--num-layers", "2", "--tokenizer-model", "x.model"),
            r"--vocab-size \(megamem plan does not read --tokenizer-model x.model\); add them",
        ),
        (
            ("--preset", "134m", "--use-megatron-fsdp"),
            "--use-megatron-fsdp: megamem plan does not support Megatron's FSDP; remove the flag",
        ),
        (
            ("--preset", "134m", "--heterogeneous-layers-config-path", "x"),
            "--heterogeneous-layers-config-path: megamem plan does not support layers of different",
        ),
        (
            ("--preset", "134m", "--hybrid-layer-pattern", "*-G-", "--memory-layers", "1"),
            r"--hybrid-layer-pattern \*-G-: megamem plan does not support layers G",
        ),
        (("--preset", "134m", "--hidden-size", "760", "--num-attention-heads", "7"), "use|change"),
        (("--preset", "134m", "--fill", "1.5"), "--fill 1.5 must be"),
        (("--preset", "134m", "--memory-topk", "2000"), "--memory-topk 2000 is larger than"),
        (("--preset", "134m", "--world-size", "6", "--memory-group-size", "4"), "does not divide"),
    ],
)
def test_one_clear_error(capsys: pytest.CaptureFixture, words: tuple, message: str) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("megamem: error: ") and said.err.count("\n") == 1
    assert re.search(message, said.err), said.err
    assert said.out == ""


def test_help_is_the_planners_own() -> None:
    words = [sys.executable, "-m", "megamem", "plan", "--help"]
    page = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "--preset" in page and "--memory-num-keys" in page and "--gpus-per-node" in page
    assert "--lr-warmup-iters" not in page and len(page.splitlines()) < 360
