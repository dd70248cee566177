"""Whose tokens the rows of a tensor belong to: blocks of rows, one per member of the memory group.

A hop over an axis replaces one coordinate of the members: what this rank holds of its own member's
tokens it then holds of all members along the axis, or the reverse.
"""

from dataclasses import dataclass, replace

from megamem.spec import Grid


@dataclass(frozen=True)
class Blocks:
    """Members whose tokens follow each other, in order."""

    grid: Grid
    tokens: tuple[int, ...]
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

    def times(self, rows: int) -> "Blocks":
        """Return the blocks in which every token has so many rows."""
        if rows == 1:
            return self
        return replace(self, tokens=tuple(count * rows for count in self.tokens))

    def along(self, axis: int) -> "Blocks":
        """Return the blocks after a hop that brings those of all ranks of an axis, rank by rank."""
        places = [list(self.grid.coordinates(member)) for member in self.members]
        members = []
        for where in range(self.grid.sides[axis]):
            for place in places:
                place[axis] = where
                members.append(self.grid.member(place))
        return replace(self, members=tuple(members))

    def order_by(self, axis: int) -> list[int]:
        """Return the order of blocks in which the coordinate along an axis varies slowest."""
        places = [self.grid.coordinates(member)[axis] for member in self.members]
        return sorted(range(len(places)), key=places.__getitem__)

    def order_like(self, other: "Blocks") -> list[int]:
        """Return the order in which these blocks are those of another value."""
        place = {member: block for block, member in enumerate(self.members)}
        return [place[member] for member in other.members]

    def by_coordinate(self, axis: int) -> list["Blocks"]:
        """Return the blocks of the members with each coordinate along an axis."""
        members: list[list[int]] = [[] for _ in range(self.grid.sides[axis])]
        for member in self.members:
            members[self.grid.coordinates(member)[axis]].append(member)
        return [replace(self, members=tuple(those)) for those in members]
