"""What lies in a checkpoint, read without Megatron."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a torch_dist checkpoint, whole, by its key."""
    reader = dcp.FileSystemReader(str(folder))
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
