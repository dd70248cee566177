"""The benchmark on a CPU: its table, its records, its plot, and that wrong results have no time."""

import json
import re
from pathlib import Path

import pytest
import torch
import triton
from torch.nn import functional as F

from megamem import ops
from megamem.__main__ import INTERRUPTED, parse
from megamem.errors import USER_ERROR
from megamem.ops.forms import FORMS
from megamem.tools import bench, bench_cases, bench_published, bench_steps, bench_table
from megamem.tools.bench_published import PublishedKernels
from tests.helpers.commands import command

run_bench = command("bench")
RESULTS = sorted((Path(__file__).parent / "results").glob("*.jsonl"))
MEASURED = {
    "sort_lookups",
    "embedding_bag",
    "product_topk",
    "tucker_topk",
    "adamw_",
    "touched_adamw_",
    "row_dot",
    "squared_norm",
}
FIELDS = {
    "device",
    "op",
    "shape",
    "dtype",
    "ms",
    "bytes",
    "gbps",
    "distribution",
    "ceiling_gbps",
    "fraction",
    "baseline",
    "speedup",
    "published_ms",
    "commit",
    "command",
    "failures",
    "torch",
    "triton",
}


@pytest.fixture(autouse=True)
def small_and_on_the_twins(monkeypatch):
    # Triton's interpreter is for tests of the kernels; here it would only take time
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(bench, "copy_gbps", lambda device: 10.0)


def test_writes_a_record_of_each_case_and_a_picture(tmp_path, capsys):
    files = (tmp_path / "results" / "records.json", tmp_path / "pictures" / "roofline.png")
    options = ["--device", "cpu", "--quick", "--min-ms", "1"]
    assert run_bench([*options, "--json", str(files[0]), "--plot", str(files[1])]) == 0
    records = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert {r["op"].split()[0] for r in records} == MEASURED
    for r in records:
        assert set(r) >= FIELDS
        assert r["gbps"] == pytest.approx(r["bytes"] / r["ms"] / 1e6)
        assert r["fraction"] == pytest.approx(r["gbps"] / 10.0)
        assert (r["speedup"] is None) == (r["baseline_ms"] is None)
    assert files[1].read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "do not tell how fast the kernels are" in printed and "zipf 1.0" in printed

    assert run_bench(["--table", str(files[0])]) == 0
    caption, _, heading, rule, *rows = capsys.readouterr().out.splitlines()
    assert "a large copy 10 GB/s" in caption and f"--json {files[0]}" in caption
    assert f"torch {torch.__version__}, Triton {triton.__version__}; commit" in caption
    # the column of the published kernels is left out, as they did not run
    assert len(rows) == len(records) and heading.count("|") == rule.count("|") == 11
    for row, r in zip(rows, records, strict=True):
        assert r["op"] in row and f"| {r['ms']:.3f} |" in row and row.count("|") == 11


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_of_earlier_commits_are_read(path):
    records = bench_table.read_records(path)
    table = bench_table.markdown(records)
    rows = [line for line in table.splitlines() if line.startswith("| ") and " T=" in line]
    assert len(rows) == sum("T" in record.shape for record in records) > 0
    assert f"{records[0].device}, a large copy" in table
    for record in records:
        assert record.error <= bench_cases.MAX_RELATIVE_ERROR and record.commit
        assert f"| {record.ms:.3f} |" in table


