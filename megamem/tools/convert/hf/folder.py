"""Writes an exported model as a folder of Hugging Face's form, and reads one."""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megamem.config import ConfigurationError
from megamem.tools.convert import layout
from megamem.tools.convert.hf import names, tables
from megamem.tools.convert.hf.card import card
from megamem.tools.convert.hf.settings import FORMAT, MODEL_TYPE, Shapes, config_of
from megamem.tools.convert.hf.tokenizer import write_tokenizer
from megamem.tools.convert.lazy import LazyTensor, Tensors
from megamem.tools.convert.safetensors import write_folder

CODE = Path(__file__).parent / "code"
CODE_FILES = ("configuration_megamem.py", "modeling_megamem.py")


def model_of(
    source: Tensors,
    args: argparse.Namespace,
    settings: dict[str, Any],
    *,
    table_dtype: str | None = None,
    read_counts: Mapping[str, LazyTensor] | None = None,
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """The config and the weights of an exported model.

    Args:
        source: the weights in a checkpoint, with row i * N + j of a table for the pair (i, j).
        args: Megatron's arguments of the run.
        settings: the memory settings in the checkpoint.
        table_dtype: of quantised rows, one of tables.KINDS; None for the table's own.
        read_counts: table -> its read counts; rows with 0 are left out. None to keep all rows.

    Raises:
        ConfigurationError: the exported model would compute something else than the run's.
    """
    config = config_of(args, settings, _shapes(source))
    found = names.exported(source, config)
    if table_dtype is None and read_counts is None:
        return config, found
    config |= {"megamem_format": FORMAT, "memory_table_dtype": table_dtype}
    rows = config["memory_table_rows"] = {}
    for name in layout.tables(source):
        weight = names.table_weight(name)
        prefix, table = weight.removesuffix("weight"), found.pop(weight)
        tensors = {"weight": table}
        if read_counts is not None:
            kept = tables.without_unread(name, table, read_counts[name].whole())
            tensors, rows[prefix.removeprefix("model.tables.")[:-1]] = kept.tensors, kept.rows
        if table_dtype is not None:
            tensors |= tables.quantised(tensors["weight"], table_dtype)
        found |= {prefix + kind: tensor for kind, tensor in tensors.items()}
    return config, found


def _shapes(source: Tensors) -> Shapes:
    mixed = {
        int(match["layer"])
        for key in source
        if (match := layout.SINGLE.fullmatch(key)) and names.EXPERTS in match["rest"]
    }
    embedding = source[layout.EMBEDDING]
    dtype = str(embedding.dtype).removeprefix("torch.")
    return Shapes(embedding.shape[0], sorted(mixed), dtype)


def write_model(
    folder: Path,
    config: dict[str, Any],
    tensors: Tensors,
    args: argparse.Namespace,
    *,
    remarks: dict[str, str],
    shard_bytes: int,
    tokenizer: bool,
    advance: Callable[[int], None],
) -> list[str]:
    """Write the folder; nothing is there under its name until all of it is written.

    Args:
        folder: to be made.
        config: the content of config.json.
        tensors: name -> weight.
        args: Megatron's arguments of the run.
        remarks: the metadata of every file of weights.
        shard_bytes: the largest size of a file, unless a single weight is larger.
        tokenizer: whether to write the run's tokenizer as well.
        advance: called with the number of bytes that were written.

    Returns:
        Sentences on what the folder lacks.

    Raises:
        ConfigurationError: the tokenizer cannot be read.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        ids, lacks = write_tokenizer(args, part) if tokenizer else ({}, None)
        _write_json(part / "config.json", config | ids)
        _write_json(part / "generation_config.json", {"_from_model_config": True} | ids)
        for name in CODE_FILES:
            shutil.copyfile(CODE / name, part / name)
        (part / "README.md").write_text(card(config, args, tokenizer=lacks is None and tokenizer))
        write_folder(part, tensors, remarks, shard_bytes, advance)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return [lacks] if lacks else []


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_config(folder: Path) -> dict[str, Any] | None:
    """The config of an exported folder; None if it has none, as with Megatron's names.

    Raises:
        ConfigurationError: it is of another kind of model, of a newer format, or damaged, or its
            tables are not those of the checkpoint.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
        kind, version = config["model_type"], config.get("megamem_format", 0)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} is not the config of a model; copy it again.") from error
    if kind != MODEL_TYPE:
        raise ConfigurationError(
            f"{path} is of a model of type {kind}; only exports of megamem can be imported."
        )
    if version > FORMAT:
        raise ConfigurationError(
            f"{folder} has format {version}, but this release of megamem reads formats up to "
            f"{FORMAT}; install a newer megamem."
        )
    if config.get("memory_table_dtype") or config.get("memory_table_rows"):
        raise ConfigurationError(
            f"{folder} has tables that are quantised or lack rows, from which the checkpoint does "
            "not come back bit for bit; import an export without --table-dtype and --drop-unread."
        )
    return config
