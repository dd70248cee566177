"""Runs a script as megamem.run --cpu does, but without its hooks: what they are compared to."""

import sys

from megamem.integration import cpu_runtime
from megamem.integration.launcher import (
    parse,
    run_as_main,
    set_rendezvous_defaults,
    use_helpers_of_the_wheel,
)

if __name__ == "__main__":
    command = parse(sys.argv[1:])
    set_rendezvous_defaults()
    cpu_runtime.install()
    use_helpers_of_the_wheel()
    run_as_main(command)
