import json
import struct
from argparse import Namespace
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megamem.megatron.startup.data_checks import data_problems
from tests.helpers.megatron_runs import run_training

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
    """What is wrong with --data-path WORDS, or with datasets that other flags name."""
    usual = dict.fromkeys(
        (
            *("data_args_path", "per_split_data_args_path"),
            *("train_data_path", "valid_data_path", "test_data_path"),
        )
    )
    paths = {"mock_data": False, "data_path": list(words) or None, "dataloader_type": "single"}
    return data_problems(None, Namespace(**{**paths, **usual, **flags}))


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


def test_every_flag_that_megatron_reads_is_looked_at(prefix, tmp_path):
    def flags(**given):
        return [line.split(": ")[0] for line in problems(**given)]

    splits = {
        "train_data_path": [prefix, f"{prefix}1", prefix],
        "valid_data_path": ["1.0", f"{prefix}2"],
        "test_data_path": None,
    }
    assert flags(**splits) == [f"--train-data-path {prefix}1", f"--valid-data-path {prefix}2"]

    per_split = tmp_path / "splits.json"
    text = {"train": f"1 {prefix}y", "valid": None, "test": [0.5, f"{prefix}z"], "more": "nowhere"}
    per_split.write_text(json.dumps(text))
    splits["per_split_data_args_path"] = str(per_split)
    flag = f"--per-split-data-args-path {per_split}"
    assert flags(**splits) == [f"{flag} {prefix}y", f"{flag} {prefix}z"]

    blend = tmp_path / "blend.txt"
    blend.write_text(f"1 {prefix} 2 {prefix}x")
    splits["data_args_path"] = str(blend)
    assert flags(**splits) == [f"--data-args-path {blend} {prefix}x"]


def test_files_of_datasets_are_read_as_megatron_reads_them(prefix, tmp_path):
    assert "cannot be read (No such file" in problems(data_args_path=str(tmp_path / "none"))[0]
    assert "cannot be read" in problems(per_split_data_args_path=prefix + ".bin")[0]
    splits = tmp_path / "splits.json"
    for text in ("[1]", '{"train": null}'):
        splits.write_text(text)
        (line,) = problems(per_split_data_args_path=str(splits))
        assert f"{splits}: the file lacks some of the keys train, valid, test" in line
    splits.write_text(json.dumps({"train": [prefix, 0.5], "valid": [], "test": None}))
    wrong, empty = problems(per_split_data_args_path=str(splits))
    assert f"cannot read {prefix} 0.5" in wrong and "cannot read an empty list" in empty
    assert problems(data_args_path="msc://profile/blend.txt") == []


def test_mock_data_needs_no_files():
    assert problems("nowhere", mock_data=True) == []


def test_what_is_no_indexed_dataset_is_left_to_megatron():
    """Conversations for --sft, and whatever an external loader reads."""
    assert problems("x.jsonl", sft=True) == []
    assert problems("x.yaml", dataloader_type="external") == []
    assert len(problems("x.jsonl", sft=False)) == 1


def test_object_storage_is_left_to_megatron():
    assert problems("s3://bucket/facts", "msc://profile/facts") == []
    # Megatron takes any other address for the name of a file
    (line,) = problems("https://host/facts")
    assert "there is no https://host/facts.idx" in line


def test_blanks_around_a_prefix_are_dropped(prefix):
    assert problems(f" {prefix}\n") == []
    assert problems("1", f"{prefix} ") == []


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_bytes_that_megatron_does_not_read_are_of_no_account(prefix, suffix):
    write(prefix + suffix, lambda data: data + b"\0\0\0")
    assert problems(prefix) == []
    assert len(IndexedDataset(prefix)) == 4


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
        (".idx", at(17, b"\x04"), "has 34 bytes, but the .idx file names 38"),
        (".bin", lambda data: data[:-2], "has 32 bytes, but the .idx file names 34"),
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


@pytest.mark.gloo
def test_only_runs_with_memory_layers_are_checked(tmp_path):
    """What a dense run reads is between its script and Megatron."""
    data = ("--data-path", tmp_path / "nowhere")
    dense = run_training("dense", 1, check=False, data=data)
    assert "One or both of the .idx and .bin files cannot be found" in dense.stdout
    assert "megamem: error" not in dense.stdout
    memory = ("--memory-layers", 1, "--memory-num-keys", 16, "--memory-topk", 4)
    with_memory = run_training("with memory", 1, *memory, check=False, data=data)
    assert f"megamem: error: --data-path {data[1]}: there is no" in with_memory.stdout
    assert "Traceback" not in with_memory.stdout
