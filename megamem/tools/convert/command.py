"""`megamem convert`: checkpoints in, checkpoints out.

    reference   the published reference implementation's consolidated checkpoint -> Megatron
    upcycle     a dense Megatron checkpoint -> the same with memory layers added
    export      a Megatron checkpoint with memory layers -> safetensors
    import      such safetensors -> Megatron

Megatron's are torch_dist checkpoints, as its --save makes them and its --load takes them; they are
written as a release: weights for a new run, from iteration 0, without optimizer state. Tensors pass
through piece by piece, so that memory need not hold a table. No code in a file is run.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from megamem.config import ConfigurationError, MemoryConfig
from megamem.tools.convert import torch_dist
from megamem.tools.convert.export import REMARKS, export, reimport
from megamem.tools.convert.lazy import LazyTensor
from megamem.tools.convert.reference import convert_reference
from megamem.tools.convert.reference_file import read_reference
from megamem.tools.convert.safetensors import read_folder, write_folder
from megamem.tools.convert.upcycle import upcycle

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GB = 10**9


def run(args: argparse.Namespace) -> int:
    """Convert."""
    args.convert(args, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    return 0


def add_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """The kinds of conversion, each with flags of its own."""
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    saved = "the folder of --save, or of an iteration in it"
    consolidated = "the consolidated .pth or .safetensors, or all of several"
    for what, convert, source, purpose in (
        ("reference", _reference, consolidated, "the reference implementation's -> Megatron's"),
        ("upcycle", _upcycle, saved, "a dense Megatron checkpoint -> with memory layers added"),
        ("export", _export, saved, "a Megatron checkpoint with memory layers -> safetensors"),
        ("import", _import, "the folder of safetensors", "those of an export -> Megatron's"),
    ):
        kind = kinds.add_parser(what, help=purpose, description=purpose)
        kind.set_defaults(convert=convert)
        nargs = "+" if what == "reference" else None
        kind.add_argument("source", type=Path, nargs=nargs, help=source)
        _add_flags(kind, what, words)


def _add_flags(parser: argparse.ArgumentParser, what: str, words: Sequence[str]) -> None:
    add = parser.add_argument
    add("--to", type=Path, required=True, metavar="FOLDER", help="what to write: new, or empty")
    add("--dtype", choices=DTYPES, help="round all weights to this; default: as they are")
    if what == "reference":
        add("--num-attention-heads", type=int, required=True, help="no shape says it")
        add(
            "--rope",
            choices=("neighbours", "halves"),
            default="neighbours",
            help="dimensions of a head that turn together in the source: 0 with 1, as in the "
            "published code, or 0 with half",
        )
        add("--separate-tables", action="store_true", help="keep tables that differ by layer")
    if what in ("reference", "import"):
        seed = "places the table's rows; runs that load the result need the same"
        add("--memory-placement-seed", type=int, default=0, help=seed)
    if what == "export":
        add("--shard-size", type=float, default=5, metavar="GB", help="files are not much larger")
    if what == "upcycle":
        add("--seed", type=int, default=1234, help="of the new weights; default: Megatron's")
        if what in words:
            # imports Megatron
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
    for warning in converted.warnings:
        console.print(f"Warning: {warning}")
    _write(args, converted.tensors, converted.objects, console)
    console.print("Train on with Megatron's loop and these flags, and --memory-topk as it was:")
    console.print(f"  --load {args.to} {' '.join(converted.flags)}", soft_wrap=True)


def _upcycle(args: argparse.Namespace, console: Console) -> None:
    _check_empty(args.to)
    memory = MemoryConfig.from_args(args)
    tensors, objects = upcycle(torch_dist.TorchDist(args.source).tensors, memory, args.seed)
    _write(args, tensors, objects, console)
    if memory.memory_keep_ffn:
        console.print("The new layers add zero: the loss at step 0 is that of the dense model.")
    else:
        console.print(
            "The feed-forwards of the memory layers are gone: the loss at step 0 is higher than "
            "that of the dense model. With --memory-keep-ffn it would be the same."
        )
    given = " ".join(map(str, memory.memory_layers))
    console.print(
        f"Train on with --load {args.to}, the flags of the dense run, --memory-layers {given} and "
        "the other --memory flags that were given here.",
        soft_wrap=True,
    )


def _export(args: argparse.Namespace, console: Console) -> None:
    _check_empty(args.to)
    if not 0 < args.shard_size < float("inf"):
        raise ConfigurationError(f"--shard-size {args.shard_size} must be more than 0.")
    tensors = _rounded(export(torch_dist.TorchDist(args.source).tensors), args)
    _check_space(args.to, tensors)
    with _progress(console) as progress:
        task = progress.add_task("writing", total=_bytes(tensors))
        files = write_folder(
            args.to,
            tensors,
            REMARKS,
            int(args.shard_size * GB),
            lambda count: progress.advance(task, count),
        )
    console.print(f"{len(tensors)} tensors, {_bytes(tensors) / GB:.3g} GB, in:")
    for file in files:
        console.print(f"  {file}", soft_wrap=True)


def _import(args: argparse.Namespace, console: Console) -> None:
    _check_empty(args.to)
    source, _ = read_folder(args.source)
    tensors, objects = reimport(source, _placement_seed(args))
    _write(args, tensors, objects, console)


def _write(
    args: argparse.Namespace,
    tensors: dict[str, LazyTensor],
    objects: list[str],
    console: Console,
) -> None:
    tensors = _rounded(tensors, args)
    _check_space(args.to, tensors)
    with _progress(console) as progress:
        task = progress.add_task("writing", total=_bytes(tensors))
        torch_dist.write(args.to, tensors, objects, lambda n: progress.advance(task, n))
    console.print(
        f"{len(tensors)} tensors, {_bytes(tensors) / GB:.3g} GB, in {args.to}", soft_wrap=True
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
            f"--to {folder} needs {needed / GB:.3g} GB, but {free / GB:.3g} GB are free there."
        )


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
