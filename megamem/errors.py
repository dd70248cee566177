"""What a person is told whose command cannot be carried out: one line, with the fix."""

import argparse
import difflib
import os
import re
import sys
import time
from collections.abc import Iterable
from typing import NoReturn

USER_ERROR = 2
"""Exit status of a command that was given what it cannot use."""
# torchrun ends all ranks as soon as one has ended: the first rank of a run, then of a node, speaks
# before the others
SECONDS_TO_READ = 3.0


def complain(message: object, who: str = "") -> None:
    """Say what is wrong, as every command of megamem does; `who` follows the word error."""
    sys.stderr.write(f"megamem: error{who}: {message}\n")
    sys.stderr.flush()


def refuse(message: object) -> int:
    """Say why a command cannot be carried out -> its exit status."""
    complain(message)
    return USER_ERROR


def stop(message: str) -> NoReturn:
    """Say once for all ranks why the run cannot go on, then leave.

    A rank that waited and is still here is likely alone in failing, and says so.
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
    """The parser, whose errors are one line with a suggestion instead of a page of usage.

    Only where a flag of ours is on the command line.

    Its --help works, too: Megatron 0.19 describes a flag with a bare percent sign, on which
    argparse ends in a traceback.
    """
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = str(action.help).replace("%", "%%")

    original = parser.error

    def error(message: str) -> NoReturn:
        # a run that has nothing to do with memory gets what Megatron says
        if "--memory" not in " ".join((message, *sys.argv)):
            original(message)
        stop(message + suggestion(message, parser._option_string_actions))

    parser.error = error  # type: ignore[method-assign]
    return parser


def suggestion(message: str, known: Iterable[str], *, of_script: bool = True) -> str:
    """What an unknown flag was probably meant to be, in brackets; empty when nothing is near."""
    _, found, words = message.partition("unrecognized arguments:")
    if not found:
        return ""
    unknown = [word.split("=", 1)[0] for word in words.split() if re.match("--?[a-zA-Z]", word)]
    # the launcher's flag, among those of the script that it runs
    if of_script and "--cpu" in unknown:
        return " (--cpu goes before the script's path)"
    flags = list(known)
    near = [difflib.get_close_matches(flag, flags, n=1, cutoff=0.7) for flag in unknown]
    hints = list(dict.fromkeys(match for matches in near for match in matches))
    return f" (did you mean {', '.join(hints)}?)" if hints else ""
