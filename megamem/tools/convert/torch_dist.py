"""Megatron's torch_dist checkpoints, read and written by one process without a process group.

Such a checkpoint is a folder with a distributed checkpoint of torch and a few files of Megatron's.
Its index is a pickle; only the classes of an index are allowed in it. Tensors are loaded with
weights_only, as torch does for untrusted files.
"""

import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megamem.checkpoint import SAVED
from megamem.config import ConfigurationError
from megamem.tools.convert.lazy import LazyTensor, Region, Tensors

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON = {"common_backend": "torch", "common_backend_version": 1}
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
CHECKPOINT_VERSION = 3.0
# the classes in the indices of torch and Megatron: values, and records without side effects
_DCP = "torch.distributed.checkpoint"
INDEX_NAMES = {
    *(
        (f"{_DCP}.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
            *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        (f"{_DCP}.planner", name)
        for name in (
            "SavePlan",
            "WriteItem",
            "WriteItemType",
            "TensorWriteData",
            "BytesIOWriteData",
        )
    ),
    *((f"{_DCP}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *(("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath")),
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


def find_folder(path: Path) -> Path:
    """The folder of an iteration: the given one, or the latest in the folder of --save.

    Raises:
        ConfigurationError: the folder has no torch_dist checkpoint.
    """
    tracker = path / TRACKER
    if tracker.is_file():
        latest = tracker.read_text().strip()
        path = path / (RELEASE if latest == RELEASE else f"iter_{int(latest):07d}")
    try:
        found = json.loads((path / "metadata.json").read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != FORMAT["sharded_backend"]:
        raise ConfigurationError(
            f"{path} is not a torch_dist checkpoint; give the folder of --save, or an iteration in "
            "it (convert other formats with Megatron's --ckpt-convert-format torch_dist first)."
        )
    return path


class TorchDist:
    """An existing checkpoint."""

    def __init__(self, path: Path) -> None:
        """Read the index.

        Raises:
            ConfigurationError: there is no checkpoint, or it is damaged.
        """
        self.folder = find_folder(path)
        self._reader = _SafeReader(str(self.folder))
        try:
            self._index = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._index, is_coordinator=True)
        except Exception as error:  # a damaged file may raise any exception
            raise ConfigurationError(
                f"{self.folder} cannot be read ({type(error).__name__}: {error}); the checkpoint "
                "may be damaged, so use another iteration."
            ) from error

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """Key -> tensor, optimizer state included."""
        return {
            key: self._lazy(key, entry)
            for key, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    @property
    def objects(self) -> list[str]:
        """Keys of the objects that are not tensors."""
        entries = self._index.state_dict_metadata.items()
        return [key for key, entry in entries if isinstance(entry, BytesStorageMetadata)]

    def read_object(self, key: str) -> bytes:
        """An object, as it was pickled.

        Raises:
            ConfigurationError: the file is missing or damaged.
        """
        found = _Bytes()
        index = MetadataIndex(key)
        item = ReadItem(LoadItemType.BYTE_IO, index, torch.Size([0]), index, *[torch.Size([0])] * 2)
        self._read([item], found, key)
        return found.content

    def _lazy(self, key: str, entry: TensorStorageMetadata) -> LazyTensor:
        regions = tuple(Region(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks)
        dtype = entry.properties.dtype
        return LazyTensor(tuple(entry.size), dtype, regions, lambda region: self.read(key, region))

    def read(self, key: str, region: Region) -> Tensor:
        """A region of a tensor, assembled from the chunks in which it was saved.

        Raises:
            ConfigurationError: a file is missing or damaged.
        """
        entry = self._index.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        target = torch.empty(region.sizes, dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(region.offsets), torch.Size(region.sizes))
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        self._read(items, _Into(target), key)
        return target

    def _read(self, items: list[ReadItem], into: dcp.LoadPlanner, key: str) -> None:
        try:
            self._reader.read_data(LoadPlan(items), into).wait()
        except Exception as error:
            raise ConfigurationError(
                f"{key} in {self.folder} cannot be read ({type(error).__name__}: {error}); the "
                "checkpoint may be damaged, so use another iteration."
            ) from error


class _SafeReader(dcp.FileSystemReader):
    """Reads an index without executing code in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in INDEX_NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(value := vars(torch).get(name), torch.dtype):
            return value
        raise pickle.UnpicklingError(
            f"the index contains {module}.{name}, which no index of Megatron's does"
        )


class _Bytes(dcp.DefaultLoadPlanner):
    """Reads one object."""

    content = b""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.content = value.getvalue()


class _Into(dcp.DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.target
        for dim, (offset, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(dim, offset, length)
        return target


def write(
    folder: Path,
    tensors: Tensors,
    empty_objects: list[str],
    advance: Callable[[int], None],
    settings: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint that Megatron's --load reads as a release: weights for iteration 0.

    Args:
        folder: for --load. Files of an interrupted attempt are overwritten. It becomes a checkpoint
            only when everything has been written.
        tensors: key -> tensor.
        empty_objects: keys of extra state, which is saved as None.
        advance: called with the number of bytes that were written.
        settings: those of the memory layers, as far as they are known.

    Raises:
        ConfigurationError: a tensor cannot be read.
        OSError: the disk is full, or writing is not permitted.
    """
    release = folder / RELEASE
    release.mkdir(parents=True, exist_ok=True)
    writer = dcp.FileSystemWriter(release, single_file_per_rank=False, thread_count=1)
    planner = _Streaming(tensors, empty_objects, advance)
    with warnings.catch_warnings():
        # torch warns that there is no process group, which no_dist has told it
        warnings.filterwarnings("ignore", message=".*torch.distributed is")
        try:
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            # the exception of the only process, without torch's report about ranks
            raise next(iter(error.failures.values()))[0] from error
    common: dict[str, Any] = {"checkpoint_version": CHECKPOINT_VERSION}
    common |= {SAVED: settings} if settings else {}
    torch.save(common, release / "common.pt")
    (release / "metadata.json").write_text(json.dumps(FORMAT | COMMON))
    (folder / TRACKER).write_text(RELEASE)


class _Streaming(dcp.DefaultSavePlanner):
    """Reads or computes each region of each tensor when it is written."""

    def __init__(
        self, tensors: Tensors, empty_objects: list[str], advance: Callable[[int], None]
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self.tensors, self.empty_objects, self.advance = tensors, empty_objects, advance

    def create_local_plan(self) -> SavePlan:
        nothing = BytesIOWriteData(nbytes=len(_saved_none()))
        items = [
            WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO, bytes_io_data=nothing)
            for key in self.empty_objects
        ]
        for key, tensor in self.tensors.items():
            assert tensor.target_rows is None, key
            properties = TensorProperties(dtype=tensor.dtype)
            items += [
                WriteItem(
                    MetadataIndex(key, torch.Size(region.offsets), number),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        ChunkStorageMetadata(torch.Size(region.offsets), torch.Size(region.sizes)),
                        properties,
                        torch.Size(tensor.shape),
                    ),
                )
                for number, region in enumerate(tensor.regions)
            ]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(_saved_none())
        tensor = self.tensors[write_item.index.fqn]
        assert write_item.index.index is not None
        region = tensor.read(tensor.regions[write_item.index.index]).contiguous()
        self.advance(region.numel() * region.element_size())
        return region


def _saved_none() -> bytes:
    """None as Megatron saves an object: in a list of the objects with this key."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer.getvalue()
