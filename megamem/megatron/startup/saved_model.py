"""Checks that the checkpoints a run starts from fit its flags, before anything is allocated."""

import argparse
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from megatron.core import dist_checkpointing
from megatron.training import checkpointing
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megamem.checkpoint import (
    OPTIMIZER,
    SETTINGS,
    SHARED,
    TABLES,
    placement_key,
    state_key,
    sub_keys_key,
    table_key,
)
from megamem.config import ConfigurationError, flag
from megamem.layers.variants import VARIANTS, table_names, table_shapes
from megamem.layers.variants.ultramem_v2 import PRE_VALUES
from megamem.optimizer.state import BATCHES, HITS, slots
from megamem.saved_settings import setting_flag, setting_problems, settings_in
from megamem.spec import MemorySpec, Optimizer

logger = logging.getLogger("megamem")

EMBEDDING = "embedding.word_embeddings.weight"
"""Key of the word embeddings, whose rows are as wide as the hidden states."""


def checkpoint_problems(spec: MemorySpec | None, args: argparse.Namespace) -> list[str]:
    """A sentence for each way in which the loaded checkpoint or --memory-background does not fit.

    Only settings, shapes and seeds are read. A --load folder without a checkpoint is accepted,
    because Megatron then starts from scratch.
    """
    found = background_problems(spec) if spec is not None else []
    return found + load_problems(spec, args)


@dataclass(frozen=True)
class Given:
    """The checkpoint that Megatron will load, and the flag by which the user named it."""

    option: str
    """--load, --pretrained-checkpoint or --non-persistent-global-ckpt-dir."""
    folder: Path
    """The folder of the iteration."""

    def __str__(self) -> str:
        return f"{self.option} {self.folder}"


_fitting: set[tuple[Path, MemorySpec | None]] = set()


def load_problems(
    spec: MemorySpec | None,
    args: argparse.Namespace,
    options: tuple[str, ...] = ("load", "pretrained_checkpoint"),
) -> list[str]:
    """A sentence for each way in which the checkpoint that Megatron will load does not fit a spec.

    Args:
        spec: the spec of the model that loads it; None for a model without memory layers.
        args: Megatron's arguments.
        options: the arguments that may name the checkpoint, the first that does first.
    """
    if spec is None:
        return _memory_problems(args, options)
    try:
        given = loaded_checkpoint(args, options)
    except Exception as error:  # the file that names the iteration may hold anything
        return [_unreadable(" or ".join(_named(args, options)), error)]
    # a run asks before it builds the model, and when it loads
    if given is None or (given.folder, spec) in _fitting:
        return []
    folder, named = given.folder, str(given)
    try:
        if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
            return [_other_format(given)]
        index = read_index(folder)
        if damaged := damaged_files(folder, index):
            return [
                f"{named} is damaged: {damaged[0]}; copy the checkpoint again, or load an "
                "earlier iteration with --ckpt-step."
            ]
        saved = saved_shapes(index)
        seeds = read_placements(saved, folder)
        settings = settings_in(saved_common(folder), named)
    except ConfigurationError as error:
        return [str(error)]
    except Exception as error:  # a damaged file may raise any exception
        return [_unreadable(named, error)]
    if settings and (found := setting_problems(settings, spec, named)):
        return found
    if saved_tables(saved):
        unknown = [setting_flag(name) for name in SETTINGS if name not in (settings or {})]
        if unknown:
            logger.warning(
                "%s was converted and does not say with which %s its memory layers were "
                "trained, so the flags of this run could not be compared with it",
                named,
                ", ".join(unknown),
            )
    if found := compare(saved, spec, named):
        return found
    found = placement_problems(seeds, spec, named)
    if not _loads_weights_alone(args, folder):
        found += state_problems(saved, spec, args, named)
    if not found:
        _fitting.add((folder, spec))
    return found


def _memory_problems(args: argparse.Namespace, options: tuple[str, ...]) -> list[str]:
    """A sentence if the checkpoint that a model without memory layers will load has some."""
    try:
        given = loaded_checkpoint(args, options)
        if given is None or not dist_checkpointing.check_is_distributed_checkpoint(
            str(given.folder)
        ):
            return []
        return compare(saved_shapes(read_index(given.folder)), None, str(given))
    except Exception as error:
        # Megatron reads dense checkpoints in ways of its own, and says which it cannot read
        logger.debug("whether the checkpoint has memory layers cannot be seen: %r", error)
        return []