def test_a_table_of_several_runs_goes_into_a_page(tmp_path, capsys):
    (first, *_) = RESULTS
    other = tmp_path / "other.jsonl"
    record = json.loads(first.read_text().splitlines()[0])
    told = {"commit": "0ther", "failures": ["theirs: NotImplementedError: not in bf16"]}
    other.write_text(json.dumps(record | told))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n")
    words = ["--table", str(first), str(other)]
    assert run_bench([*words, "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- bench: begin -->\n") and "old" not in text
    assert text.endswith("\n<!-- bench: end -->\nafter\n")
    assert text.index(f"commit {record['commit']}") < text.index("commit 0ther")
    assert (
        "Not compared: theirs: NotImplementedError: not in bf16 (in embedding_bag forward T="
        in text
    )
    assert run_bench(words) == 0
    assert capsys.readouterr().out.strip() in text
    page.write_text("no markers")
    assert run_bench([*words, "--into", str(page)]) == USER_ERROR
    assert "the page has no <!-- bench: begin -->" in capsys.readouterr().err
    assert run_bench(["--into", str(page)]) == USER_ERROR
    assert f"--into {page} needs --table FILE" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{}\n", "[1]\n", "not json\n"])
def test_a_file_without_records_makes_no_table(content, tmp_path, capsys):
    path = tmp_path / "records.json"
    path.write_text(content)
    for wrong in (path, tmp_path / "absent.json"):
        assert run_bench(["--table", str(wrong)]) == USER_ERROR
        streams = capsys.readouterr()
        assert not streams.out and f"{wrong}: the file does not hold records" in streams.err


def test_published_kernels_come_from_a_checkout(tmp_path, capsys):
    assert run_bench(["--device", "cpu", "--published", str(tmp_path)]) == USER_ERROR
    assert "needs a GPU" in capsys.readouterr().err
    gpu = torch.device("cuda")
    with pytest.raises(ValueError, match="name a checkout of"):
        PublishedKernels.load(tmp_path, gpu)
    path = tmp_path / bench_published.MODULE
    path.parent.mkdir(parents=True)
    path.write_text("")
    with pytest.raises(ValueError, match="has no xformers_embedding_bag"):
        PublishedKernels.load(tmp_path, gpu)
    path.write_text(f"def {bench_published.FUNCTION}(indices, weight, weights): return 'called'")
    assert PublishedKernels.load(tmp_path, gpu).bag(1, 2, 3) == "called"


def test_published_kernels_are_timed_beside_ours():
    shapes = []

    def bag(row_ids, table, weights):
        shapes.append((row_ids.shape, table.shape, weights.shape, weights.dtype))
        return F.embedding_bag(row_ids, table, mode="sum", per_sample_weights=weights)

    cpu = torch.device("cpu")
    cases = bench_cases.bag_cases([16], [64], 4, 8, torch.float32, cpu, PublishedKernels(bag))
    timed = {case.op: bench.measure(case, cpu, "cpu", 10.0, 1).published_ms for case in cases}
    ops_with_rival = {"embedding_bag forward", "embedding_bag forward + backward"}
    assert {op for op, ms in timed.items() if ms is not None} == ops_with_rival
    assert set(shapes) == {((4, 8), (64, 16), (4, 8), torch.float32)}


@pytest.mark.parametrize(
    ("words", "gpus", "said"),
    [
        (
            "--device cuda",
            0,
            "--device cuda: torch finds no GPUs on this machine; use --device cpu",
        ),
        ("--memory --device cuda", 0, "--device cuda: torch finds no GPUs on this machine"),
        ("--device cuda:2", 2, "finds 2 GPUs on this machine; .* or cuda:0 to cuda:1"),
        ("--device gpu", 0, "--device gpu is not cuda, cuda:1 or cpu"),
        ("--device meta", 0, "--device meta is not cuda, cuda:1 or cpu"),
    ],
)
def test_a_device_that_is_not_there_is_named(words, gpus, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert run_bench(words.split()) == USER_ERROR
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    right = ops.embedding_bag
    monkeypatch.setattr(
        ops, "embedding_bag", lambda *args, **options: 1.1 * right(*args, **options)
    )
    options = ["--device", "cpu", "--quick", "--min-ms", "1", "--ops", "bag"]
    assert run_bench(options) == bench.WRONG_RESULT
    streams = capsys.readouterr()
    assert "embedding_bag forward" in streams.err and "was not timed" in streams.err
    assert "GB/s" in streams.out and "uniform" not in streams.out


def test_a_case_that_runs_out_of_memory_is_skipped_and_a_cut_off_run_leaves_its_records(
    monkeypatch, tmp_path, capsys
):
    path = tmp_path / "records.json"
    options = ["--device", "cpu", "--quick", "--min-ms", "1", "--json", str(path)]
    measure, seen = bench.measure, []

    def limited(case, *rest):
        seen.append(case)
        if len(seen) == 2:
            raise torch.OutOfMemoryError("too much")
        if len(seen) == 4:
            raise KeyboardInterrupt
        return measure(case, *rest)

    monkeypatch.setattr(bench, "measure", limited)
    assert run_bench(options) == INTERRUPTED
    assert len(path.read_text().splitlines()) == 2


def test_a_case_that_fails_is_named_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def fail(*args, **options):
        raise RuntimeError("ptxas went away\nand a page about it")

    monkeypatch.setattr(ops, "sparse_gradients", fail)
    path = tmp_path / "records.json"
    options = ["--device", "cpu", "--quick", "--min-ms", "1", "--ops", "bag", "adam"]
    assert run_bench([*options, "--json", str(path)]) == bench.WRONG_RESULT
    failed = capsys.readouterr().err
    assert "sparse backward T=64" in failed and "fails: RuntimeError: ptxas went away" in failed
    kept = [record.op for record in bench_table.read_records(path)]
    # the check of every embedding_bag case uses that op, too
    steps = [f"adamw_ {kind}" for kind in bench_steps.ADAM]
    norms = [f"squared_norm {form}" for form in FORMS["squared_norm"]]
    lazy = [f"touched_adamw_ fp32, {form}" for form in FORMS["row_adam"]]
    assert kept == [*steps, *norms, *lazy]


def test_a_rival_that_fails_is_left_out_and_named():
    def too_much(*args):
        raise torch.OutOfMemoryError("too much")

    cpu = torch.device("cpu")
    case, *_ = bench_cases.bag_cases(
        [16], [64], 4, 8, torch.float32, cpu, PublishedKernels(too_much)
    )
    record = bench.measure(case, cpu, "cpu", 10.0, 1)
    assert record.published_ms is None and record.baseline_ms is not None
    assert record.failures == ("published: OutOfMemoryError: too much",)


def test_where_torch_has_no_backward_in_bf16_its_rival_is_in_fp32(monkeypatch):
    """On a GPU torch raises NotImplementedError."""
    truly = F.embedding_bag

    def embedding_bag(row_ids, table, *args, per_sample_weights, **options):
        out = truly(row_ids, table, *args, per_sample_weights=per_sample_weights, **options)
        if per_sample_weights.dtype == torch.bfloat16 and per_sample_weights.requires_grad:
            out.register_hook(_not_implemented)
        return out

    def _not_implemented(grad):
        raise NotImplementedError("embedding_bag_per_sample_weights_backward not for 'BFloat16'")

    monkeypatch.setattr(bench_cases.F, "embedding_bag", embedding_bag)
    cpu = torch.device("cpu")
    cases = bench_cases.bag_cases([16], [64], 4, 8, torch.bfloat16, cpu)
    by_op = {case.op: bench.measure(case, cpu, "cpu", 10.0, 1) for case in cases}
    both = by_op["embedding_bag forward + backward"]
    assert both.baseline == "F.embedding_bag in fp32" and both.baseline_ms is not None
    (failure,) = both.failures
    assert failure.startswith("F.embedding_bag: NotImplementedError: embedding_bag_per_sample")
    assert f"{both.baseline_ms:.3f} (fp32)" in bench_table.cells(both)
    assert bench_table.failures([both])[0].startswith(failure)
    forward = by_op["embedding_bag forward"]
    assert forward.baseline == "F.embedding_bag" and not forward.failures


def test_a_quick_run_on_a_gpu_of_80_gb_measures_every_op_at_the_size_of_a_real_run():
    args = parse("bench", ["--quick"])
    cases = list(bench._cases(args, torch.device("cuda"), None))
    # the row gradient by itself is of kernels alone
    assert {case.op.split()[0] for case in cases} == MEASURED | {"row"}
    for case in cases:
        # 85 % of the memory of an H100, as in bench._free_bytes
        assert case.memory < 0.85 * 78 * 2**30, case.op
        sizes = {"V": 2048, "R": 2**20, "N": 1024, "C": 512, "T": 8192, "K": 32}
        if case.op.startswith("tucker_topk"):
            # of the 227M models of the second paper
            sizes |= {"N": 1138, "C": 192}
        if case.distribution.endswith("1 of 8 present"):
            sizes["T"] *= 8
        assert all(sizes.get(letter, size) == size for letter, size in case.shape.items())


def test_cases_too_large_for_the_memory_are_named(monkeypatch, capsys):
    monkeypatch.setattr(bench, "_free_bytes", lambda device: 0)
    assert run_bench(["--device", "cpu", "--quick", "--ops", "adam"]) == 0
    assert "skipped: adamw_ fp32" in (said := capsys.readouterr().out)
    assert "it needs 0 GiB, and 0 GiB are free" in said


def test_skewed_rows_follow_their_law():
    torch.manual_seed(0)
    num_rows, count = 2**12, 200_000
    rows = bench_cases.draw_rows(count, num_rows, "zipf 1.0", torch.device("cpu"))
    assert rows.min() >= 0 and rows.max() < num_rows
    counts = rows.bincount(minlength=num_rows).sort(descending=True).values.double() / count
    # the most popular of 4096 rows gets ln 2 / ln 4096 of the lookups, the first 63 get half
    assert counts[0] == pytest.approx(1 / 12, rel=0.05)
    assert counts[:63].sum() == pytest.approx(0.5, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_quick_run_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    assert run_bench(["--quick", "--min-ms", "20"]) == 0
