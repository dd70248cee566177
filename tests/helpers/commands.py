"""Subcommands of megamem, carried out in this process as `megamem NAME ...` carries them out."""

from collections.abc import Callable, Sequence

from megamem.__main__ import Parser, main


def command(name: str) -> Callable[[Sequence[str]], int]:
    """Words of a command line -> exit status."""
    return lambda words: main([name, *words])


def parser_of(name: str) -> Parser:
    """An empty parser of a subcommand, which raises its errors."""
    return Parser(prog=f"megamem {name}", add_help=False)
