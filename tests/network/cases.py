"""What is measured: layouts of a memory group on four hosts of two ranks."""

from dataclasses import dataclass

HOSTS, RANKS_PER_HOST = 4, 2
WORLD = HOSTS * RANKS_PER_HOST


@dataclass(frozen=True)
class Case:
    """One layout."""

    name: str
    grid: tuple[int, int, int, int]
    """Node rows, node columns, local rows and local columns."""
    pieces: int = 1
    wire: str = "alltoall"

    @property
    def grid_text(self) -> str:
        """The grid as --memory-grid takes it."""
        return "x".join(map(str, self.grid))

    @property
    def flags(self) -> tuple[object, ...]:
        """The flags of a run with this layout."""
        return (
            *("--memory-grid", self.grid_text),
            *("--memory-pieces", self.pieces),
            *("--memory-wire", self.wire),
        )


@dataclass(frozen=True)
class Sizes:
    """What a rank sends."""

    tokens: int = 512
    """Tokens of a rank and pass."""
    lookups: int = 128
    """Lookups of a token."""
    width: int = 2048
    """Columns of a row."""
    element: int = 2
    """Bytes of a number of a row; 2 is bf16."""
    num_keys: int = 128
    """The table has num_keys**2 rows."""
    bag_seconds: float = 0.4
    """The time that reading the rows of all tokens takes, forward and backward each. The ranks
    sleep instead, as they share few cores; shares of the tokens take shares of the time."""


LAYOUTS = {
    "A": (4, 1, 1, 2),  # rows across the nodes, columns inside
    "B": (1, 4, 2, 1),  # columns across the nodes, rows inside
    "C2": (1, 4, 1, 2),  # columns over all ranks
}
CASES = [
    *(Case(name, grid, pieces) for name, grid in LAYOUTS.items() for pieces in (1, 4)),
    Case("mixed", (2, 2, 2, 1)),
    Case("A", LAYOUTS["A"], wire="allgather"),
]
TRAINED = [Case("A", LAYOUTS["A"], 2), Case("B", LAYOUTS["B"], 2), Case("C2", LAYOUTS["C2"])]
