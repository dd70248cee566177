"""megamem tune: what is wrong is named and never chosen, and a run uses what is written."""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamem.__main__ import parse
from megamem.config import ConfigurationError, MemoryConfig
from megamem.kernels import choices
from megamem.kernels import squared_norm as kernels
from megamem.ops import tuning
from megamem.ops.forms import FORMS
from megamem.parallel.tuning import load_tuning
from megamem.resolution import resolve
from megamem.tools import plan, tune
from megamem.tools.tune_ops import TUNED, Candidate, Sizes
from tests.helpers.commands import command

run_tune = command("tune")
CPU = torch.device("cpu")
SMALL = ("--preset", "134m", "--memory-num-keys", "64", "--memory-topk", "8")
PASTED = (
    "torchrun --nproc-per-node 8 -m megamem.run --cpu pretrain_gpt.py --num-layers 12 --bf16 "
    "--hidden-size 768 --num-attention-heads 12 --seq-length 512 --micro-batch-size 2 "
    "--vocab-size 50000 --lr 1e-3 --data-path 'a b' --memory-layers 4 --memory-topk 8"
)


@pytest.fixture(autouse=True)
def _own_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MEGAMEM_FORMS", raising=False)
    with choices.using(None):
        yield


@pytest.fixture
def norm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TUNED", tuple(op for op in TUNED if op.name == "squared_norm"))


def _timed(monkeypatch: pytest.MonkeyPatch, ms: Callable[[choices.Choices], float]) -> None:
    """Calls take as long as `ms` says for the choices with which they are made."""
    monkeypatch.setattr(tune, "median_ms", lambda call, *_: (call(), ms(choices.current()))[1])


def _spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], float]) -> None:
    """The kernel of the norm is wrong by a factor that depends on its numbers."""
    real = kernels.squared_norm

    def squared_norm(*given: Any) -> torch.Tensor:
        return real(*given) * spoil(choices.current().squared_norm)

    monkeypatch.setattr(kernels, "squared_norm", squared_norm)


