"""The benchmark on a CPU: it runs, writes what it says, and times nothing that is wrong."""

import json

import pytest
import torch

from megamem import ops
from megamem.tools import bench, bench_cases

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
}


@pytest.fixture(autouse=True)
def small_and_on_the_twins(monkeypatch):
    # the interpreter is for tests of the kernels; here it would only be timed
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(bench, "copy_gbps", lambda device: 10.0)


def test_writes_a_record_of_each_case_and_a_picture(tmp_path, capsys):
    files = (tmp_path / "records.json", tmp_path / "roofline.png")
    options = ["--device", "cpu", "--quick", "--min-ms", "1"]
    assert bench.main([*options, "--json", str(files[0]), "--plot", str(files[1])]) == 0
    records = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert {r["op"].split()[0] for r in records} == {"embedding_bag", "product_topk", "adamw_"}
    for r in records:
        assert set(r) >= FIELDS
        assert r["gbps"] == pytest.approx(r["bytes"] / r["ms"] / 1e6)
        assert r["fraction"] == pytest.approx(r["gbps"] / 10.0)
        assert (r["speedup"] is None) == (r["baseline_ms"] is None)
    assert files[1].read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "only ratios mean anything" in printed and "zipf 1.0" in printed


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    right = ops.embedding_bag
    monkeypatch.setattr(
        ops, "embedding_bag", lambda *args, **options: 1.1 * right(*args, **options)
    )
    options = ["--device", "cpu", "--quick", "--min-ms", "1", "--ops", "bag"]
    assert bench.main(options) == bench.WRONG_RESULT
    streams = capsys.readouterr()
    assert "embedding_bag forward" in streams.err and "was not timed" in streams.err
    assert "GB/s" in streams.out and "uniform" not in streams.out


def test_cases_too_large_for_the_memory_are_named(monkeypatch, capsys):
    monkeypatch.setattr(bench, "_free_bytes", lambda device: 0)
    assert bench.main(["--device", "cpu", "--quick", "--ops", "adam"]) == 0
    assert "skipped: adamw_ fp32" in capsys.readouterr().out


def test_skewed_rows_follow_their_law():
    torch.manual_seed(0)
    num_rows, count = 2**12, 200_000
    rows = bench_cases.draw_rows(count, num_rows, "zipf 1.0", torch.device("cpu"))
    assert rows.min() >= 0 and rows.max() < num_rows
    counts = rows.bincount(minlength=num_rows).sort(descending=True).values.double() / count
    # the first of 4096 ranks takes ln 2 / ln 4096 of the lookups, the first 63 half of them
    assert counts[0] == pytest.approx(1 / 12, rel=0.05)
    assert counts[:63].sum() == pytest.approx(0.5, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_quick_run_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    assert bench.main(["--quick", "--min-ms", "20"]) == 0
