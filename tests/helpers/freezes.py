"""Runs a script as megamem.run does, with a part of its model frozen, which FREEZE names.

rest     all but the tables, by code that sets requires_grad of every parameter
tables   the tables alone
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from megamem.checkpoint import TABLES
from megamem.megatron import launcher

PARTS = ("rest", "tables")


def _install_after_hooks() -> None:
    """A model is frozen when it is complete, as a script of a user does."""
    run = launcher.run_as_main

    def run_as_main(command: Any) -> None:
        from megamem.megatron.model import build

        register = build.register_tables
        part = os.environ["FREEZE"]
        assert part in PARTS

        def register_and_freeze(model: nn.Module, pools: Mapping[str, Any]) -> None:
            register(model, pools)
            for name, parameter in model.named_parameters():
                of_table = name.startswith(TABLES)
                if of_table or part == "rest":
                    parameter.requires_grad_(of_table == (part == "rest"))

        build.register_tables = register_and_freeze
        run(command)

    launcher.run_as_main = run_as_main


if __name__ == "__main__":
    _install_after_hooks()
    sys.exit(launcher.main())
