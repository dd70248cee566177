"""megamem doctor: the problems that it finds, and its exit status."""

import os
import re
import socket
import sys
from importlib import metadata
from itertools import product
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megamem import ops
from megamem.megatron import patches
from megamem.patching import MissingSymbolError
from megamem.tools import doctor, known_answers, support
from megamem.tools.doctor import Finding
from tests.helpers.commands import command, parser_of
from tests.helpers.distributed import run_distributed
from tests.helpers.megatron_runs import launch
from tests.kernels.test_known_answers import (
    clears_before_it_has_read,
    reads_counters_after_the_store,
    reads_garbage_from_the_third_block_on,
)

run_doctor = command("doctor")
CPU = torch.device("cpu")
TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-47
GPU1\tNV18\t X \tNV18\tSYS\t0-47
GPU2\tSYS\tNV18\t X \tSYS\t48-95
NIC0\tPIX\tSYS\tSYS\t X

Legend:
  X    = Self
  SYS  = Connection traversing PCIe
"""


def test_a_machine_that_passes_the_tests_is_ready() -> None:
    log = launch("doctor", 1, "doctor", module="megamem", check=False)
    assert log.returncode == 0, log.stdout
    assert "Ready: this machine can train memory layers" in log.stdout
    for what in (
        "python",
        "torch",
        "megatron-core",
        "norms",
        "small memory layer",
        "known answers",
    ):
        assert f"\u2502 {what} " in log.stdout
    assert torch.__version__.partition("+")[0] in log.stdout
    assert "PROBLEM" not in log.stdout


@pytest.mark.gloo
def test_ranks_measure_their_collectives() -> None:
    run = ("--num-layers", 4, "--hidden-size", 256, "--memory-layers", 1)
    words = ("doctor", "--mib", 1, "--flags", *run)
    wide = {"COLUMNS": "200"}
    log = launch("doctor", 2, *words, module="megamem", check=False, environment=wide)
    assert log.returncode == 0, log.stdout
    assert log.stdout.count("Ready: ") == log.stdout.count("Accepted: ") == 1
    for name in doctor.COLLECTIVES:
        assert f"\u2502 {name} " in log.stdout
    assert log.stdout.count("GB/s; 1 MiB per rank") == 3 + 2
    # one line with the layout for the tables of the flags
    found = re.search(r"^(--memory-\S+ .*) suits \S+ GB/s inside a node, (.*)$", log.stdout, re.M)
    assert found and "rows of 256 numbers of 4 bytes" in found[2] and "over 2 ranks." in found[2]


def test_a_peer_that_never_comes_is_a_problem() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    words = ("doctor", "--timeout", 2)
    log = launch("alone", 1, *words, module="megamem", check=False, environment=torchrun)
    assert log.returncode == 1
    assert "Not ready: 1 problem" in log.stdout and "rank 0 on" in log.stdout


@pytest.fixture
def healthy(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in ("versions", "megatron"):
        monkeypatch.setattr(doctor, name, lambda: [])
    for name in ("used", "layer_check"):
        good = Finding(name, "good")
        monkeypatch.setattr(doctor, name, lambda device, good=good: good)
    monkeypatch.setattr(doctor, "used", lambda device: [])
    # in Triton's interpreter the known answers would take minutes
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_one_problem_is_exit_status_1(healthy, monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "answers_check", lambda device: [])
    assert run_doctor([]) == 0
    assert "Ready:" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "versions", lambda: [Finding("torch", "too old", "problem")])
    assert run_doctor([]) == 1
    said = capsys.readouterr().out
    assert "Not ready: 1 problem" in said and "too old" in said and "PROBLEM" in said


@pytest.mark.parametrize(
    ("op", "fault", "said"),
    [
        # the faults that kernels of commits up to a4677c2 had on an H100
        ("adamw_", clears_before_it_has_read, "numbers of the weights are wrong"),
        ("touched_adamw_", reads_counters_after_the_store, "numbers of the weights are wrong"),
        ("product_topk", reads_garbage_from_the_third_block_on, "row ids are wrong"),
    ],
)
def test_a_kernel_that_is_wrong_is_not_ready(healthy, op, fault, said, monkeypatch, capsys) -> None:
    monkeypatch.setattr(ops, op, fault(getattr(ops, op)))
    assert run_doctor([]) == 1
    shown = " ".join(word for word in capsys.readouterr().out.split() if word != "\u2502")
    assert "Not ready:" in shown and f"{op} wrong on cpu at 1/4096 of the size" in shown
    assert said in shown and "do not train with it" in shown


def test_findings_of_the_known_answers(monkeypatch) -> None:
    right, wrong = known_answers.ANSWERS[0], known_answers.ANSWERS[-1]
    outcomes = [
        known_answers.Outcome(right, seconds=1.5),
        known_answers.Outcome(right, skipped="it needs 9 GiB, and 8 GiB are free"),
        known_answers.Outcome(wrong, "7 of 9 rows are wrong"),
    ]
    monkeypatch.setattr(known_answers, "run", lambda *args, **options: outcomes)
    gpu = torch.device("cuda", 3)
    correct, skipped, problem = doctor.answers_check(gpu)
    assert correct.status == "ok"
    assert correct.found == (
        "1 of 3 answers of 2 ops are correct on cuda:3, at the size of a real run; 1.5 s"
    )
    assert skipped.status == "note" and "was skipped: it needs 9 GiB" in skipped.found
    assert problem.status == "problem" and problem.what == wrong.op
    assert "wrong on cuda:3 at the size of a real run" in problem.found
    assert f"{wrong.name}: 7 of 9 rows are wrong" in problem.found


@pytest.mark.parametrize("flag", ["--mib", "--timeout"])
def test_flags_that_cannot_be(flag, capsys) -> None:
    assert run_doctor([flag, "0"]) == 2
    assert f"{flag} 0 must be at least 1" in capsys.readouterr().err


def _version(name: str, answer: str | None):
    truly = metadata.version

    def version(asked: str) -> str:
        if asked != name:
            return truly(asked)
        if answer is None:
            raise metadata.PackageNotFoundError(asked)
        return answer

    return mock.patch.object(metadata, "version", version)


def test_versions_are_compared_with_megamems_requirements() -> None:
    assert {finding.status for finding in doctor.versions()} == {"ok"}
    with _version("megatron-core", "0.16.1"):
        (bad,) = (f for f in doctor.versions() if f.status == "problem")
    assert bad.what == "megatron-core"
    assert "0.16.1, but megamem needs megatron-core" in bad.found and ">=0.17" in bad.found
    with _version("triton", None):
        (bad,) = (f for f in doctor.versions() if f.status == "problem")
    assert bad.what == "triton" and "not installed; run pip install 'triton>=" in bad.found


def test_a_megatron_without_a_function_is_a_problem() -> None:
    gone = MissingSymbolError("megatron.training.training.training_log does not exist")
    with mock.patch.object(patches, "install", side_effect=gone):
        (finding,) = doctor.megatron()
    assert finding.status == "problem"
    assert "training_log does not exist; install the release" in finding.found


def _installed(*names: str):
    return mock.patch.object(
        doctor.util, "find_spec", lambda name: object() if name in names else None
    )


def test_apex_of_pypi_is_told_from_nvidias() -> None:
    with _installed():
        assert doctor.nvidia_apex().status == "note"
    with _installed("apex"):
        finding = doctor.nvidia_apex()
    assert finding.status == "problem" and "PyPI's apex is another project" in finding.found
    fakes = {name: mock.MagicMock(__version__="0.1") for name in ("apex", "apex.optimizers")}
    # NVIDIA's own, built without its kernels, imports as well
    with _installed("apex"), mock.patch.dict(sys.modules, fakes):
        assert doctor.nvidia_apex().status == "problem"
    with _installed("apex", "amp_C"), mock.patch.dict(sys.modules, fakes):
        finding = doctor.nvidia_apex()
    assert finding == Finding("Apex", "0.1, built from source")


def test_a_transformer_engine_that_does_not_import_matters_on_a_gpu() -> None:
    # None in sys.modules makes its import fail
    broken = mock.patch.dict(sys.modules, {"transformer_engine": None})
    for gpu, status in ((True, "problem"), (False, "note")):
        with (
            _installed("transformer_engine"),
            broken,
            mock.patch.object(torch.cuda, "is_available", return_value=gpu),
        ):
            finding = doctor.transformer_engine()
        assert finding.status == status and "reinstall it" in finding.found


def test_what_is_used_follows_what_is_there() -> None:
    good, absent = Finding("x", "1.0"), Finding("x", "not installed", "note")
    for engine, apex, name in (
        (good, good, "Transformer Engine"),
        (absent, good, "Apex"),
        (absent, absent, "torch"),
    ):
        with (
            mock.patch.object(doctor, "transformer_engine", return_value=engine),
            mock.patch.object(doctor, "nvidia_apex", return_value=apex),
        ):
            found = {finding.what: finding.found for finding in doctor.used(CPU)}
        assert found["norms"] == name
        assert found["optimizer"].startswith(name)


def test_links_counts_pairs_of_gpus() -> None:
    assert doctor.links(TOPOLOGY) == "NV18 (2 pairs), SYS (1 pair)"
    assert doctor.links("No devices were found") == ""


def test_a_layer_that_is_wrong_in_one_gradient_is_found(monkeypatch) -> None:
    # this tests the finding, not the kernels, which would take minutes in Triton's interpreter
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert doctor.layer_check(CPU).status == "ok"
    truth = {dtype: doctor.tiny_layer(CPU, dtype) for dtype in (torch.float32, torch.float64)}
    for name, ours in truth[torch.float32].items():
        for spoil in (1.01, float("nan")):
            spoiled = truth | {torch.float32: truth[torch.float32] | {name: ours * spoil}}
            monkeypatch.setattr(doctor, "tiny_layer", lambda _, dtype, found=spoiled: found[dtype])
            finding = doctor.layer_check(CPU)
            assert finding.status == "problem" and name in finding.found
    monkeypatch.setattr(doctor, "tiny_layer", mock.Mock(side_effect=RuntimeError("no image")))
    finding = doctor.layer_check(CPU)
    assert finding.status == "problem" and "no image" in finding.found


def _collectives_and_problems_of_others() -> None:
    rank = dist.get_rank()
    for name, function in (
        ("all-to-all", "all_to_all_single"),
        ("all-gather", "all_gather_into_tensor"),
        ("reduce-scatter", "reduce_scatter_tensor"),
    ):
        assert doctor.collective_check(name, CPU, 2**16).status == "ok"
        # only one rank receives nothing, and all must report it
        truly = getattr(dist, function)

        def lost(out, sent, group, truly=truly):
            truly(torch.empty_like(out) if rank == 1 else out, sent, group=group)

        with mock.patch.object(dist, function, lost):
            finding = doctor.collective_check(name, CPU, 2**16)
        assert finding.status == "problem", name

    own = [Finding("GPUs", "one is missing", "problem")] if rank == 1 else []
    with (
        mock.patch.dict(os.environ, {"RANK": str(rank)}),
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
    ):
        findings, is_first = doctor.with_all_ranks(own, CPU, 2**16, 30)
    assert is_first == (rank == 0)
    (problem,) = (finding for finding in findings if finding.status == "problem")
    assert "one is missing" in problem.found
    assert problem.what.startswith("rank 1 on") == (rank == 0)


@pytest.mark.gloo
def test_rank_0_reports_the_problems_of_all_ranks() -> None:
    run_distributed(_collectives_and_problems_of_others, 2)


def test_forms_that_were_selected_are_named(monkeypatch) -> None:
    monkeypatch.delenv("MEGAMEM_FORMS", raising=False)
    assert doctor.selected_forms() == []
    monkeypatch.setenv("MEGAMEM_FORMS", "product_topk=torch")
    (finding,) = doctor.selected_forms()
    assert finding.found.startswith("product_topk=torch") and finding.status == "note"
    monkeypatch.setenv("MEGAMEM_FORMS", "product_topk=fast")
    (finding,) = doctor.selected_forms()
    assert "no form 'fast'" in finding.found and finding.status == "problem"


RUN = """CUDA_DEVICE_MAX_CONNECTIONS=1 GPUS=8 torchrun --nproc_per_node $GPUS --nnodes=2 \\
    -m megamem.run pretrain_gpt.py --num-layers 8 --hidden-size 256 --num-attention-heads 4 \\
    --seq-length 128 --bf16 --tensor-model-parallel-size 2 --save "/a b/c" \\
    --memory-layers 1 5 {} 2>&1 | tee log  # and then sleep
