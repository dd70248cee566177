"""The megamem command, also `python -m megamem`: what all subcommands have in common.

A subcommand is a module with two functions: add_flags(parser, words) adds its flags to the parser,
and run(args) carries it out and returns the exit status.
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

# the name of a subcommand -> its module, and what it does
COMMANDS = {
    "run": ("megamem.run", "run a Megatron training script with memory layers"),
    "plan": (
        "megamem.tools.plan",
        "estimate memory, traffic and time of a table on a cluster, and recommend a layout",
    ),
    "convert": (
        "megamem.tools.convert.command",
        "convert checkpoints, and import or export tables",
    ),
    "bench": (
        "megamem.tools.bench",
        "measure the kernels as a fraction of this machine's memory bandwidth",
    ),
    "tune": (
        "megamem.tools.tune",
        "measure which block sizes and forms of the kernels are fastest on this GPU",
    ),
    "doctor": (
        "megamem.tools.doctor",
        "check whether this machine can train, and show what it would use",
    ),
    "patch": ("megamem.tools.patch", "add memory layers to a Megatron-LM checkout permanently"),
}
# the exit status that rich has for a closed pipe, too
CLOSED_PIPE = 1
# the exit status that shells give a program that Ctrl-C ended
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that accepts no abbreviated flags and raises its errors."""

    def __init__(self, **settings: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(**settings, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigurationError with the message and the flags that unknown ones resemble."""
        known = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    known += parser._option_string_actions
        raise ConfigurationError(message + suggestion(message, known, of_script=False))


def parse(name: str, words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of a subcommand.

    Raises:
        ConfigurationError: a flag is unknown, or its value is not allowed.
    """
    module = importlib.import_module(COMMANDS[name][0])
    parser = Parser(prog=f"megamem {name}", description=module.__doc__)
    module.add_flags(parser, words)
    return parser.parse_args(words)


def carry_out(action: Callable[[], int]) -> int:
    """Call the action and return its exit status; write an expected error in one line."""
    try:
        try:
            return action()
        finally:
            # so that a closed pipe raises its error here, and not when Python ends
            sys.stdout.flush()
    except ConfigurationError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, which must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except OSError as error:
        return refuse(f"{error.filename}: {error.strerror}" if error.filename else error)


def usage() -> str:
    """The text of `megamem --help`."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items())
    return "\n".join(
        (
            "usage: megamem COMMAND ARGUMENTS...",
            "",
            *lines,
            "",
            "megamem COMMAND --help describes a command; megamem --version prints the version.",
            "",
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that argv names; return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["run"]:
        # a training script must end as it would without megamem
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
        raise ConfigurationError(
            f"unknown command {name}{hint}; the commands are: {', '.join(COMMANDS)}"
        )
    module = importlib.import_module(COMMANDS[name][0])
    return module.run(parse(name, rest))


if __name__ == "__main__":
    sys.exit(main())
