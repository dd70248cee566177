"""The command `megamem plan`: its output, its JSON file, and its errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megamem.__main__ import parse
from megamem.ops import tuning
from megamem.planner import PRESETS
from megamem.planner.sizes import total_parameters
from megamem.tools.plan import job_from_args, shape_from_args
from tests.helpers.commands import command
from tests.helpers.megatron_runs import MODEL, SWITCHES, TRAINING, run_training

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
        buffers[more[-1:]] = plan["layouts"]["row over 128"]["bytes"]["buffers"]
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
    for words in ("138,747.7", "137,439.0", "row over 128", "2d 16 x 8", "H200", "KiB", "estimate"):
        assert words in said, words
    assert "Recommended: --memory-mode 2d --memory-group-size 128 --memory-column-ranks" in said
    assert "Your flags select row over 1, which does not fit: 24" in said


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
    assert stages["gate"][2] == "no, from bytes" and len(stages["gradient norm"][1]) == 1
    (each, step), *_ = re.findall(r"^ sum +([\d.]+) +([\d.]+) *$", said, re.M)
    assert float(each) > float(numbers[0]) and float(step) > 6 * float(each)


def test_the_written_plan(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "plan.json"
    assert main([*BIG, "--memory-group-size", "128", "--json", str(path)]) == 0
    plan = json.loads(path.read_text())
    assert plan["parameters"]["value table"] == 137_438_953_472
    asked = plan["layouts"][plan["asked"]]
    assert asked["layout"] == {"mode": "row", "group_size": 128, "column_ranks": 1}
    assert asked["bytes"]["weights"] == 2 * 137_438_953_472 / 128
    kinds = ("dense", "weights", "gradients", "optimizer", "buffers")
    assert asked["bytes"]["total"] == pytest.approx(sum(asked["bytes"][kind] for kind in kinds))
    assert plan["layouts"][plan["recommended"]]["fits"]
    assert plan["layouts"]["row over 1"]["fits"] is False
    assert set(plan["layouts"]["row over 8"]["seconds"]) == {"h100", "h200", "b200"}
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


@pytest.mark.parametrize("flags", [(), OTHER, BIASED], ids=["plain", "llama", "biased"])
def test_counts_are_megatrons(flags: tuple) -> None:
    """The planner counts as many parameters as a dense model has that Megatron builds."""
    log = run_training("count", 1, "--train-iters", 1, *flags)
    usual = [word for pair in (MODEL | TRAINING).items() for word in pair]
    shape = _shape(*usual, *SWITCHES, *flags)
    assert log.parameters == {(0, 0): total_parameters(shape, None)["total"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preset", "1.3b", "--memory-num-key", "8"), "did you mean --memory-num-keys?"),
        (("--preset", "2b"), "invalid choice: '2b'"),
        (("--num-layers", "2"), "--hidden-size, --num-attention-heads, --seq-length, --vocab-size"),
        (
            ("--preset", "134m", "--num-experts", "8"),
            "--num-experts: megamem plan does not support mixtures of experts",
        ),
        (("--preset", "134m", "--hidden-size", "760", "--num-attention-heads", "7"), "use|change"),
        (("--preset", "134m", "--fill", "1.5"), "--fill 1.5 must be"),
        (("--preset", "134m", "--memory-topk", "2000"), "--memory-topk 2000 is larger than"),
        (("--preset", "134m", "--world-size", "6", "--memory-group-size", "4"), "does not divide"),
        ((*BIG[:4], "--world-size", "8"), "no layout fits: .* --world-size 64 "),
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
    assert "--lr-warmup-iters" not in page and len(page.splitlines()) < 200