"""


def _rows(said: str) -> dict[str, str]:
    """Feature -> state, of the table that `megamem doctor --flags` prints."""
    cells = [[cell.strip() for cell in line.split("\u2502")] for line in said.splitlines()]
    return {row[1]: row[3] for row in cells if len(row) == 6 and row[1] and row[3]}


def test_a_command_line_that_works_is_accepted(capsys: pytest.CaptureFixture) -> None:
    assert (
        run_doctor(["--flags", RUN.format("--recompute-activations --context-parallel-size 2")])
        == 0
    )
    said = capsys.readouterr().out
    rows = _rows(said)
    assert rows["tensor parallelism"] == rows["data parallelism"] == rows["bf16"] == "yes"
    assert rows["context parallelism"] == "not run on a GPU"
    assert "pipeline parallelism" not in said and "fp16" not in said
    assert "recomputation of whole layers" in said and "REFUSED" not in said
    assert "2 of them have not been run on a GPU" in said and "Not flags" not in said


def test_what_is_refused_is_shown_with_the_reason(capsys: pytest.CaptureFixture) -> None:
    more = "--use-megatron-fsdp --yaml-cfg x --memory-num-key 3"
    assert run_doctor(["--flags", RUN.format(more).replace("1 5", "1 9")]) == 1
    said = capsys.readouterr().out
    together = " ".join(re.sub("[^ -~]", " ", said).split())
    rows = _rows(said)
    assert rows["Megatron's FSDP"] == rows["memory layers"] == "REFUSED"
    assert "REFUSED it has no way to leave parameters" in together
    assert "write the settings of the file" in together
    assert "--memory-layers 9 is out of" in together
    assert "Refused: 3 of these" in said and "(did you mean --memory-num-keys?)" in together


def test_flags_may_be_given_without_quotes_and_memory(capsys: pytest.CaptureFixture) -> None:
    assert run_doctor(["--flags", "--bf16", "--fp8-format", "hybrid"]) == 0
    assert "Without --memory-layers only Megatron's own flags" in capsys.readouterr().out
    assert run_doctor(["--flags", "--memory-layers", "1", "--memory-heads", "0"]) == 1
    assert "--memory-heads 0 must be" in capsys.readouterr().out


def test_under_torchrun_flags_are_checked_beside_the_machine(healthy, monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "answers_check", lambda device: [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    tables = []

    def with_all_ranks(findings, device, size, patience, table):
        tables.append(table)
        return findings, os.environ["RANK"] == "0"

    monkeypatch.setattr(doctor, "with_all_ranks", with_all_ranks)
    flags = ["--flags", "--memory-layers", "1", "--hidden-size", "64"]
    for rank, refused in product((0, 1), (False, True)):
        monkeypatch.setenv("RANK", str(rank))
        more = ["--use-megatron-fsdp", "--memory-heads", "0"] if refused else []
        assert run_doctor([*flags, *more]) == int(refused)
        said = capsys.readouterr().out
        assert ("Refused: 2 of these" in said) == (refused and rank == 0)
        assert ("Accepted:" in said) == (not refused and rank == 0)
        assert ("Ready:" in said) == (rank == 0)
    # what is refused has no size
    assert [table.width for table in tables] == [64, 2048] * 2


SHARDS = "--tensor-model-parallel-size 2 --tensor-parallel-num-weight-shards 4"
OF_ATTENTION = "--cuda-graph-impl transformer_engine --cuda-graph-scope attn"


@pytest.mark.parametrize(
    ("flags", "feature"),
    [
        (SHARDS, "weights sharded over further ranks"),
        ("--enable-cuda-graph", "CUDA graphs of anything else"),
        ("--external-cuda-graph", "CUDA graphs of anything else"),
        (f"{OF_ATTENTION} mlp", "CUDA graphs of anything else"),
        (OF_ATTENTION, ""),
    ],
)
def test_what_megatron_derives_is_refused_too(flags: str, feature: str) -> None:
    """In the release of these tests, if it has the flags."""
    args, unknown = support.parse([f"--num-layers 2 {flags}"], parser_of("doctor"))
    if unknown:
        pytest.skip(f"this release has no {' '.join(unknown)}")
    refused = [row.name for row in support.used(args) if row.state == "refused"]
    assert refused == ([feature] if feature else [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchrun pretrain_gpt.py ${ARGS[@]} --bf16", r"without a value: \$\{ARGS\[@\]\}; paste"),
        ("pretrain_gpt.py --save 'here", "cannot be read: No closing quotation"),
        ("pretrain_gpt.py --num-layers four", "invalid int value: 'four'"),
    ],
)
def test_a_command_line_that_cannot_be_read(capsys, text: str, message: str) -> None:
    assert run_doctor(["--flags", text]) == 2
    assert re.search(message, capsys.readouterr().err)