def _loads_weights_alone(args: argparse.Namespace, folder: Path) -> bool:
    """Whether Megatron leaves the optimizer in a checkpoint alone."""
    if args.finetune or args.no_load_optim:
        return True
    # a "release" of a converter has none, and Megatron finetunes from --pretrained-checkpoint
    instead = getattr(args, "pretrained_checkpoint", None) and not _has_checkpoint(args.load)
    return folder.name == "release" or bool(instead)


def _unreadable(named: str, error: Exception) -> str:
    return (
        f"{named} cannot be read ({type(error).__name__}: {error}) and may be damaged; load an "
        "earlier iteration with --ckpt-step."
    )


def _other_format(given: Given) -> str:
    if not given.folder.is_dir():
        return f"{given} does not exist; load another iteration with --ckpt-step."
    return (
        f"{given} is no checkpoint of format torch_dist, the only one that holds memory "
        "layers; to start from a dense one, convert it by a run of Megatron with "
        "--ckpt-convert-format torch_dist and --ckpt-convert-save, and without the --memory flags, "
        "and then add memory layers with megamem convert upcycle."
    )


def damaged_files(folder: Path, index: Metadata) -> list[str]:
    """A few words for each file of a checkpoint that is missing or shorter than its index says."""
    ends: dict[str, int] = {}
    for entry in (index.storage_data or {}).values():
        ends[entry.relative_path] = max(
            ends.get(entry.relative_path, 0), entry.offset + entry.length
        )
    found = []
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size < end:
            found.append(f"{name} has {path.stat().st_size:,} of {end:,} bytes")
    return found


def background_problems(spec: MemorySpec) -> list[str]:
    """A sentence if --memory-background has no read counts for the tables of this run."""
    path = spec.background
    if not path:
        return []
    named = f"--memory-background {path}"
    folder = latest_folder(path)
    if folder is None:
        return [f"{named} holds no checkpoint; give the folder of one, as for --load."]
    try:
        saved = saved_shapes(read_index(folder))
    except Exception as error:
        return [
            f"{named} cannot be read ({type(error).__name__}: {error}); give another checkpoint."
        ]
    for name in table_names(spec):
        shape = saved.get(state_key(name, HITS))
        if shape is None:
            return [
                f"{named} has no read counts for table {name}, because it was saved by an older "
                "megamem, was converted, or has other tables; give a checkpoint of a training run "
                "with the same tables, or drop --memory-background to use those of --load."
            ]
        if shape != (spec.num_rows,):
            return [
                f"{named} has read counts for {shape[0]:,} rows of table {name}, but "
                f"--memory-num-keys {spec.num_keys} means {spec.num_rows:,} rows; give a "
                "checkpoint of the same model."
            ]
    seeds = read_placements(saved, folder)
    return placement_problems(seeds, spec, f"--memory-background {folder}")


def local_problems(
    common: Mapping[str, Any], spec: MemorySpec | None, args: argparse.Namespace
) -> list[str]:
    """A sentence for each way in which a checkpoint of --non-persistent-ckpt-type local differs.

    Its settings are compared; shapes and the optimizer's state follow from them and from
    --memory-optimizer, and each rank's file holds exactly what that rank saved.

    Args:
        common: what the checkpoint holds beside tensors.
        spec: the spec of the model that loads it; None for a model without memory layers.
        args: Megatron's arguments.
    """
    named = f"--non-persistent-local-ckpt-dir {args.non_persistent_local_ckpt_dir}"
    try:
        settings = settings_in(common, named)
    except ConfigurationError as error:
        return [str(error)]
    if settings is None:
        return [] if spec is None else [_has_none(spec, named)]
    if spec is None:
        return [_has_memory(named)]
    found = setting_problems(settings, spec, named)
    optimizer = getattr(common.get("args"), "memory_optimizer", spec.optimizer)
    if not (found or args.finetune or args.no_load_optim) and optimizer != spec.optimizer:
        found = [
            f"--memory-optimizer {spec.optimizer} differs from {optimizer}, whose state {named} "
            f"holds; use --memory-optimizer {optimizer}, or start with new optimizer state by "
            "--no-load-optim."
        ]
    return found


