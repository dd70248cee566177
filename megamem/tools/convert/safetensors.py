"""Models as safetensors files, read by the safetensors library and written region by region.

The library memory-maps the files that it reads, so a tensor need not fit in memory. It can only
write complete tensors from memory, for which a table may be too large. Therefore write_file writes
the format itself into a memory-mapped file: 8 bytes with the length of the header, a JSON header
with dtype, shape and offsets of every tensor, then the numbers.

A model in several files has Hugging Face's index, which maps each tensor to its file. A tensor is
never split over files.
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
# the dtypes that can be written; the library can read others, too
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
    """Name -> tensor, memory-mapped from the file, and the file's metadata.

    Raises:
        ConfigurationError: it is not a safetensors file, or is truncated.
    """
    try:
        with safe_open(path, "pt") as file:
            # as lazy as get_slice, but rows can be read in any order
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"{path} is not a safetensors file: {error}.") from error


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a model in one or several files, and the metadata of all files.

    Raises:
        ConfigurationError: there are no files, or one is not a safetensors file.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            places = json.loads(index.read_text())["weight_map"]
            files = [folder / name for name in sorted(set(places.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"{index} is not an index of safetensors files.") from error
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigurationError(
            f"there are no safetensors files in {folder}; name the folder of an export."
        )
    return read_files(files)


def read_files(files: list[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of some files, and their metadata.

    Raises:
        ConfigurationError: one is not a safetensors file, or two contain the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    remarks: dict[str, str] = {}
    for file in files:
        found, said = read_file(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ConfigurationError(f"{file} contains {twice[0]}, and so does another file.")
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
        folder: created if it does not exist.
        tensors: name -> tensor, written in this order.
        remarks: the metadata of every file.
        shard_bytes: the largest size of a file, unless a single tensor is larger.
        advance: called with the number of bytes that were written.
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
    """Write tensors region by region into a memory-mapped file."""
    header: dict[str, Any] = {"__metadata__": remarks}
    end = 0
    # largest item size first, so that every tensor is aligned to its item size
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
        block = tensor.read(region)
        if tensor.target_rows is None:
            target[region.slices] = block
            advance(block.numel() * block.element_size())
            continue
        first, columns = region.offsets[0], region.slices[1]
        for start in range(0, len(block), ROWS_AT_ONCE):
            part = block[start : start + ROWS_AT_ONCE]
            rows = torch.arange(first + start, first + start + len(part))
            target[tensor.target_rows(rows), columns] = part
            advance(part.numel() * part.element_size())
