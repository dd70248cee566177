"""Reads the pasted command line of a training run: its flags, and its number of ranks."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template

from megamem.config import ConfigurationError

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
CONTINUATION = re.compile(r"\\\s*\n")
# what ends a command in a shell, or says where its output goes
ENDS = re.compile(r"\|.*|&.*|;|\d?>.*")
# flags of torchrun, in both of its spellings
NODES, RANKS_OF_A_NODE = ("--nnodes", "-nnodes"), ("--nproc-per-node", "-nproc-per-node")


@dataclass(frozen=True)
class RunCommand:
    """The command line of a training run."""

    flags: list[str]
    """The words behind the training script."""
    ranks: int | None = None
    """Number of ranks, if torchrun is told it."""


def read(words: Sequence[str]) -> RunCommand:
    """Read a command line: one word that holds all of it, or words that a shell has split.

    Variables before the command, torchrun or another launcher, the script, and what follows the
    command are left out; only flags are needed.

    Raises:
        ConfigurationError: a quotation mark is missing, or the value of a shell variable is.
    """
    words = split(words[0]) if len(words) == 1 else _without_what_follows(words)
    script = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
    if script is None:
        first = next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
        return RunCommand(words[first:])
    return RunCommand(words[script + 1 :], _ranks(words[:script]))


def is_command(word: str) -> bool:
    """Whether a word holds a command line with flags, rather than one flag or value."""
    return re.search(r"\s", word) is not None and "--" in word


def pasted(words: Sequence[str]) -> list[str]:
    """The same words, with the flags of a run in place of each that holds its command line.

    Raises:
        ConfigurationError: as read().
    """
    found: list[str] = []
    for word in words:
        if not is_command(word):
            found.append(word)
            continue
        command = read([word])
        found += [f"--world-size={command.ranks}"] if command.ranks else []
        found += command.flags
    return found


def split(text: str) -> list[str]:
    """The words of a command as a shell would split it, without the variables set before it.

    What follows the command, such as a pipe to a log, is left out as well.

    Raises:
        ConfigurationError: a quotation mark is missing, or the value of a shell variable is.
    """
    try:
        words = _without_what_follows(shlex.split(CONTINUATION.sub(" ", text), comments=True))
    except ValueError as error:
        raise ConfigurationError(f"the pasted command line cannot be read: {error}.") from error
    values: dict[str, str] = {}
    while words and (found := ASSIGNMENT.fullmatch(words[0])):
        values[found[1]] = found[2]
        words = words[1:]
    words = [Template(word).safe_substitute(values) for word in words]
    if unknown := [word for word in words if re.search(r"\$[\w{(]", word)]:
        raise ConfigurationError(
            f"the pasted command line has variables without a value: {' '.join(unknown)}; paste "
            "what they stand for, which `set -x` in the script prints."
        )
    return words


def _without_what_follows(words: Sequence[str]) -> list[str]:
    end = next((n for n, word in enumerate(words) if ENDS.fullmatch(word)), len(words))
    return list(words[:end])


def _ranks(launcher: Sequence[str]) -> int | None:
    """Nodes times ranks of a node, if torchrun's flags say both as numbers."""
    nodes = _number(launcher, NODES)
    of_a_node = _number(launcher, RANKS_OF_A_NODE)
    return of_a_node * (nodes or 1) if of_a_node else None


def _number(words: Sequence[str], names: tuple[str, ...]) -> int | None:
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") in names:
            value = value if equals else next(iter(words[place + 1 :]), "")
            return int(value) if value.isdecimal() else None
    return None
