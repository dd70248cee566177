"""The megamem command, also `python -m megamem`: each subcommand is the main() of a module."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from megamem import __version__
from megamem.errors import USER_ERROR, refuse

# name -> the module that has its main(argv) -> exit status, and what it does
COMMANDS = {
    "run": ("megamem.run", "run a Megatron training script with memory layers"),
    "plan": ("megamem.tools.plan", "say what a table takes on a cluster, and how to lay it out"),
    "convert": ("megamem.tools.convert", "bring checkpoints in, and take a table out"),
    "bench": ("megamem.tools.bench", "measure the kernels against the memory of this machine"),
    "doctor": ("megamem.tools.doctor", "say whether this machine is ready, and what it will use"),
    "patch": ("megamem.tools.patch", "give a Megatron-LM checkout memory layers for good"),
}


def usage() -> str:
    """The help text."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items())
    return "\n".join(
        (
            "usage: megamem COMMAND ARGUMENTS...",
            "",
            *lines,
            "",
            "megamem COMMAND --help says more; megamem --version is the version.",
            "",
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that argv names; return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    if words == ["--version"]:
        sys.stdout.write(f"megamem {__version__}\n")
        return 0
    if not words:
        sys.stderr.write(usage())
        return USER_ERROR
    name, *rest = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        known = ", ".join(COMMANDS)
        return refuse(f"unknown command {name}{hint}; there is: {known}")
    module, _ = COMMANDS[name]
    return importlib.import_module(module).main(rest)


if __name__ == "__main__":
    sys.exit(main())
