import struct
from argparse import Namespace
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megamem.megatron.startup.data_checks import data_problems

LENGTHS = [[3, 5], [7], [2]]  # sequences of each document


def build(prefix: Path, dtype=numpy.uint16, modes: bool = False) -> str:
    """The prefix of a dataset that Megatron's builder has written."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=modes)
    for lengths in LENGTHS:
        tokens = torch.arange(sum(lengths))
        builder.add_document(tokens, lengths, modes=[0] * len(lengths) if modes else None)
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def problems(*words: str, **flags) -> list[str]:
    return data_problems(None, Namespace(mock_data=False, data_path=list(words), **flags))


@pytest.fixture
def prefix(tmp_path) -> str:
    return build(tmp_path / "facts_text_document")


@pytest.mark.parametrize("dtype", [numpy.uint8, numpy.uint16, numpy.int32, numpy.int64])
@pytest.mark.parametrize("modes", [False, True])
def test_whole_datasets_pass(tmp_path, dtype, modes):
    assert problems(build(tmp_path / "whole", dtype, modes)) == []


def test_a_merged_dataset_passes(tmp_path, prefix):
    builder = IndexedDatasetBuilder(f"{tmp_path}/both.bin", dtype=numpy.uint16)
    builder.add_index(prefix)
    builder.add_index(build(tmp_path / "second"))
    builder.finalize(f"{tmp_path}/both.idx")
    assert problems(f"{tmp_path}/both") == []
    assert len(IndexedDataset(f"{tmp_path}/both")) == 8


def test_weights_are_not_prefixes(prefix):
    assert problems("0.3", prefix, "0.7", prefix) == []
    assert problems(prefix, prefix) == []
    assert problems() == []


def test_every_flag_is_looked_at(prefix, tmp_path):
    (tmp_path / "blend.txt").write_text(f"1 {prefix} 2 {prefix}x")
    (tmp_path / "splits.json").write_text(f'{{"train": ["{prefix}y"], "valid": null}}')
    found = problems(
        train_data_path=[prefix, f"{prefix}1", prefix],
        valid_data_path=["1.0", f"{prefix}2"],
        test_data_path=None,
        data_args_path=str(tmp_path / "blend.txt"),
        per_split_data_args_path=str(tmp_path / "splits.json"),
    )
    assert [line.split(":")[0] for line in found] == [
        f"--train-data-path {prefix}1",
        f"--valid-data-path {prefix}2",
        f"--data-args-path {prefix}x",
        f"--per-split-data-args-path {prefix}y",
    ]
    assert "cannot read" in problems(data_args_path=str(tmp_path / "none"))[0]
    assert "cannot read" in problems(per_split_data_args_path=prefix + ".bin")[0]


def test_mock_data_needs_no_files():
    assert data_problems(None, Namespace(mock_data=True, data_path=["nowhere"])) == []


def test_object_storage_is_left_to_megatron():
    assert problems("s3://bucket/facts", "msc://profile/facts") == []


def test_a_missing_file_comes_with_advice(prefix):
    for given, advice in {
        f"{prefix}.idx": f"without its suffix: {prefix}",
        f"{prefix}.bin": f"without its suffix: {prefix}",
        prefix.removesuffix("_text_document"): f"did you mean {prefix}?",
        "nowhere/facts": "without .idx or .bin",
    }.items():
        (line,) = problems(given)
        assert f"there is no {given}.idx" in line and advice in line


def test_a_weight_among_prefixes_is_named(prefix):
    assert "give a weight before each prefix" in problems("0.5", prefix, prefix)[0]


def write(path: str, change) -> None:
    data = bytearray(Path(path).read_bytes())
    Path(path).write_bytes(change(data) or data)


def at(offset: int, value: bytes):
    """A change of a file that writes `value` at `offset`."""

    def change(data: bytearray) -> None:
        data[offset : offset + len(value)] = value

    return change


@pytest.mark.parametrize(
    ("suffix", "change", "sentence"),
    [
        (".idx", at(0, b"PK"), "does not begin with MMIDIDX"),
        (".idx", lambda data: b"\0", "does not begin with MMIDIDX"),
        (".idx", lambda data: data[:20], "is truncated: it has only 20 bytes"),
        (".idx", at(9, struct.pack("<Q", 2)), "has version 2, but Megatron reads 1"),
        (".idx", at(17, b"\x63"), "the unknown token type 99"),
        (".idx", at(18, struct.pack("<Q", 0)), "the dataset has no sequences"),
        (".idx", at(18, struct.pack("<Q", 1 << 60)), "truncated"),
        (".idx", lambda data: data[:-1], "is truncated: it has 113 of 114 bytes"),
        (
            ".idx",
            lambda data: data + b"\0\0",
            "has 116 bytes, but by its header it should have 114",
        ),
        (".idx", at(17, b"\x04"), "has 34 bytes, but by the .idx file it should have 38"),
        (".bin", lambda data: data[:-2], "has 32 bytes, but by the .idx file it should have 34"),
        (".bin", lambda data: data + b"\0", "has 35 bytes, but by the .idx file it should have 34"),
    ],
)
def test_damage_is_named(prefix, suffix, change, sentence):
    write(prefix + suffix, change)
    (line,) = problems(prefix)
    assert line.startswith(f"--data-path {prefix}: ") and sentence in line


def test_a_lost_file_is_named(prefix):
    Path(prefix + ".bin").unlink()
    assert f"there is no {prefix}.bin" in problems(prefix)[0]


def test_several_problems_are_all_named(prefix, tmp_path):
    other = build(tmp_path / "other")
    Path(other + ".bin").write_bytes(b"")
    assert len(problems("1", other, "2", "nowhere", "3", prefix)) == 2
