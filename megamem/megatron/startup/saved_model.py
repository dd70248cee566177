"""Whether the checkpoints a run starts from fit its flags; asked before anything is allocated."""

import argparse
from collections.abc import Iterable
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
from megamem.layers.variants import table_names
from megamem.optimizer.state import BATCHES, HITS, slots
from megamem.spec import MemorySpec


def checkpoint_problems(spec: MemorySpec | None, args: argparse.Namespace) -> list[str]:
    """A sentence for everything in checkpoints of --load and --memory-background that does not fit.

    Reads shapes and seeds only. A --load without a checkpoint is no problem: Megatron starts afresh
    there.
    """
    found = background_problems(spec) if spec is not None else []
    return found + _load_problems(spec, args)


def _load_problems(spec: MemorySpec | None, args: argparse.Namespace) -> list[str]:
    try:
        folder = loaded_folder(args)
        if folder is None or not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
            return []
        saved = saved_shapes(folder)
    except Exception as error:  # whatever a damaged file makes of itself
        return [
            f"--load {args.load} cannot be read ({type(error).__name__}: {error}); it may be "
            "damaged: use an earlier iteration with --ckpt-step."
        ]
    if found := compare(saved, spec, str(folder)):
        return found
    if spec is None:
        return []
    found = placement_problems(read_placements(saved, folder), spec, str(folder))
    # a release, as converters write, never has an optimizer; a pretrained checkpoint's is not read
    afresh = folder.name == "release" or not folder.is_relative_to(args.load or folder / "none")
    resumes = not (args.finetune or args.no_load_optim or afresh)
    return found + (state_problems(saved, spec, args, str(folder)) if resumes else [])


def background_problems(spec: MemorySpec) -> list[str]:
    """A sentence where --memory-background has no counters of this run's tables."""
    path = spec.background
    if not path:
        return []
    named = f"--memory-background {path}"
    folder = latest_folder(path)
    if folder is None:
        return [f"{named} holds no checkpoint; name the folder of one, as for --load."]
    try:
        saved = saved_shapes(folder)
    except Exception as error:
        return [f"{named} cannot be read ({type(error).__name__}: {error}); name another."]
    for name in table_names(spec):
        shape = saved.get(state_key(name, HITS))
        if shape is None:
            return [
                f"{named} has no counts of the rows that table {name} was read at: it was saved "
                "before megamem kept them, converted, or trained with other memories; name a "
                "checkpoint of a run that counted, or drop it to use the counts of --load."
            ]
        if shape != (spec.num_rows,):
            return [
                f"{named} counts {shape[0]:,} rows of table {name}, but --memory-num-keys "
                f"{spec.num_keys} asks for {spec.num_rows:,}; name a checkpoint of the "
                "same model."
            ]
    seeds = read_placements(saved, folder)
    return placement_problems(seeds, spec, str(folder), "--memory-background")


def has_counters(spec: MemorySpec, args: argparse.Namespace) -> bool | None:
    """Whether the checkpoint that Megatron will load counts what read its rows; None: no such."""
    folder = loaded_folder(args)
    if folder is None:
        return None
    saved = saved_shapes(folder)
    return all(state_key(name, HITS) in saved for name in table_names(spec))


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor in a checkpoint."""
    # torch's reader: Megatron's, in 0.19, cannot describe tensors to torch 2.15
    entries = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    return {
        key: tuple(entry.size)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


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


def placement_problems(
    seeds: dict[str, int], spec: MemorySpec, folder: str, option: str = "--load"
) -> list[str]:
    """A sentence where a table's rows lie elsewhere than this run would look for them."""
    wanted = spec.placement_seed
    return [
        f"--memory-placement-seed {wanted} differs from {seed}, which placed the rows of table "
        f"{table} in {option} {folder}; use --memory-placement-seed {seed}."
        for table, seed in sorted(seeds.items())
        if seed != wanted
    ][:1]


