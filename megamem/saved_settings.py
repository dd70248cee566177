"""The settings of memory layers in a checkpoint, and how they differ from those of a run.

Megatron saves the arguments of a run with every checkpoint, and megamem.checkpoint.settings_of()
among them. Checkpoints that were saved before it existed hold the --memory flags, from which the
same settings follow. What is not in the settings may differ between a run and the checkpoint that
it loads: how tables are sharded, the wire, learning rates and the optimizer (with new state), and
reports.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megamem.checkpoint import FORMAT, SAVED, SETTINGS, TUCKER_SETTINGS, settings_of
from megamem.config import ConfigurationError, MemoryConfig, flag
from megamem.resolution import resolve
from megamem.spec import MemorySpec


def settings_in(common: Mapping[str, Any], named: str) -> dict[str, Any] | None:
    """The settings in a checkpoint; None if it has none, as converted ones may.

    Args:
        common: what the checkpoint holds beside tensors.
        named: how the user names the checkpoint, as "--load DIR".

    Raises:
        ConfigurationError: they have a newer format.
    """
    args = common.get("args")
    # converters save no arguments of Megatron
    settings: dict[str, Any] | None = common.get(SAVED, getattr(args, SAVED, None))
    if settings is None:
        return _from_flags(args)
    if settings["format"] > FORMAT:
        raise ConfigurationError(
            f"{named} has format {settings['format']} of memory layers, but this release "
            f"of megamem reads formats up to {FORMAT}; install a newer megamem."
        )
    return settings


def _from_flags(args: argparse.Namespace | None) -> dict[str, Any] | None:
    if not getattr(args, "memory_layers", None):
        return None
    assert args is not None
    try:
        # settings do not depend on the ranks, which need not be those of this run
        alone = replace(
            MemoryConfig.from_args(args),
            memory_mode="row",
            memory_group_size=1,
            memory_column_ranks=None,
            memory_grid=None,
        )
        return settings_of(resolve(alone, args.hidden_size))
    except ConfigurationError:
        # the flags of a future release
        return None


def setting_problems(saved: dict[str, Any], spec: MemorySpec, named: str) -> list[str]:
    """A sentence for each setting of a run that differs from the checkpoint's.

    Args:
        saved: the settings in the checkpoint.
        spec: the spec of the run.
        named: how the user names the checkpoint, as "--load DIR".
    """
    wanted = settings_of(spec)
    width = saved["hidden_size"]
    if width != spec.hidden_size:
        # widths of the memory layers follow from it
        return [_difference("--hidden-size", width, spec.hidden_size, named)]
    return [
        _difference(setting_flag(name), _as_flag(name, saved), _as_flag(name, wanted), named)
        for name in (*SETTINGS, *TUCKER_SETTINGS)
        # settings that one of both variants does not have follow from the variants
        if name in saved and name in wanted and saved[name] != wanted[name]
    ]


def setting_flag(name: str) -> str:
    """The flag that sets a setting."""
    return flag(f"memory_{name}")


def _as_flag(name: str, settings: Mapping[str, Any]) -> Any:
    """A setting as its flag has it."""
    value = settings[name]
    return ("on" if value else "off") if name == "rank_queries" else value


def _difference(option: str, saved: Any, wanted: Any, named: str) -> str:
    if isinstance(saved, bool):
        if saved:
            return f"{option} is not given, but {named} was trained with it; add {option}."
        return f"{option} is given, but {named} was trained without it; drop {option}."
    text, now = _words(saved), _words(wanted)
    return f"{option} {now} differs from {text} in {named}; use {option} {text}."


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def take_settings(args: argparse.Namespace, common: Mapping[str, Any], named: str) -> list[str]:
    """Set the memory flags of a run to those of a checkpoint (--use-checkpoint-args).

    Only the flags that decide what memory layers compute are taken, and none from a checkpoint
    without memory layers.

    Args:
        args: the arguments of the run.
        common: what the checkpoint holds beside tensors.
        named: how the user names the checkpoint, as "--load DIR".

    Returns:
        "flag value" for each flag that changed.

    Raises:
        ConfigurationError: the settings have a newer format.
    """
    changed = []
    for name, value in _as_flags(settings_in(common, named) or {}).items():
        if value != getattr(args, name, None):
            setattr(args, name, value)
            changed.append(f"{flag(name)} {_words(value)}")
    return changed


def _as_flags(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a run with these settings."""
    names = (*SETTINGS, *TUCKER_SETTINGS)
    found = {f"memory_{name}": _as_flag(name, settings) for name in names if name in settings}
    # a variant without pre-values has no flag for their width
    if not found.get("memory_pre_value_dim"):
        found.pop("memory_pre_value_dim", None)
    # rows are as wide as the hidden states unless another width is asked for, but not UltraMem's
    usual = "tucker_rank" not in settings
    if usual and found.get("memory_value_dim") == settings.get("hidden_size"):
        found["memory_value_dim"] = None
    return found