def has_counters(spec: MemorySpec, args: argparse.Namespace) -> bool | None:
    """Whether the checkpoint that Megatron will load has read counts; None without one."""
    given = loaded_checkpoint(args)
    if given is None or not dist_checkpointing.check_is_distributed_checkpoint(str(given.folder)):
        return None
    saved = saved_shapes(read_index(given.folder))
    return all(state_key(name, HITS) in saved for name in table_names(spec))


def saved_common(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors: Megatron's arguments among other things."""
    found: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(folder))
    return found


def read_index(folder: Path) -> Metadata:
    """The index of a checkpoint: its tensors, and where in which file they are."""
    # torch's reader is used because that of Megatron 0.19 does not work with torch 2.15
    return FileSystemReader(str(folder)).read_metadata()


def saved_shapes(index: Metadata) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a checkpoint, by key."""
    return {
        key: tuple(entry.size)
        for key, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_placements(saved: dict[str, tuple[int, ...]], folder: Path) -> dict[str, int]:
    """The placement seed of each table in a checkpoint, by the table's name."""
    keys = {placement_key(table): table for table in saved_tables(saved)}
    seeds = {key: torch.empty(saved[key], dtype=torch.int64) for key in keys if key in saved}
    if seeds:
        dcp.load(seeds, storage_reader=FileSystemReader(str(folder)), no_dist=True)
    return {keys[key]: int(seed) for key, seed in seeds.items()}


def saved_tables(saved: dict[str, tuple[int, ...]]) -> list[str]:
    """The names of all tables in a checkpoint, sorted."""
    start, end = table_key(" ").split(" ")
    return sorted(
        key.removeprefix(start).removesuffix(end)
        for key in saved
        if key.startswith(start) and key.endswith(end)
    )


def placement_problems(seeds: dict[str, int], spec: MemorySpec, named: str) -> list[str]:
    """A sentence if the rows of a table were placed with another seed than that of this run."""
    wanted = spec.placement_seed
    return [
        f"--memory-placement-seed {wanted} differs from {seed}, which placed the rows of table "
        f"{table} in {named}; use --memory-placement-seed {seed}."
        for table, seed in sorted(seeds.items())
        if seed != wanted
    ][:1]


def state_problems(
    saved: dict[str, tuple[int, ...]],
    spec: MemorySpec,
    args: argparse.Namespace,
    named: str,
) -> list[str]:
    """A sentence if the checkpoint lacks state that the tables' optimizer needs to resume."""
    wanted = slots(spec.optimizer, args.params_dtype, spec.stochastic_rounding)
    for table in saved_tables(saved):
        for name, slot in wanted.items():
            whole = table_shapes(spec).get(table, (spec.num_rows, spec.value_dim))
            shape = whole[: 1 if slot.per_row else 2]
            found = saved.get(state_key(table, name))
            if found == shape:
                continue
            prefix = f"{OPTIMIZER}.{TABLES}.{table}."
            kept = sorted(
                key.removeprefix(prefix)
                for key in saved
                # the state of another table may begin with the same prefix
                if key.startswith(prefix)
                and "." not in key.removeprefix(prefix)
                and key.removeprefix(prefix) not in (HITS, BATCHES)
            )
            return [
                f"--memory-optimizer {spec.optimizer} needs {name} of shape "
                f"{list(shape)} for table {table}, but {named} holds "
                f"{', '.join(kept) or 'no state'}"
                f"{f' ({name} of shape {list(found)})' if found else ''}; use "
                f"{_optimizer_of(kept)}, or start with new optimizer state by --no-load-optim."
            ]
    return []


def _optimizer_of(kept: list[str]) -> str:
    """The flags of a run whose state of a table has these names."""
    for optimizer in get_args(Optimizer):
        for weights, rounding, flags in (
            (torch.float32, False, ", in fp32"),
            (torch.bfloat16, False, " with --bf16 or --fp16"),
            (torch.bfloat16, True, " with --bf16 and --memory-stochastic-rounding"),
        ):
            state = slots(optimizer, weights, rounding)
            if sorted(state) == kept:
                return f"--memory-optimizer {optimizer}{flags}"
    return "the optimizer that it was saved with"


