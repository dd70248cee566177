"""The megamem command, also `python -m megamem`: one frame for all subcommands.

A subcommand is a module with two functions: add_flags(parser, words) adds the flags that a command
line may have, run(args) carries it out and returns the exit status.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from megamem import __version__
from megamem.config import ConfigurationError
from megamem.errors import USER_ERROR, refuse, suggestion

# name -> its module, and what it does
COMMANDS = {
    "run": ("megamem.run", "run a Megatron training script with memory layers"),
    "plan": ("megamem.tools.plan", "say what a table takes on a cluster, and how to lay it out"),
    "convert": ("megamem.tools.convert.command", "bring checkpoints in, and take a table out"),
    "bench": ("megamem.tools.bench", "measure the kernels against the memory of this machine"),
    "doctor": ("megamem.tools.doctor", "say whether this machine is ready, and what it will use"),
    "patch": ("megamem.tools.patch", "give a Megatron-LM checkout memory layers for good"),
}
# that of rich, too
CLOSED_PIPE = 1
# after Ctrl-C, as shells have it
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Takes flags only as they are spelt, and raises what is wrong with a command line."""

    def __init__(self, **settings: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(**settings, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigurationError, with the flag that was probably meant."""
        known = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    known += parser._option_string_actions
        raise ConfigurationError(message + suggestion(message, known, of_script=False))


def parse(name: str, words: Sequence[str]) -> argparse.Namespace:
    """The command line of a subcommand.

    Raises:
        ConfigurationError: a flag is unknown, or its value is none that it can have.
    """
    module = importlib.import_module(COMMANDS[name][0])
    parser = Parser(prog=f"megamem {name}", description=module.__doc__)
    module.add_flags(parser, words)
    return parser.parse_args(words)


def carry_out(action: Callable[[], int]) -> int:
    """Do it and return its exit status, or say in one line why that cannot be done."""
    try:
        try:
            return action()
        finally:
            # a closed pipe is noticed here, and not when Python ends
            sys.stdout.flush()
    except ConfigurationError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # what is still buffered has to go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except OSError as error:
        return refuse(f"{error.filename}: {error.strerror}" if error.filename else error)


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
    if words[:1] == ["run"]:
        # a training script ends as it would without us
        return importlib.import_module(COMMANDS["run"][0]).main(words[1:])
    return carry_out(lambda: _main(words))


def _main(words: list[str]) -> int:
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
        raise ConfigurationError(f"unknown command {name}{hint}; there is: {', '.join(COMMANDS)}")
    module = importlib.import_module(COMMANDS[name][0])
    return module.run(parse(name, rest))


if __name__ == "__main__":
    sys.exit(main())
