"""The result of one check of `megamem doctor`."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    what: str
    """The name of the check."""
    found: str
    """Its result, and for a problem what to do."""
    status: Status = "ok"
    is_line: bool = False
    """Whether it is printed below the table, as one line that can be copied."""
