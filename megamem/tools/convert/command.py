"""`megamem convert`: converts checkpoints to and from Megatron's format.

    reference   convert a consolidated checkpoint of facebookresearch/memory to Megatron
    ultramem    convert a checkpoint of the released code of UltraMem or UltraMemV2 to Megatron
    upcycle     add memory layers to a dense Megatron checkpoint
    export      convert a Megatron checkpoint with memory layers to safetensors
    import      convert exported safetensors back to Megatron
    average     average the weights of several checkpoints of a run

Megatron checkpoints have the format torch_dist, which --save writes and --load reads. They are
written as a release: weights for a new run from iteration 0, without optimizer state. Tensors are
copied region by region, so a table need not fit in memory. No code in a checkpoint is executed.
"""

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from megamem.checkpoint import SAVED, state_key
from megamem.config import ConfigurationError, MemoryConfig
from megamem.optimizer.state import BATCHES, HITS
from megamem.saved_settings import settings_in
from megamem.tools.convert import torch_dist
from megamem.tools.convert.average import average
from megamem.tools.convert.common_state import read_common
from megamem.tools.convert.export import PLACED, REMARKS, export, reimport, stay_placed
from megamem.tools.convert.hf.folder import model_of, read_config, write_model
from megamem.tools.convert.hf.names import imported, remarks_on
from megamem.tools.convert.hf.tables import KINDS
from megamem.tools.convert.layout import tables
from megamem.tools.convert.lazy import LazyTensor, of_tensor
from megamem.tools.convert.reference import Converted, convert_reference
from megamem.tools.convert.reference_file import read_reference
from megamem.tools.convert.released import convert_released
from megamem.tools.convert.released_file import read_released
from megamem.tools.convert.safetensors import read_folder, write_folder
from megamem.tools.convert.upcycle import upcycle
from megamem.tools.plan import quiet_imports

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GB = 10**9


