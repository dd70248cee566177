"""Makes Triton's interpreter about twice as fast, without a change to what it computes.

At every call of a device function it looks through triton.language for what it has to replace, even
where the launch of the kernel has replaced it already. Here it does so once a launch for every set
of modules that a function sees.
"""

import sys
from types import FunctionType
from typing import Any

from triton import language
from triton.runtime import interpreter

Seen = tuple[bool, ...]


def install() -> None:
    """Do so in this process, for all kernels."""
    replace = interpreter._patch_lang
    of_device_function = interpreter.InterpretedFunction.__call__.__code__
    sees: dict[FunctionType, Seen] = {}
    replaced: set[Seen] = set()

    def replace_once(function: FunctionType) -> Any:
        if function not in sees:
            # by identity, as tensors among the globals compare by element
            found = {id(value) for value in function.__globals__.values()}
            sees[function] = tuple(id(one) in found for one in (language, language.core))
        if sys._getframe(1).f_code is not of_device_function:
            # a launch, which undoes all when it ends
            replaced.clear()
        elif sees[function] in replaced:
            return None
        replaced.add(sees[function])
        return replace(function)

    interpreter._patch_lang = replace_once