def compare(saved: dict[str, tuple[int, ...]], spec: MemorySpec | None, named: str) -> list[str]:
    """A sentence for each shape in a checkpoint that does not fit the flags.

    Args:
        saved: the shapes in the checkpoint.
        spec: the spec of the model that loads it; None for a model without memory layers.
        named: how the user names the checkpoint, as "--load DIR".
    """
    tables = saved_tables(saved)
    if spec is None:
        return [_has_memory(named)] if tables else []
    if not tables:
        return [_has_none(spec, named)]
    problems = []
    names = table_names(spec)
    held, needed = _further(tables), _further(names)
    tucker = _has_tucker_keys(saved)
    if held != needed or tucker not in (None, spec.tucker_rank > 0):
        fitting = [
            name
            for name, variant in VARIANTS.items()
            if _further(variant.table_name("", use) for use in variant.tables) == held
            and tucker in (None, variant.tucker is not None)
        ]
        problems.append(
            f"{named} holds {_listed(held, tucker)}, but --memory-variant {spec.variant} reads "
            f"{_listed(needed, spec.tucker_rank > 0)}; use --memory-variant "
            f"{' or '.join(fitting)}."
        )
    elif missing := [name for name in names if name not in tables]:
        problems.append(
            f"{named} holds tables {', '.join(tables)}, but --memory-pool {spec.pool} with "
            f"--memory-layers {' '.join(map(str, spec.layers))} reads {', '.join(missing)}; use "
            f"{_pool_of(tables, saved)}."
        )
    for name, wanted in table_shapes(spec).items():
        shape = saved.get(table_key(name), wanted)
        if shape[0] != wanted[0]:
            problems.append(
                f"--memory-num-keys {spec.num_keys} means {wanted[0]:,} rows, but "
                f"{named} holds {shape[0]:,}; use --memory-num-keys "
                f"{round((shape[0] / spec.share_layers) ** 0.5)}."
            )
        if shape[1] != wanted[1] and name.partition(".")[2] != PRE_VALUES:
            problems.append(_other_width(shape[1], spec, saved, named))
        elif shape[1] != wanted[1]:
            problems.append(
                f"--memory-pre-value-dim {wanted[1]} differs from {shape[1]} in {named}; use "
                f"--memory-pre-value-dim {shape[1]}."
            )
        if problems:
            return problems
    for layer in spec.layers:
        keys = saved.get(sub_keys_key(layer))
        if keys is None:
            problems.append(
                f"--memory-layers {layer} is no memory layer in {named}; use "
                f"--memory-layers {' '.join(map(str, memory_layers(saved)))}."
            )
        elif not problems and (found := _key_problem(keys, spec)):
            problems.append(f"{found[0]} differs from layer {layer} of {named}; use {found[1]}.")
    return problems


