"""Models as safetensors files, read by the safetensors library and written region by region.

The library maps what it reads: a tensor is loaded where it is used, and memory need not hold it.
What it writes must be whole tensors in memory, which a table may be too large for. write_file is
for that alone: it writes a header and fills a mapped file (8 bytes of header length, a JSON header
with dtype, shape and place of every tensor, then the numbers).

A model in several files has an index that says which holds what, as Hugging Face lays it out; a
tensor is never cut.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamem.config import ConfigurationError
from megamem.tools.convert.lazy import LazyTensor, Tensors

INDEX = "model.safetensors.index.json"
# what is written; the library reads others, too
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8
ROWS_AT_ONCE = 2**16


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name -> tensor, mapped from the file, and the file's own remarks.

    Raises:
        ConfigurationError: it is no safetensors file, or is cut short.
    """
    try:
        with safe_open(path, "pt") as file:
            # unlike get_slice, this also lets rows be read in any order, and is no less lazy
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"{path} is no safetensors file: {error}.") from error


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a model in one file or several, and the remarks of all files.

    Raises:
        ConfigurationError: there are none, or one is not what it should be.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            places = json.loads(index.read_text())["weight_map"]
            files = [folder / name for name in sorted(set(places.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"{index} is no index of safetensors files.") from error
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigurationError(f"there are no safetensors files in {folder}.")
    return read_files(files)


def read_files(files: list[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of some files, and their remarks.

    Raises:
        ConfigurationError: one is not what it should be, or two hold the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    remarks: dict[str, str] = {}
    for file in files:
        found, said = read_file(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ConfigurationError(f"{file} holds {twice[0]}, which another file has already.")
        tensors |= found
        remarks |= said
    return tensors, remarks


def write_folder(
    folder: Path,
    tensors: Tensors,
    remarks: dict[str, str],
    shard_bytes: int,
    advance: Callable[[int], None],
) -> list[Path]:
    """Write a model; return its files.

    Args:
        folder: made if need be.
        tensors: name -> tensor, in this order.
        remarks: what every file says of itself.
        shard_bytes: a file is ended before it grows larger, unless by one tensor alone.
        advance: told how many bytes were written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, shard_bytes)
    several = len(shards) > 1
    files: list[Path] = []
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        count = f"-{number:05d}-of-{len(shards):05d}" if several else ""
        file = folder / f"model{count}.safetensors"
        write_file(file, {name: tensors[name] for name in names}, remarks, advance)
        files.append(file)
        places |= dict.fromkeys(names, file.name)
    if several:
        total = sum(tensor.num_bytes for tensor in tensors.values())
        index = {"metadata": remarks | {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    return files


def _shards(tensors: Tensors, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.num_bytes
    return shards


def write_file(
    path: Path, tensors: Tensors, remarks: dict[str, str], advance: Callable[[int], None]
) -> None:
    """Write tensors region by region, each to its place in the mapped file."""
    header: dict[str, Any] = {"__metadata__": remarks}
    end = 0
    # widest first, so that every tensor lies at a multiple of its item size
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    for name, tensor in ordered:
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.num_bytes],
        }
        end += tensor.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(start + end)
    if not end:
        return
    mapped = torch.from_file(str(path), shared=True, size=start + end, dtype=torch.uint8)[start:]
    for name, tensor in ordered:
        first, last = header[name]["data_offsets"]
        _fill(mapped[first:last].view(tensor.dtype).view(tensor.shape), tensor, advance)


def _fill(target: Tensor, tensor: LazyTensor, advance: Callable[[int], None]) -> None:
    for region in tensor.regions:
        piece = tensor.read(region)
        if tensor.target_rows is None:
            target[region.slices] = piece
            advance(piece.numel() * piece.element_size())
            continue
        first, columns = region.offsets[0], region.slices[1]
        for start in range(0, len(piece), ROWS_AT_ONCE):
            part = piece[start : start + ROWS_AT_ONCE]
            rows = torch.arange(first + start, first + start + len(part))
            target[tensor.target_rows(rows), columns] = part
            advance(part.numel() * part.element_size())
