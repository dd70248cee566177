"""Checks that the files named by --data-path and similar flags are complete, from a few bytes.

A dataset has two files. PREFIX.bin holds the tokens, PREFIX.idx the place of each sequence:

    magic 9 B | version 8 B | dtype 1 B | sequences 8 B | documents 8 B
    lengths 4 B each sequence | pointers 8 B each sequence | documents 8 B each [| modes 1 B each]

The last length and the last pointer give the size of PREFIX.bin.
"""

import argparse
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron.core.datasets.indexed_dataset import DType

from megamem.spec import MemorySpec

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
LENGTH, POINTER = struct.Struct("<i"), struct.Struct("<q")
BLEND_FLAGS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
FILE_FLAGS = ("data_args_path", "per_split_data_args_path")


class DataProblemError(Exception):
    """A dataset cannot be read; the message does not name the dataset."""


@dataclass(frozen=True)
class Index:
    """What the header of an .idx file says about it and about its .bin file."""

    token_bytes: int
    num_sequences: int
    num_documents: int

    @property
    def num_bytes(self) -> int:
        """Size of the .idx file in bytes, without the optional modes."""
        tables = self.num_sequences * (LENGTH.size + POINTER.size)
        return HEADER.size + tables + self.num_documents * POINTER.size

    def data_bytes(self, stream: BinaryIO) -> int:
        """Size of the .bin file in bytes: the offset of the last sequence plus its length."""
        lengths_end = HEADER.size + self.num_sequences * LENGTH.size
        stream.seek(lengths_end - LENGTH.size)
        (length,) = LENGTH.unpack(stream.read(LENGTH.size))
        stream.seek(lengths_end + (self.num_sequences - 1) * POINTER.size)
        (pointer,) = POINTER.unpack(stream.read(POINTER.size))
        return pointer + length * self.token_bytes


def data_problems(spec: MemorySpec | None, args: argparse.Namespace) -> list[str]:
    """A sentence for each dataset on the command line that this rank cannot read."""
    if args.mock_data:
        return []
    problems = []
    for flag, words in _blends(args):
        if isinstance(words, DataProblemError):
            problems.append(f"{flag}: {words}")
            continue
        for prefix in _prefixes(words):
            try:
                check_dataset(prefix)
            except DataProblemError as problem:
                problems.append(f"{flag} {prefix}: {problem}")
    return problems


def check_dataset(prefix: str) -> None:
    """Check the sizes of PREFIX.idx and PREFIX.bin against the header of PREFIX.idx.

    Raises:
        DataProblemError: a file is missing or truncated, or the two do not belong together.
    """
    if "://" in prefix:
        return  # object storage: Megatron fetches it first
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            raise DataProblemError(f"there is no {prefix}{suffix}; {_advice(prefix)}")
    size = os.path.getsize(prefix + ".idx")
    with open(prefix + ".idx", "rb") as stream:
        index = _read_header(stream, size)
        if size < index.num_bytes:
            raise DataProblemError(
                f"the .idx file is truncated: it has {size} of {index.num_bytes} bytes; build it "
                "again"
            )
        if size not in (index.num_bytes, index.num_bytes + index.num_sequences):
            raise DataProblemError(
                f"the .idx file has {size} bytes, but by its header it should have "
                f"{index.num_bytes}; build it again"
            )
        expected = index.data_bytes(stream)
    found = os.path.getsize(prefix + ".bin")
    if found != expected:
        raise DataProblemError(
            f"the .bin file has {found} bytes, but by the .idx file it should have {expected}: it "
            "is truncated or belongs to another .idx file; build or copy both files again"
        )


def _read_header(stream: BinaryIO, size: int) -> Index:
    header = stream.read(HEADER.size)
    if not header.startswith(MAGIC):
        raise DataProblemError(
            "the .idx file is not an index of Megatron, because it does not begin with MMIDIDX; "
            "build it with Megatron's tools/preprocess_data.py"
        )
    if len(header) < HEADER.size:
        raise DataProblemError(
            f"the .idx file is truncated: it has only {size} bytes; build it again"
        )
    _, version, code, num_sequences, num_documents = HEADER.unpack(header)
    if version != VERSION:
        raise DataProblemError(
            f"the .idx file has version {version}, but Megatron reads {VERSION}; build it again"
        )
    if code not in {dtype.value for dtype in DType}:
        raise DataProblemError(f"the .idx file has the unknown token type {code}; build it again")
    if not num_sequences:
        raise DataProblemError("the dataset has no sequences; build it from text that is not empty")
    return Index(DType.size(code), num_sequences, num_documents)


def _advice(prefix: str) -> str:
    if prefix.endswith((".idx", ".bin")):
        return f"give the path without its suffix: {prefix[:-4]}"
    if _is_weight(prefix):
        return "give a weight before each prefix or before none of them"
    near = sorted(Path(prefix).parent.glob(Path(prefix).name + "*.idx"))
    if near:
        return f"did you mean {', '.join(str(path)[:-4] for path in near[:3])}?"
    return "give the path of the dataset's two files without .idx or .bin"


def _blends(args: argparse.Namespace) -> Iterator[tuple[str, list[str] | DataProblemError]]:
    """Each flag that names datasets, with its values: prefixes, or weights and prefixes."""
    for name in BLEND_FLAGS:
        if words := getattr(args, name, None):
            yield _flag(name), words
    for name in FILE_FLAGS:
        if path := getattr(args, name, None):
            try:
                text = Path(path).read_text()
                blends = json.loads(text).values() if name.startswith("per_split") else [text]
            except (OSError, ValueError) as error:
                yield _flag(name), DataProblemError(f"cannot read {path}: {error}")
                continue
            for blend in filter(None, blends):
                yield _flag(name), blend.split() if isinstance(blend, str) else blend


def _prefixes(words: list[str]) -> list[str]:
    """The prefixes of a blend; as in Megatron, each of them has a weight before it or none has."""
    weighted = len(words) % 2 == 0 and all(_is_weight(word) for word in words[::2])
    return words[1::2] if weighted else words


def _is_weight(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