def _key_problem(keys: tuple[int, ...], spec: MemorySpec) -> tuple[str, str] | None:
    """The flags of a run that the shape of the sub-keys in a checkpoint does not fit, and those
    that it fits; None if it fits."""
    ranks = (spec.tucker_rank,) if spec.tucker_rank else ()
    if keys == (2, spec.heads, spec.keys_per_side, *ranks, spec.key_dim // 2):
        return None
    if ranks and keys[3] != ranks[0]:
        return f"--memory-tucker-rank {ranks[0]}", f"--memory-tucker-rank {keys[3]}"
    if ranks and keys[2] != spec.keys_per_side:
        expansion = round(keys[2] ** 2 / spec.num_rows)
        return f"--memory-expansion {spec.expansion}", f"--memory-expansion {expansion}"
    return (
        f"--memory-heads {spec.heads} with --memory-key-dim {spec.key_dim}",
        f"--memory-heads {keys[1]} and --memory-key-dim {2 * keys[-1]}",
    )


def _has_tucker_keys(saved: dict[str, tuple[int, ...]]) -> bool | None:
    """Whether the sub-keys in a checkpoint have an axis of Tucker ranks; None without sub-keys."""
    layers = memory_layers(saved)
    return len(saved[sub_keys_key(layers[0])]) == 5 if layers else None


def _has_memory(named: str) -> str:
    return (
        f"{named} holds memory layers, but --memory-layers is not given; give the --memory flags "
        "that it was trained with."
    )


def _has_none(spec: MemorySpec, named: str) -> str:
    return (
        f"{named} was saved without memory layers, but --memory-layers "
        f"{' '.join(map(str, spec.layers))} is given; add memory layers to it with megamem "
        f"convert upcycle, start without {named.split()[0]}, or drop the --memory flags."
    )


def _other_width(
    width: int, spec: MemorySpec, saved: dict[str, tuple[int, ...]], named: str
) -> str:
    """The sentence about rows of another width than those of a checkpoint.

    The width is that of the hidden states unless --memory-value-dim is given.
    """
    flag = "--memory-value-dim"
    if spec.value_dim == spec.hidden_size:
        flag = "--hidden-size"
    hidden = saved.get(EMBEDDING, (0, width))[1]
    fix = f"--hidden-size {hidden}" if hidden != spec.hidden_size else f"--memory-value-dim {width}"
    return (
        f"{flag} {spec.value_dim} means rows of that width, but those in {named} have "
        f"{width}; use {fix}."
    )


def memory_layers(saved: dict[str, tuple[int, ...]]) -> list[int]:
    """The numbers of the memory layers in a checkpoint."""
    start, end = sub_keys_key(0).split("0")
    return sorted(
        int(key.removeprefix(start).removesuffix(end))
        for key in saved
        if key.startswith(start) and key.endswith(end)
    )


def _pool_of(tables: list[str], saved: dict[str, tuple[int, ...]]) -> str:
    """The flags of the pools in a checkpoint."""
    if any(name.partition(".")[0] == SHARED for name in tables):
        return f"--memory-pool {SHARED}"
    return f"--memory-pool layer with --memory-layers {' '.join(map(str, memory_layers(saved)))}"


def _further(tables: Iterable[str]) -> list[str]:
    """Names of the tables that pools hold beside their values."""
    return sorted({name.partition(".")[2] for name in tables if "." in name})


def _listed(further: list[str], tucker: bool | None) -> str:
    tables = f"values and tables {', '.join(further)}" if further else "values alone"
    return f"{tables} by Tucker scores" if tucker else tables


def loaded_checkpoint(
    args: argparse.Namespace, options: tuple[str, ...] = ("load", "pretrained_checkpoint")
) -> Given | None:
    """The checkpoint that Megatron loads, from --load or --pretrained-checkpoint.

    It is one of --non-persistent-ckpt-type global where that is not older. One of type local is
    not found here, because each rank reads a file of its own; see local_problems().
    """
    paths = _named(args, options)
    # without any checkpoint Megatron looks in the last of them for one that is not persistent
    option = next((name for name in paths if _has_checkpoint(paths[name])), None)
    option = option or next(reversed(paths), None)
    path = paths[option] if option else None
    saved = latest_folder(path, getattr(args, "ckpt_step", None)) if path else None
    if getattr(args, "non_persistent_ckpt_type", None) == "global":
        beside = f"{path}/{checkpointing._NON_PERSISTENT_CKPT_SUBDIR}" if path else None
        kept = args.non_persistent_global_ckpt_dir or beside
        newer = latest_folder(kept) if kept else None
        if newer and not (saved and _iteration(newer) < _iteration(saved)):
            saved = newer
            if args.non_persistent_global_ckpt_dir:
                option = "--non-persistent-global-ckpt-dir"
    return Given(option, saved) if option and saved else None


def _named(args: argparse.Namespace, options: tuple[str, ...]) -> dict[str, str]:
    """The folders that the user gave, by flag."""
    return {flag(option): path for option in options if (path := getattr(args, option, None))}


def _has_checkpoint(path: str | None) -> bool:
    return path is not None and _tracker(path).is_file()


def _tracker(path: str) -> Path:
    """The file that names the latest iteration in a folder of checkpoints."""
    return Path(checkpointing.get_checkpoint_tracker_filename(path))


def _iteration(folder: Path) -> int:
    """The iteration of a folder; a release is one of iteration 0."""
    number = folder.name.rpartition("_")[2]
    return int(number) if number.isdecimal() else 0


def latest_folder(path: str, step: int | None = None) -> Path | None:
    """The folder of an iteration, by default the latest, in a folder of checkpoints."""
    if not _has_checkpoint(path):
        # an iteration that is named needs no file that names the latest
        return _folder(path, step, False) if step else None
    # Megatron reads this file in a collective, but this function runs on one rank
    latest = _tracker(path).read_text().strip()
    release = latest == "release"
    return _folder(path, step or (0 if release else int(latest)), release)


def _folder(path: str, iteration: int, release: bool) -> Path:
    name = checkpointing.get_checkpoint_name(path, iteration, release, return_base_dir=True)
    return Path(name)
