"""Whether the checkpoint a run starts from fits its flags; asked before anything is allocated."""

import argparse
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.training import checkpointing
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megamem.checkpoint import (
    OPTIMIZER,
    TABLES,
    placement_key,
    state_key,
    sub_keys_key,
    table_key,
)
from megamem.config import MemoryConfig
from megamem.layers.expert_table import U, table_names
from megamem.optimizer.state import slots


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
    if found := compare(saved, memory, str(folder)):
        return found
    if memory is None:
        return []
    found = placement_problems(read_placements(saved, folder), memory, str(folder))
    # a release, as converters write, never has an optimizer
    resumes = not (args.finetune or args.no_load_optim or folder.name == "release")
    return found + (state_problems(saved, args, memory, str(folder)) if resumes else [])


def read_placements(saved: dict[str, tuple[int, ...]], folder: Path) -> dict[str, int]:
    """Table -> the seed that placed its rows."""
    keys = {placement_key(table): table for table in saved_tables(saved)}
    seeds = {key: torch.empty(saved[key], dtype=torch.int64) for key in keys if key in saved}
    if seeds:
        dcp.load(seeds, storage_reader=FileSystemReader(str(folder)), no_dist=True)
    return {keys[key]: int(seed) for key, seed in seeds.items()}


def saved_tables(saved: dict[str, tuple[int, ...]]) -> list[str]:
    """Name of every table in a checkpoint."""
    start, end = table_key(" ").split(" ")
    return sorted(
        key.removeprefix(start).removesuffix(end)
        for key in saved
        if key.startswith(start) and key.endswith(end)
    )


def placement_problems(seeds: dict[str, int], memory: MemoryConfig, folder: str) -> list[str]:
    """A sentence where a table's rows lie elsewhere than this run would look for them."""
    wanted = memory.memory_placement_seed
    return [
        f"--memory-placement-seed {wanted} differs from {seed}, which placed the rows of table "
        f"{table} in --load {folder}; use --memory-placement-seed {seed}."
        for table, seed in sorted(seeds.items())
        if seed != wanted
    ][:1]


def state_problems(
    saved: dict[str, tuple[int, ...]],
    args: argparse.Namespace,
    memory: MemoryConfig,
    folder: str,
) -> list[str]:
    """A sentence where the checkpoint lacks state that the tables' optimizer goes on with."""
    wanted = slots(memory.memory_optimizer, args.params_dtype, memory.memory_stochastic_rounding)
    for table in saved_tables(saved):
        for name, slot in wanted.items():
            shape = (memory.num_rows, memory.value_dim)[: 1 if slot.per_row else 2]
            found = saved.get(state_key(table, name))
            if found == shape:
                continue
            prefix = f"{OPTIMIZER}.{TABLES}.{table}."
            kept = sorted(
                key.removeprefix(prefix)
                for key in saved
                # not the state of a table within this one
                if key.startswith(prefix) and "." not in key.removeprefix(prefix)
            )
            return [
                f"--memory-optimizer {memory.memory_optimizer} needs {name} of shape "
                f"{list(shape)} for table {table}, but --load {folder} holds "
                f"{', '.join(kept) or 'no state'}"
                f"{f' ({name} of shape {list(found)})' if found else ''}; use the optimizer, the "
                "precision and --memory-stochastic-rounding that it was saved with, or start the "
                "optimizer afresh with --no-load-optim."
            ]
    return []


def compare(
    saved: dict[str, tuple[int, ...]], memory: MemoryConfig | None, folder: str
) -> list[str]:
    """A sentence for each difference between a checkpoint's shapes and the flags."""
    tables = saved_tables(saved)
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
    names = table_names(memory)
    experts = any(table.endswith(f".{U}") for table in tables)
    if experts != (memory.memory_variant == "peer"):
        held = "tables u and v of --memory-variant peer" if experts else "values, but no table u"
        problems.append(
            f"--load {folder} holds {held}: --memory-variant {memory.memory_variant} cannot read "
            "it; use the variant that it was saved with."
        )
    elif missing := [name for name in names if name not in tables]:
        problems.append(
            f"--load {folder} has no table {', '.join(missing)} but {', '.join(tables)}; "
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
