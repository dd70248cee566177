"""Whose tokens the rows of a tensor belong to: blocks of rows, one per member of the memory group.

A hop over an axis replaces one coordinate of the members: what this rank holds of its own member's
tokens it then holds of all members along the axis, or the reverse.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megamem.spec import Grid


@dataclass(frozen=True)
class Blocks:
    """Members whose tokens follow each other, in order."""

    grid: Grid
    tokens: Sequence[int]
    """Number of tokens of every member of the group."""
    members: tuple[int, ...]

    @property
    def counts(self) -> list[int]:
        """Number of tokens of each block."""
        return [self.tokens[member] for member in self.members]

    @property
    def total(self) -> int:
        """Number of tokens of all blocks."""
        return sum(self.counts)

    def at(self, place: dict[int, int]) -> "Blocks":
        """Return the same blocks of the members with these coordinates, by axis."""
        members = []
        for member in self.members:
            coordinates = list(self.grid.coordinates(member))
            for axis, where in place.items():
                coordinates[axis] = where
            members.append(self.grid.member(coordinates))
        return replace(self, members=tuple(members))

    def along(self, axis: int, ranks: int) -> "Blocks":
        """Return the blocks after a hop that brings those of all ranks of an axis, rank by rank."""
        members = [m for where in range(ranks) for m in self.at({axis: where}).members]
        return replace(self, members=tuple(members))

    def order_by(self, axis: int) -> list[int]:
        """Return the order of blocks in which the coordinate along an axis varies slowest."""
        places = [self.grid.coordinates(member)[axis] for member in self.members]
        return sorted(range(len(places)), key=places.__getitem__)

    def ordered(self, order: Sequence[int]) -> "Blocks":
        """Return the blocks in another order."""
        return replace(self, members=tuple(self.members[block] for block in order))

    def order_like(self, other: "Blocks") -> list[int]:
        """Return the order in which these blocks are those of another value."""
        place = {member: block for block, member in enumerate(self.members)}
        return [place[member] for member in other.members]

    def with_coordinate(self, axis: int, where: int) -> "Blocks":
        """Return the blocks of the members with one coordinate along an axis."""
        members = [m for m in self.members if self.grid.coordinates(m)[axis] == where]
        return replace(self, members=tuple(members))
