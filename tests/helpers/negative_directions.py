"""Runs a script as megamem.run does, in a model whose directions start with the other sign.

The sign of UltraMem's singular vectors is part of the state of a run: nothing but a checkpoint
tells a later run without this module that it is the other one.
"""

import sys
from typing import Any

from megamem.layers.tucker_keys import TuckerKeys
from megamem.megatron import launcher


def _start_negative() -> None:
    build = TuckerKeys.__init__

    def __init__(self: TuckerKeys, *rest: Any, **more: Any) -> None:
        build(self, *rest, **more)
        self.directions.fill_(-1)

    TuckerKeys.__init__ = __init__  # type: ignore[method-assign]


if __name__ == "__main__":
    _start_negative()
    sys.exit(launcher.main())
