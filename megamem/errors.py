"""Errors that a user can mend are reported in one line that names the fix."""

import argparse
import difflib
import os
import re
import sys
import time
from collections.abc import Iterable
from typing import NoReturn

USER_ERROR = 2
"""Exit status of a command whose arguments cannot be used."""
# torchrun ends all ranks as soon as one has ended, so the first rank of the run, and then the first
# of each node, reports the error before the other ranks do
SECONDS_TO_READ = 3.0


def complain(message: object, who: str = "") -> None:
    """Write an error to stderr, in the form of all megamem commands.

    Args:
        message: what is wrong, and the fix.
        who: stands between "error" and the colon, such as " (rank 3)".
    """
    sys.stderr.write(f"megamem: error{who}: {message}\n")
    sys.stderr.flush()


def refuse(message: object) -> int:
    """Write why a command cannot be carried out; return its exit status."""
    complain(message)
    return USER_ERROR


def stop(message: str) -> NoReturn:
    """Write why the run cannot go on, once for all ranks, and end this process.

    The first rank writes at once. The others wait, because the launcher then ends them; one that is
    still running after the wait has probably failed alone, and its message names the rank.

    Raises:
        SystemExit: always, with status USER_ERROR.
    """
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if rank == 0:
        who = ""
    else:
        time.sleep(SECONDS_TO_READ if local_rank == 0 else 2 * SECONDS_TO_READ)
        who = f" (rank {rank})"
    complain(message, who)
    raise SystemExit(USER_ERROR)


def friendly_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Change a parser so that its errors are one line with a suggestion; returns it.

    This applies only if the command line has a --memory flag; otherwise Megatron's own error with
    the usage stays. It also repairs --help, because Megatron 0.19 has a bare percent sign in the
    help of a flag, for which argparse raises an exception.
    """
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = str(action.help).replace("%", "%%")

    original = parser.error

    def error(message: str) -> NoReturn:
        # a run without memory flags gets the error that Megatron gives
        if "--memory" not in " ".join((message, *sys.argv)):
            original(message)
        stop(message + suggestion(message, parser._option_string_actions))

    parser.error = error  # type: ignore[method-assign]
    return parser


def suggestion(message: str, known: Iterable[str], *, of_script: bool = True) -> str:
    """In brackets, the known flags that unknown ones resemble; empty if there are none.

    Args:
        message: the error of argparse.
        known: all flags that the parser has.
        of_script: whether the flags belong to a training script, where --cpu is a common mistake.
    """
    _, found, words = message.partition("unrecognized arguments:")
    if not found:
        return ""
    unknown = [word.split("=", 1)[0] for word in words.split() if re.match("--?[a-zA-Z]", word)]
    # this flag of the launcher was given among the flags of the script
    if of_script and "--cpu" in unknown:
        return " (--cpu goes before the script's path)"
    flags = list(known)
    near = [difflib.get_close_matches(flag, flags, n=1, cutoff=0.7) for flag in unknown]
    hints = list(dict.fromkeys(match for matches in near for match in matches))
    return f" (did you mean {', '.join(hints)}?)" if hints else ""