def run(args: argparse.Namespace) -> int:
    """Convert a checkpoint; return the exit status."""
    args.convert(args, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    return 0


def add_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add a subcommand with its flags for each conversion."""
    kinds = parser.add_subparsers(required=True, metavar="CONVERSION")
    saved = "the checkpoint: the folder that was given as --save, or one of its iterations"
    consolidated = "the consolidated checkpoint: one or more .pth or .safetensors files"
    released = "the folder of an unsharded checkpoint, with config.yaml and model.pt"
    exported = "the folder with the safetensors files of an export"
    iterations = "two or more checkpoints, as DIR/iter_0001000 DIR/iter_0002000"
    for what, convert, source, purpose in (
        (
            "reference",
            _reference,
            consolidated,
            "convert a consolidated checkpoint of facebookresearch/memory to Megatron",
        ),
        (
            "ultramem",
            _ultramem,
            released,
            "convert a checkpoint of the released code of UltraMem or UltraMemV2 to Megatron",
        ),
        ("upcycle", _upcycle, saved, "add memory layers to a dense Megatron checkpoint"),
        (
            "export",
            _export,
            saved,
            "convert a Megatron checkpoint with memory layers to safetensors",
        ),
        ("import", _import, exported, "convert exported safetensors back to Megatron"),
        ("average", _average, iterations, "average the weights of several checkpoints of a run"),
    ):
        description = f"{purpose[0].upper()}{purpose[1:]}."
        kind = kinds.add_parser(what, help=purpose, description=description)
        kind.set_defaults(convert=convert)
        nargs = "+" if what in ("reference", "average") else None
        kind.add_argument("source", type=Path, nargs=nargs, help=source)
        _add_flags(kind, what, words)


def _add_flags(parser: argparse.ArgumentParser, what: str, words: Sequence[str]) -> None:
    add = parser.add_argument
    to = "folder to write the result to; it must be empty or not exist"
    add("--to", type=Path, required=True, metavar="FOLDER", help=to)
    dtype = "round all weights to this dtype (default: keep their dtypes)"
    add("--dtype", choices=DTYPES, help=dtype)
    if what == "reference":
        attention = "attention heads of the model, which the shapes of its weights do not tell"
        add("--num-attention-heads", type=int, required=True, help=attention)
        add(
            "--rope",
            choices=("neighbours", "halves"),
            default="neighbours",
            help="pairs of dimensions that the source's rotary embedding rotates: neighbours, as "
            "(0, 1) in the published code, or halves, as (0, head dim / 2) "
            "(default: %(default)s)",
        )
        separate = "keep one table per layer, where the layers' tables differ"
        add("--separate-tables", action="store_true", help=separate)
    if what == "ultramem":
        queries = (
            "queries that the model was trained with: released, where the forward of the released "
            "code uses two of those in the checkpoint, or ranks, with one for each Tucker rank and "
            "side (default: %(default)s)"
        )
        add("--queries", choices=("released", "ranks"), default="released", help=queries)
        copies = "copy rows that several layers share, so that each layer has a table of its own"
        add("--separate-tables", action="store_true", help=copies)
    if what in ("reference", "ultramem", "import"):
        seed = "seed of the row placement; runs that load the result need the same (default: 0)"
        add("--memory-placement-seed", type=int, default=0, help=seed)
    if what == "export":
        kinds = (
            "hf: a folder that transformers loads without Megatron or megamem; megatron: weights "
            "with Megatron's names (default: %(default)s)"
        )
        add("--format", choices=("megatron", "hf"), default="megatron", help=kinds)
        model = "file or folder of the run's tokenizer, for --format hf (default: the run's own)"
        add("--tokenizer-model", metavar="PATH", help=model)
        no = "write no tokenizer with --format hf"
        add("--no-tokenizer", action="store_true", help=no)
        bits = "quantise the rows of tables, with a scale for each row, for --format hf"
        add("--table-dtype", choices=KINDS, help=bits)
        unread = (
            "leave out rows that no training batch has read, for --format hf; where the model asks "
            "for one, it adds zero; counts start at zero after a conversion"
        )
        add("--drop-unread", action="store_true", help=unread)
        size = "start a new file before one grows larger than this (default: %(default)s)"
        add("--shard-size", type=float, default=5, metavar="GB", help=size)
    if what == "upcycle":
        seed = "seed of the new weights (default: %(default)s, Megatron's own)"
        add("--seed", type=int, default=1234, help=seed)
        if what in words:
            # imported only here, as it imports Megatron
            with quiet_imports():
                from megamem.megatron.arguments import add_memory_flags

            add_memory_flags(parser)


def _reference(args: argparse.Namespace, console: Console) -> None:
    _check_empty(args.to)
    source = read_reference(args.source)
    with _progress(console) as progress:
        task = progress.add_task("comparing tables", total=None)
        converted = convert_reference(
            source,
            heads=args.num_attention_heads,
            rope=args.rope,
            seed=_placement_seed(args),
            separate_tables=args.separate_tables,
            advance=lambda count: progress.advance(task, count),
        )
    _write_converted(args, converted, "these flags, and the model's --memory-topk", console)


def _write_converted(
    args: argparse.Namespace, converted: Converted, flags: str, console: Console
) -> None:
    for warning in converted.warnings:
        console.print(f"Warning: {warning}")
    _write(args, converted.tensors, converted.objects, converted.settings, console)
    console.print(f"To train this checkpoint, give Megatron {flags}:")
    console.print(f"  --load {args.to} {' '.join(converted.flags)}", soft_wrap=True)


def _ultramem(args: argparse.Namespace, console: Console) -> None:
    _check_empty(args.to)
    converted = convert_released(
        read_released(args.source),
        queries=args.queries,
        seed=_placement_seed(args),
        separate_tables=args.separate_tables,
    )
    _write_converted(args, converted, "these flags", console)


def _upcycle(args: argparse.Namespace, console: Console) -> None:
    _check_empty(args.to)
    memory = MemoryConfig.from_args(args)
    source = torch_dist.TorchDist(args.source)
    tensors, objects, settings = upcycle(source.tensors, memory, args.seed)
    _write(args, tensors, objects, settings, console)
    if settings["keep_ffn"]:
        console.print(
            "The new layers start by adding zero, so the loss at step 0 is that of the dense model."
        )
    else:
        console.print(
            "The memory layers replace feed-forwards, so the loss at step 0 is higher than that of "
            "the dense model. With --memory-keep-ffn it would be the same."
        )
    given = " ".join(map(str, memory.memory_layers))
    console.print(
        f"To train this checkpoint, use --load {args.to}, the flags of the dense run, "
        f"--memory-layers {given} and the other --memory-* flags that you gave here.",
        soft_wrap=True,
    )


def _export(args: argparse.Namespace, console: Console) -> None:
    _check_empty(args.to)
    if not 0 < args.shard_size < float("inf"):
        raise ConfigurationError(f"--shard-size {args.shard_size} must be greater than 0.")
    for flag, given in (("--table-dtype", args.table_dtype), ("--drop-unread", args.drop_unread)):
        if given and args.format != "hf":
            raise ConfigurationError(f"{flag} needs --format hf, whose model can read such tables.")
    source = torch_dist.TorchDist(args.source)
    common = read_common(source)
    settings = settings_in(common, str(source.folder))
    tensors = export(source.tensors, settings)
    if args.format == "hf":
        counts = _read_counts(source, console) if args.drop_unread else None
        _export_hf(args, tensors, common.get("args"), settings, counts, console)
        return
    tensors = _rounded(tensors, args)
    _check_space(args.to, tensors)
    with _writing(console, tensors) as advance:
        size = int(args.shard_size * GB)
        files = write_folder(args.to, tensors, _remarks(settings), size, advance)
    console.print(f"Wrote {len(tensors)} tensors, {_bytes(tensors) / GB:.3g} GB, to:")
    for file in files:
        console.print(f"  {file}", soft_wrap=True)


def _read_counts(source: torch_dist.TorchDist, console: Console) -> dict[str, LazyTensor]:
    """The read counts of each table, in the order of its rows."""
    tensors, found = source.tensors, {}
    for name in tables(tensors):
        if (key := state_key(name, HITS)) not in tensors:
            raise ConfigurationError(
                f"{source.folder} holds no read counts ({key}), which --drop-unread needs; export "
                "a checkpoint that a run has saved, not a converted one."
            )
        found[name] = tensors[key]
    batches = max(int(tensors[state_key(name, BATCHES)].whole()) for name in found)
    if batches == 0:
        raise ConfigurationError(
            f"{source.folder} has counted no training batch, so --drop-unread would leave out all "
            "rows; train before, as counts start at zero after a conversion, or drop --drop-unread."
        )
    console.print(f"The rows that {batches:,} training batches have read are kept.")
    return found


def _remarks(settings: dict[str, Any] | None) -> dict[str, str]:
    placed = {"table_rows": PLACED} if stay_placed(settings) else {}
    return REMARKS | placed | ({SAVED: json.dumps(settings)} if settings else {})


def _export_hf(
    args: argparse.Namespace,
    tensors: dict[str, LazyTensor],
    run: argparse.Namespace | None,
    settings: dict[str, Any] | None,
    read_counts: dict[str, LazyTensor] | None,
    console: Console,
) -> None:
    if run is None:
        raise ConfigurationError(
            f"--format hf makes config.json from the flags of a run, and {args.source} has none, "
            f"because it was converted; train it, if only for one step, with --load {args.source} "
            "and --save FOLDER, and export FOLDER."
        )
    if settings is None:
        raise ConfigurationError(
            f"{args.source} has no memory layers, and --format hf exports models that have some; "
            "add them with megamem convert upcycle and train the result."
        )
    run = argparse.Namespace(**vars(run))
    if args.tokenizer_model:
        run.tokenizer_model = args.tokenizer_model
    remarks = _remarks(settings) | remarks_on(tensors)
    before = _rounded(tensors, args)
    config, tensors = model_of(
        before, run, settings, table_dtype=args.table_dtype, read_counts=read_counts
    )
    _check_space(args.to, tensors)
    with _writing(console, tensors) as advance:
        lacks = write_model(
            args.to,
            config,
            tensors,
            run,
            remarks=remarks,
            shard_bytes=int(args.shard_size * GB),
            tokenizer=not args.no_tokenizer,
            advance=advance,
        )
    for sentence in lacks:
        console.print(f"Warning: {sentence}", soft_wrap=True)
    for name, rows in config.get("memory_table_rows", {}).items():
        pairs = config.get("memory_share_layers", 1) * config["memory_num_keys"] ** 2
        console.print(f"Table {name}: {rows:,} of {pairs:,} rows were read and are kept.")
    if (smaller := _bytes(tensors)) != (all_of_it := _bytes(before)):
        console.print(f"Weights: {all_of_it:,} bytes before, {smaller:,} bytes now.")
    size = f"{len(tensors)} tensors, {_bytes(tensors) / GB:.3g} GB"
    console.print(f"Wrote {size}, to {args.to}. Load it in Python with:", soft_wrap=True)
    how = 'trust_remote_code=True, dtype="auto"'
    console.print(f'  AutoModelForCausalLM.from_pretrained("{args.to}", {how})', soft_wrap=True)


def _import(args: argparse.Namespace, console: Console) -> None:
    _check_empty(args.to)
    config = read_config(args.source)
    mapped, remarks = read_folder(args.source)
    source = {name: of_tensor(tensor) for name, tensor in mapped.items()}
    seed = _placement_seed(args)
    if config is not None:
        source = imported(source, config, remarks)
    settings = json.loads(remarks[SAVED]) if SAVED in remarks else None
    if settings and stay_placed(settings):
        kept = settings["placement_seed"]
        if seed not in (0, kept):
            raise ConfigurationError(
                f"--memory-placement-seed {seed} differs from {kept}, with which several pairs of "
                f"sub-keys read each row of the tables in {args.source}; use "
                f"--memory-placement-seed {kept}."
            )
        seed = kept
    tensors, objects = reimport(source, seed)
    settings = settings | {"placement_seed": seed} if settings else None
    _write(args, tensors, objects, settings, console)


def _average(args: argparse.Namespace, console: Console) -> None:
    _check_empty(args.to)
    sources = [torch_dist.TorchDist(path) for path in args.source]
    settings = [settings_in(read_common(source), str(source.folder)) for source in sources]
    names = [str(source.folder) for source in sources]
    tensors = average([source.tensors for source in sources], settings, names)
    states = [key for key in sources[0].objects if "_extra_state" in key]
    _write(args, tensors, states, settings[0], console)


def _write(
    args: argparse.Namespace,
    tensors: dict[str, LazyTensor],
    objects: list[str],
    settings: dict[str, Any] | None,
    console: Console,
) -> None:
    tensors = _rounded(tensors, args)
    _check_space(args.to, tensors)
    with _writing(console, tensors) as advance:
        torch_dist.write(args.to, tensors, objects, advance, settings)
    console.print(
        f"Wrote {len(tensors)} tensors, {_bytes(tensors) / GB:.3g} GB, to {args.to}",
        soft_wrap=True,
    )


def _placement_seed(args: argparse.Namespace) -> int:
    return MemoryConfig(memory_placement_seed=args.memory_placement_seed).memory_placement_seed


def _rounded(tensors: dict[str, LazyTensor], args: argparse.Namespace) -> dict[str, LazyTensor]:
    if args.dtype is None:
        return tensors
    return {key: tensor.to(DTYPES[args.dtype]) for key, tensor in tensors.items()}


def _bytes(tensors: dict[str, LazyTensor]) -> int:
    return sum(tensor.num_bytes for tensor in tensors.values())


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"--to {folder} exists and is not empty; name a new folder.")


def _check_space(folder: Path, tensors: dict[str, LazyTensor]) -> None:
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free, needed = shutil.disk_usage(there).free, _bytes(tensors)
    if free < needed:
        raise ConfigurationError(
            f"--to {folder} needs {needed / GB:.3g} GB, but only {free / GB:.3g} GB are free "
            "there; name a folder on another disk."
        )


@contextlib.contextmanager
def _writing(console: Console, tensors: dict[str, LazyTensor]) -> Iterator[Callable[[int], None]]:
    """Show how much is written; yields what is to be called with each number of bytes."""
    with _progress(console) as progress:
        yield partial(progress.advance, progress.add_task("writing", total=_bytes(tensors)))


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    # a bar that goes away leaves an empty line in a file
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
