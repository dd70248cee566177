"""Tables as markdown and for a terminal."""

from collections.abc import Sequence
from typing import NamedTuple

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

    def table(self) -> Table:
        """The same for a terminal; words to the left, numbers to the right."""
        table = Table(title=self.title, title_justify="left", caption_justify="left")
        table.caption = "\n".join(self.notes) or None
        places = self.brief or range(len(self.columns))
        for place in places:
            table.add_column(self.columns[place], justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*(row[place] for place in places))
        return table
