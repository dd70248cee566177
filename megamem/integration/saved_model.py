"""Whether the checkpoint a run starts from fits its flags; asked before anything is allocated."""

import argparse
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.training import checkpointing
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megamem.checkpoint import SHARED, TABLES, layer_table, sub_keys_key, table_key
from megamem.config import MemoryConfig


def checkpoint_problems(args: argparse.Namespace, memory: MemoryConfig | None) -> list[str]:
    """A sentence for everything in the checkpoint of --load that contradicts the flags.

    Reads shapes only. A --load without a checkpoint is no problem: Megatron starts afresh there.
    """
    try:
        folder = _checkpoint_folder(args)
        if folder is None or not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
            return []
        # torch's reader: Megatron's, in 0.19, cannot describe tensors to torch 2.15
        entries = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # whatever a damaged file makes of itself
        return [
            f"--load {args.load} cannot be read ({type(error).__name__}: {error}); it may be "
            "damaged: use an earlier iteration with --ckpt-step."
        ]
    saved = {
        key: tuple(entry.size)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    return compare(saved, memory, str(folder))


def compare(
    saved: dict[str, tuple[int, ...]], memory: MemoryConfig | None, folder: str
) -> list[str]:
    """A sentence for each difference between a checkpoint's shapes and the flags."""
    tables = [key for key in saved if key.startswith(f"{TABLES}.")]
    if memory is None:
        if not tables:
            return []
        return [
            f"--load {folder} holds memory layers, but --memory-layers is not given; repeat the "
            "--memory flags that it was trained with."
        ]
    if not tables:
        return [
            f"--load {folder} was saved without memory layers, but --memory-layers "
            f"{' '.join(map(str, memory.memory_layers))} is given; start without --load, or drop "
            "the --memory flags."
        ]
    problems = []
    shared = memory.memory_pool == "shared"
    names = [SHARED] if shared else [layer_table(layer) for layer in memory.memory_layers]
    if missing := [name for name in names if table_key(name) not in saved]:
        problems.append(
            f"--load {folder} has no table {', '.join(missing)} but {', '.join(sorted(tables))}; "
            "--memory-pool and, with --memory-pool layer, --memory-layers must be as when it was "
            "saved."
        )
    wanted = (memory.num_rows, memory.value_dim)
    for name in names:
        shape = saved.get(table_key(name), wanted)
        if shape[0] != wanted[0]:
            problems.append(
                f"--memory-num-keys {memory.memory_num_keys} asks for {wanted[0]:,} rows, but "
                f"--load {folder} holds {shape[0]:,}; use --memory-num-keys "
                f"{round(shape[0] ** 0.5)}."
            )
        if shape[1] != wanted[1]:
            problems.append(
                f"--memory-value-dim {wanted[1]} differs from the width {shape[1]} of the rows in "
                f"--load {folder}; use --memory-value-dim {shape[1]}."
            )
        if problems:
            return problems
    for layer in memory.memory_layers:
        wanted_keys = (2, memory.memory_heads, memory.memory_num_keys, memory.key_dim // 2)
        keys = saved.get(sub_keys_key(layer))
        if keys is None:
            problems.append(
                f"--memory-layers {layer} is no memory layer in --load {folder}; name the layers "
                "that it was saved with."
            )
        elif keys != wanted_keys:
            problems.append(
                f"--load {folder} holds sub-keys of --memory-heads {keys[1]} and --memory-key-dim "
                f"{2 * keys[3]} in layer {layer}, but {wanted_keys[1]} and {2 * wanted_keys[3]} "
                "are asked for; use the values that it was saved with."
            )
    return problems


def _checkpoint_folder(args: argparse.Namespace) -> Path | None:
    """The folder of the iteration that Megatron would load."""
    if not getattr(args, "load", None):
        return None
    tracker = Path(checkpointing.get_checkpoint_tracker_filename(args.load))
    if not tracker.is_file():
        return None
    # Megatron's own read of this file is a collective, and this runs on one rank
    latest = tracker.read_text().strip()
    release = latest == "release"
    iteration = getattr(args, "ckpt_step", None) or (0 if release else int(latest))
    name = checkpointing.get_checkpoint_name(args.load, iteration, release, return_base_dir=True)
    return Path(name)