def state_problems(
    saved: dict[str, tuple[int, ...]],
    spec: MemorySpec,
    args: argparse.Namespace,
    folder: str,
) -> list[str]:
    """A sentence where the checkpoint lacks state that the tables' optimizer goes on with."""
    wanted = slots(spec.optimizer, args.params_dtype, spec.stochastic_rounding)
    for table in saved_tables(saved):
        for name, slot in wanted.items():
            shape = (spec.num_rows, spec.value_dim)[: 1 if slot.per_row else 2]
            found = saved.get(state_key(table, name))
            if found == shape:
                continue
            prefix = f"{OPTIMIZER}.{TABLES}.{table}."
            kept = sorted(
                key.removeprefix(prefix)
                for key in saved
                # not the state of a table within this one
                if key.startswith(prefix)
                and "." not in key.removeprefix(prefix)
                and key.removeprefix(prefix) not in (HITS, BATCHES)
            )
            return [
                f"--memory-optimizer {spec.optimizer} needs {name} of shape "
                f"{list(shape)} for table {table}, but --load {folder} holds "
                f"{', '.join(kept) or 'no state'}"
                f"{f' ({name} of shape {list(found)})' if found else ''}; use the optimizer, the "
                "precision and --memory-stochastic-rounding that it was saved with, or start the "
                "optimizer afresh with --no-load-optim."
            ]
    return []


def compare(saved: dict[str, tuple[int, ...]], spec: MemorySpec | None, folder: str) -> list[str]:
    """A sentence for each difference between a checkpoint's shapes and the flags."""
    tables = saved_tables(saved)
    if spec is None:
        if not tables:
            return []
        return [
            f"--load {folder} holds memory layers, but --memory-layers is not given; repeat the "
            "--memory flags that it was trained with."
        ]
    if not tables:
        return [
            f"--load {folder} was saved without memory layers, but --memory-layers "
            f"{' '.join(map(str, spec.layers))} is given; start without --load, or drop "
            "the --memory flags."
        ]
    problems = []
    names = table_names(spec)
    held, needed = _further(tables), _further(names)
    if held != needed:
        problems.append(
            f"--load {folder} holds {_listed(held)}, but --memory-variant {spec.variant} reads "
            f"{_listed(needed)}; use the variant that it was saved with."
        )
    elif missing := [name for name in names if name not in tables]:
        problems.append(
            f"--load {folder} has no table {', '.join(missing)} but {', '.join(tables)}; "
            "--memory-pool and, with --memory-pool layer, --memory-layers must be as when it was "
            "saved."
        )
    wanted = (spec.num_rows, spec.value_dim)
    for name in names:
        shape = saved.get(table_key(name), wanted)
        if shape[0] != wanted[0]:
            problems.append(
                f"--memory-num-keys {spec.num_keys} asks for {wanted[0]:,} rows, but "
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
    for layer in spec.layers:
        wanted_keys = (2, spec.heads, spec.num_keys, spec.key_dim // 2)
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


def _further(tables: Iterable[str]) -> list[str]:
    """What pools hold beside their values."""
    return sorted({name.partition(".")[2] for name in tables if "." in name})


def _listed(further: list[str]) -> str:
    return f"values and tables {', '.join(further)}" if further else "values alone"


def loaded_folder(args: argparse.Namespace) -> Path | None:
    """The folder of the iteration that Megatron would load: of --pretrained-checkpoint at last."""
    step = getattr(args, "ckpt_step", None)
    for option in ("load", "pretrained_checkpoint"):
        path = getattr(args, option, None)
        if path and (folder := latest_folder(path, step)) is not None:
            return folder
    return None


def latest_folder(path: str, step: int | None = None) -> Path | None:
    """The folder of an iteration, by default the last, in a folder of checkpoints."""
    tracker = Path(checkpointing.get_checkpoint_tracker_filename(path))
    if not tracker.is_file():
        return None
    # Megatron's own read of this file is a collective, and this runs on one rank
    latest = tracker.read_text().strip()
    release = latest == "release"
    iteration = step or (0 if release else int(latest))
    name = checkpointing.get_checkpoint_name(path, iteration, release, return_base_dir=True)
    return Path(name)
