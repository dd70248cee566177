"""Runs a script as megamem.run --cpu does, but without its hooks: what they are compared to."""

import sys
from collections.abc import Callable

from megamem.cpu import runtime as cpu_runtime
from megamem.megatron.dataset_helpers import prepare_dataset_helpers
from megamem.megatron.launcher import (
    Command,
    parse,
    run_as_main,
    set_rendezvous_defaults,
)


def main(run: Callable[[Command], None] = run_as_main) -> None:
    command = parse(sys.argv[1:])
    set_rendezvous_defaults()
    cpu_runtime.install()
    prepare_dataset_helpers()
    run(command)


if __name__ == "__main__":
    main()
