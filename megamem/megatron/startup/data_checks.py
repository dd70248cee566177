"""Checks that the files named by --data-path and similar flags are complete, from a few bytes.

Only what Megatron itself would fail on is refused: the flags are read in its order and by its own
functions, and bytes that it does not read are of no account.

A dataset has two files. PREFIX.bin holds the tokens, PREFIX.idx the place of each sequence:

    magic 9 B | version 8 B | dtype 1 B | sequences 8 B | documents 8 B
    lengths 4 B each sequence | pointers 8 B each sequence | documents 8 B each [| modes 1 B each]

The last length and the last pointer give the size that PREFIX.bin has at least.
"""

import argparse
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.datasets.utils import get_blend_from_list

from megamem.spec import MemorySpec

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
LENGTH, POINTER = struct.Struct("<i"), struct.Struct("<q")
SPLITS = ("train", "valid", "test")
FILES = {
    "data_args_path": "give a text file with prefixes, and a weight before each of them or none",
    "per_split_data_args_path": "give a JSON file with one object, whose keys are train, valid and "
    "test and whose values are null or prefixes with a weight before each of them or none",
}
"""What the file of a flag has to hold."""


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
    if args.mock_data or not _reads_indexed_datasets(args):
        return []
    problems = []
    for flag, prefixes in _blends(args):
        if isinstance(prefixes, DataProblemError):
            problems.append(f"{flag}: {prefixes}")
            continue
        for prefix in prefixes:
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
    if is_object_storage_path(prefix):
        return  # Megatron fetches it first
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
        expected = index.data_bytes(stream)
    found = os.path.getsize(prefix + ".bin")
    if found < expected:
        raise DataProblemError(
            f"the .bin file has {found} bytes, but the .idx file names {expected}: it "
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


def _reads_indexed_datasets(args: argparse.Namespace) -> bool:
    """Whether --data-path names such files: conversations and external loaders have their own."""
    return not (getattr(args, "sft", False) or args.dataloader_type == "external")


def _blends(args: argparse.Namespace) -> Iterator[tuple[str, list[str] | DataProblemError]]:
    """Each flag that Megatron reads, with the prefixes that it names.

    Megatron reads the flags of splits only where no dataset is given for all of them, and a file of
    datasets before datasets on the command line.
    """
    if args.data_path is not None or args.data_args_path is not None:
        name = "data_path" if args.data_args_path is None else "data_args_path"
        blends = _words_of(name, args)
    elif args.per_split_data_args_path is not None:
        blends = _words_of("per_split_data_args_path", args)
    else:
        blends = [(f"{split}_data_path", getattr(args, f"{split}_data_path")) for split in SPLITS]
    for name, words in blends:
        # a file that lists datasets is named, as its datasets are not on the command line
        named = (
            _flag(name) if name.endswith("data_path") else f"{_flag(name)} {getattr(args, name)}"
        )
        yield named, words if isinstance(words, DataProblemError) else _prefixes(words)


def _words_of(name: str, args: argparse.Namespace) -> list[tuple[str, Any]]:
    """A flag with the words of each of its blends, or with what is wrong with its file."""
    value = getattr(args, name)
    if name == "data_path":
        return [(name, value)]
    if is_object_storage_path(value):
        return []  # only Megatron can fetch it
    try:
        text = Path(value).read_text()
        if name == "data_args_path":
            return [(name, text.split())]
        blends = json.loads(text)
        found = [blends[split] for split in SPLITS]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return [(name, DataProblemError(f"the file cannot be read ({reason}); {FILES[name]}"))]
    except (KeyError, TypeError):
        problem = f"the file lacks some of the keys {', '.join(SPLITS)}; {FILES[name]}"
        return [(name, DataProblemError(problem))]
    return [(name, words.split() if isinstance(words, str) else words) for words in found]


def _prefixes(words: list[Any] | None) -> list[str] | DataProblemError:
    """The prefixes of a blend: each of them has a weight before it, or none has."""
    try:
        blend = get_blend_from_list(words)
    except (AssertionError, AttributeError, TypeError, ValueError):
        shown = " ".join(map(str, words or ["an empty list"]))
        return DataProblemError(
            f"cannot read {shown}; give prefixes, with a weight before each of them or before none"
        )
    return [] if blend is None else list(blend[0])


def _is_weight(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