def _run(tmp_path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "tuning.json"
    status = run_tune([*SMALL, "--device", "cpu", "--out", str(path), *words])
    return status, json.loads(path.read_text())


def test_every_form_gives_the_known_answers_and_a_run_uses_the_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # of the numbers of each form the last, as the interpreter takes its time
    last = [
        replace(op, numbers=lambda sizes, op=op: {f: n[-1:] for f, n in op.numbers(sizes).items()})
        for op in TUNED
    ]
    monkeypatch.setattr(tune, "TUNED", tuple(last))
    # the more a candidate differs from the default, the faster it seems to be
    _timed(monkeypatch, lambda now: 9.0 - now.row_adam.tile / 1024 - len(now.forms))
    path = tmp_path / "tuning.json"
    words = [PASTED, "--device", "cpu", "--out", str(path), "--seconds", "600"]
    assert run_tune(words) == 0
    said = capsys.readouterr().out
    assert f"Written to {path}" in said and "never chosen" not in said
    found = json.loads(path.read_text())
    assert {each["op"] for each in found["measured"]} == {op.name for op in TUNED}
    for op in TUNED:
        (best,) = [each for each in found["measured"] if each["op"] == op.name and each["chosen"]]
        if best["form"] != next(iter(FORMS[op.name])):
            assert found["choices"]["forms"][op.name] == best["form"]
        for name, number in best["numbers"].items():
            assert found["choices"][op.name][name] == number
    assert found["choices"]["forms"]["squared_norm"] == "triton"
    assert found["choices"]["row_adam"]["tile"] == 4096
    spec = resolve(MemoryConfig(memory_layers=[4], memory_topk=8, memory_tuning=str(path)), 64)
    assert "tokens=8 heads=2 topk=8" in load_tuning(spec, torch.bfloat16)
    assert choices.current() == tuning.read(path).choices != choices.GENERAL


@pytest.mark.usefixtures("norm_alone")
def test_a_wrong_candidate_is_named_and_not_chosen_however_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(numbers: Any) -> float:
        if numbers.num_warps == 8:
            raise RuntimeError("out of resource: shared memory\nand more")
        return 1 + 1e-6 * (numbers.rows == 16)

    _spoiled(monkeypatch, spoil)

    def ms(chosen: choices.Choices) -> float:
        fast = chosen.squared_norm.rows == 16 or chosen.squared_norm.num_warps == 8
        return 0.1 if fast else 4.0 if chosen.squared_norm.tile == 1024 else 5.0

    _timed(monkeypatch, ms)
    status, found = _run(tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert status == 0
    assert re.search(r"never chosen: squared_norm: triton rows=16: .* the sum of squares by", said)
    assert re.search(
        r"never chosen: squared_norm: triton tile=4096 max_block_v=2048 num_warps=8: .* it fails: "
        "RuntimeError: out of resource: shared memory ",
        said,
    )
    wrong = {tuple(x["numbers"].items()) for x in found["measured"] if x["wrong"]}
    assert len(wrong) == 2 and all(x["ms"] is None for x in found["measured"] if x["wrong"])
    assert found["choices"]["forms"] == {"squared_norm": "triton"}
    assert found["choices"]["squared_norm"]["tile"] == 1024
    assert found["choices"]["squared_norm"]["rows"] == choices.GENERAL.squared_norm.rows


@pytest.mark.usefixtures("norm_alone")
@pytest.mark.parametrize(("share", "chosen"), [(0.99, {}), (0.95, {"squared_norm": "triton"})])
def test_the_default_stays_unless_another_is_faster_by_more_than_the_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, chosen: dict[str, str]
) -> None:
    _timed(monkeypatch, lambda now: share if now.forms.get("squared_norm") else 1.0)
    assert _run(tmp_path)[1]["choices"]["forms"] == chosen


@pytest.mark.usefixtures("norm_alone")
def test_a_wrong_default_is_an_error_and_a_form_that_is_right_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = sys.modules["megamem.ops.squared_norm"]
    monkeypatch.setattr(module, "_by_torch", lambda *_: torch.zeros(()))
    status, found = _run(tmp_path)
    said = capsys.readouterr()
    assert status == tune.WRONG_DEFAULT
    assert said.err.startswith("megamem: error: the default of squared_norm is wrong on this")
    assert found["choices"]["forms"] == {"squared_norm": "triton"}
    assert [each["form"] for each in found["measured"] if each["wrong"]] == ["torch"]


@pytest.mark.usefixtures("norm_alone")
def test_what_the_time_did_not_suffice_for_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = _run(tmp_path, "--seconds", "0")
    assert status == 0 and found["measured"] == [] and found["choices"]["forms"] == {}
    said = capsys.readouterr().out
    assert "not tried, as --seconds 0 were over: squared_norm=torch\n" in said
    assert "not tried, as --seconds 0 were over: squared_norm=triton rows=16\n" in said


@pytest.mark.usefixtures("norm_alone")
def test_a_candidate_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _timed(monkeypatch, lambda _: 1.0)
    _, found = _run(tmp_path, "--without", "squared_norm=triton rows=16", "squared_norm=torch")
    tried = [(x["form"], x["numbers"].get("rows")) for x in found["measured"]]
    assert tried and ("torch", None) not in tried and ("triton", 16) not in tried


def test_a_candidate_that_ends_the_use_of_the_gpu_is_named(monkeypatch) -> None:
    def fail(_: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    sizes = Sizes.of(plan.job_from_args(parse("plan", list(SMALL)))).of_interpreter()
    search = tune.Search(sizes, torch.device("cuda"), 0.0, set())
    outcome = tune.Outcome(Candidate("x", "fast", {}), "it fails")
    with pytest.raises(ConfigurationError, match="x=fast ended .* --without 'x=fast'"):
        search._check_device("x=fast", outcome)
    search._check_device("x=fast", replace(outcome, wrong=""))


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ((), {}, "--device cuda: this machine has no GPU to measure; run megamem tune on one"),
        (("--device", "cpu"), {}, "--device cpu measures nothing that a run should use; add --out"),
        (
            ("--device", "cpu", "--out", "x"),
            {"MEGAMEM_FORMS": "squared_norm=triton"},
            "MEGAMEM_FORMS=squared_norm=triton comes before every choice that is measured here;",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    words: tuple[str, ...],
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_tune([*SMALL, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"megamem: error: {message}") and said.count("\n") == 1


def test_the_cpu_needs_the_interpreter_and_the_model_bf16(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tune([PASTED.replace("--bf16 ", ""), "--device", "cpu", "--out", "x"]) == 2
    assert "add --bf16" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run_tune([*SMALL, "--device", "cpu", "--out", "x"]) == 2
    assert "set TRITON_INTERPRET=1, or run megamem tune on a machine" in capsys.readouterr().err


def test_the_flags_of_a_command_line() -> None:
    assert tune.flags_of("--swiglu") == ["--swiglu"]
    assert tune.flags_of("squared_norm=triton rows=16") == ["squared_norm=triton rows=16"]
    flags = tune.flags_of(PASTED)
    assert flags[:2] == ["--num-layers", "12"] and "a b" in flags and "--cpu" not in flags
    assert tune.flags_of("--num-layers 12 --bf16") == ["--num-layers", "12", "--bf16"]


def _sizes(*words: str) -> Sizes:
    flags = "--preset 1.3b --memory-num-keys 1024 --world-size 16 --memory-group-size 8 "
    return Sizes.of(plan.job_from_args(parse("plan", shlex.split(flags + " ".join(words)))))


def test_the_sizes_are_those_of_one_rank() -> None:
    alone = _sizes("--memory-group-size 1")
    assert (alone.rows, alone.lookups, alone.topk) == (1024**2, 128, 32)
    assert alone.bags == alone.tokens
    assert alone.senders == 1
    by_row = _sizes()
    assert (by_row.rows, by_row.lookups, by_row.senders) == (1024**2 // 8, 128, 8)
    assert by_row.bags == 8 * by_row.tokens and by_row.value_dim == alone.value_dim
    sent = _sizes("--memory-wire alltoall")
    assert (sent.rows, sent.lookups, sent.senders) == (1024**2 // 8, 16, 1)
    by_column = _sizes("--memory-mode column")
    assert (by_column.rows, by_column.lookups, by_column.senders) == (1024**2, 128, 1)
    assert by_column.bags == 8 * by_column.tokens
    assert by_column.value_dim == alone.value_dim // 8
    fits = by_row.that_fit(2e9)
    assert fits.rows < by_row.rows and fits.bags < by_row.bags
    assert by_row.that_fit(1e15).rows >= by_row.rows - 2 * 363


def test_tucker_scores_are_no_sums_of_scores_to_tune() -> None:
    """Top 128 of each side is more than product_topk supports; a token has a bag for each block."""
    flags = "--memory-variant ultramem --memory-topk 128 --memory-init released"
    sizes = _sizes(f"{flags} --memory-group-size 1")
    assert (sizes.tucker_rank, sizes.num_keys, sizes.lookups) == (2, 2048, 2 * 128 // 4)
    assert sizes.bags == 4 * sizes.tokens
    tried = [op.name for op in TUNED if op.candidates(sizes, tuning.current())]
    assert tried == [op.name for op in TUNED if not op.name.startswith("product_topk")]


def test_the_timed_calls_run_with_lookups_of_other_ranks() -> None:
    """One lookup in eight is for a row of this rank; all ops take the others."""
    sizes = _sizes().of_interpreter()
    assert sizes.senders == 8
    for op in TUNED:
        for _, call in op.runs(sizes, CPU):
            call()


def test_the_default_is_the_first_candidate_and_none_comes_twice() -> None:
    for op in TUNED:
        for optimizer in ("adamw", "lazy_adamw", "rowwise_adamw", "sgd"):
            sizes = replace(_sizes(), optimizer=optimizer)
            for present in (choices.GENERAL, *choices.DEFAULTS.values()):
                first, *others = op.candidates(sizes, present)
                assert first == Candidate(op.name, next(iter(FORMS[op.name])), {})
                assert first.choose(present) == present
                changed = [other.choose(present) for other in others]
                assert all(each != present for each in changed)
                assert all(changed.count(each) == 1 for each in changed)


def test_other_processes_compile_the_kernels_of_a_candidate() -> None:
    """With few tokens or rows, and the widths of the run."""
    sizes = _sizes().of_interpreter()
    for op in TUNED:
        tune._compile_one(op.name, op.candidates(sizes, choices.GENERAL)[-1], sizes, "cpu")
    assert choices.current() is choices.GENERAL


def test_the_file_lies_in_the_cache_folder(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    args = parse("tune", list(SMALL)).parsed()
    assert tune._out(args, torch.device("cuda")) == tmp_path / "megamem/tuning-nvidia-h100.json"
