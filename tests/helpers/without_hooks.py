"""Runs a script as megamem.run --cpu does, but without its hooks: what they are compared to."""

import sys
from collections.abc import Callable

from megamem.cpu import runtime as cpu_runtime
from megamem.megatron.launcher import (
    Command,
    parse,
    run_as_main,
    set_rendezvous_defaults,
    use_helpers_of_the_wheel,
)


def main(run: Callable[[Command], None] = run_as_main) -> None:
    command = parse(sys.argv[1:])
    set_rendezvous_defaults()
    cpu_runtime.install()
    use_helpers_of_the_wheel()
    run(command)


if __name__ == "__main__":
    main()
