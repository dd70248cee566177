"""Replaces functions of other packages at run time, each of them once."""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

MARKER = "_megamem_replaced"
"""Attribute of a replacement that names the functions which made it."""


class MissingSymbolError(RuntimeError):
    """A name that megamem replaces no longer exists in the package it comes from."""


def path_of(owner: Any, name: str) -> str:
    """The dotted path of owner.name, for messages."""
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}.{name}"
    return f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"


def require(owner: Any, name: str) -> Any:
    """The value of owner.name.

    Raises:
        MissingSymbolError: it does not exist; the message names it and the fix.
    """
    if not hasattr(owner, name):
        raise MissingSymbolError(
            f"{path_of(owner, name)} does not exist in the installed release, but megamem has to "
            "replace it. Install the releases of torch and megatron-core that setup.py of megamem "
            "names."
        )
    return getattr(owner, name)


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Set owner.name to make(original); a second call with the same `make` changes nothing.

    Raises:
        MissingSymbolError: owner.name does not exist.
    """
    original = require(owner, name)
    applied: frozenset[str] = getattr(original, MARKER, frozenset())
    label = f"{make.__module__}.{make.__qualname__}"
    if label in applied:
        return
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, MARKER, applied | {label})
    setattr(owner, name, replacement)


def replace_everywhere(owner: ModuleType, name: str, make: Callable[[Any], Any]) -> None:
    """Like replace(), also in modules of the same package that imported the function by name.

    Raises:
        MissingSymbolError: owner.name does not exist.
    """
    original = require(owner, name)
    replace(owner, name, make)
    package = owner.__name__.partition(".")[0]
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] == package and vars(module).get(name) is original:
            setattr(module, name, getattr(owner, name))
