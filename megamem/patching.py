"""Replacing a function of another package while it runs: once, and loudly when it is gone."""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

MARKER = "_megamem_replaced"


class MissingSymbolError(RuntimeError):
    """A name that megamem replaces no longer exists in the package it comes from."""


def path_of(owner: Any, name: str) -> str:
    """The dotted path of owner.name, as a person would look it up."""
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}.{name}"
    return f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"


def require(owner: Any, name: str) -> Any:
    """owner.name, or an error that names the missing symbol and the way out."""
    if not hasattr(owner, name):
        raise MissingSymbolError(
            f"{path_of(owner, name)} does not exist in the installed release; megamem replaces it. "
            "Install the releases of torch and megatron-core that megamem's setup.py names."
        )
    return getattr(owner, name)


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Set owner.name to make(original); a second call with the same `make` changes nothing."""
    original = require(owner, name)
    applied: frozenset[str] = getattr(original, MARKER, frozenset())
    label = f"{make.__module__}.{make.__qualname__}"
    if label in applied:
        return
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, MARKER, applied | {label})
    setattr(owner, name, replacement)


def replace_everywhere(owner: ModuleType, name: str, make: Callable[[Any], Any]) -> None:
    """replace(), also in modules of the same package that imported the function by name."""
    original = require(owner, name)
    replace(owner, name, make)
    package = owner.__name__.partition(".")[0]
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] == package and vars(module).get(name) is original:
            setattr(module, name, getattr(owner, name))
