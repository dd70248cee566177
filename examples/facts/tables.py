"""Tables as markdown and for a terminal, for which rich is used where it is installed."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table


class Sheet(NamedTuple):
    """Rows under columns; notes stand below them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    # places of the columns that a console has room for; all where empty
    brief: Sequence[int] = ()

    def markdown(self) -> str:
        """Its rows under its columns."""
        head, *body = ("| " + " | ".join(line) + " |" for line in (self.columns, *self.rows))
        return "\n".join([head, "|---" * len(self.columns) + "|", *body])

    def table(self) -> "Table | str":
        """The same for a terminal; words to the left, numbers to the right."""
        if not find_spec("rich"):
            return "\n".join([self.title, self.markdown(), *self.notes])
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", caption_justify="left")
        table.caption = "\n".join(self.notes) or None
        places = self.brief or range(len(self.columns))
        for place in places:
            table.add_column(self.columns[place], justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*(row[place] for place in places))
        return table


class PlainConsole:
    """Prints as rich's Console does, without its colors and widths."""

    def print(self, *lines: object, **_: Any) -> None:
        """Write the lines at once."""
        sys.stdout.write("\n".join(map(str, lines)) + "\n")
        sys.stdout.flush()


def make_console() -> Any:
    """Rich's Console, or a plain one where rich is not installed."""
    if not find_spec("rich"):
        return PlainConsole()
    from rich.console import Console

    return Console()
