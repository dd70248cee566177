"""What doctor says of one thing."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    found: str
    status: Status = "ok"
