"""Replacing a function of another package while it runs: once, and loudly when it is gone."""

import functools
from collections.abc import Callable
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
    """Set owner.name to make(original); a second call changes nothing."""
    original = require(owner, name)
    if getattr(original, MARKER, False):
        return
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, MARKER, True)
    setattr(owner, name, replacement)
