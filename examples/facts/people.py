"""Generated people: a name that nobody else has, and six facts about it that nothing gives away.

After the synthetic biographies (bioS) of "Physics of Language Models: Part 3.1" (Allen-Zhu and Li,
arXiv 2309.14316), but every fact, the city of work too, is a uniform draw of its own: n facts of a
relation hold exactly n * log2(its possible answers) bits. A person is a function of (seed, number),
whatever the size of the corpus. people.toml has the names and what the answers are made of.
"""

import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from hashlib import blake2b
from itertools import product
from math import isqrt
from pathlib import Path

from relations import SETS, Fact

_LISTS: dict[str, list[str]] = tomllib.loads(Path(__file__).with_name("people.toml").read_text())
# to the end of 1999
_BORN = (date(1900, 1, 1) + timedelta(days=day) for day in range(36_524))


def _joined(beginnings: str, endings: str, between: str = "") -> list[str]:
    return [between.join(pair) for pair in product(_LISTS[beginnings], _LISTS[endings])]


FIRST_NAMES, MIDDLE_NAMES = _LISTS["first_names"], _LISTS["middle_names"]
LAST_NAMES = _joined("last_name_beginnings", "last_name_endings")
TOWNS = _joined("town_beginnings", "town_endings")
ANSWERS = {
    # not strftime: it would speak the language of the machine
    "person_birth_date": [f"{d.day} {_LISTS['months'][d.month - 1]} {d.year}" for d in _BORN],
    "person_birth_place": _LISTS["cities"],
    "person_university": [name.format(town) for town in TOWNS for name in _LISTS["universities"]],
    "person_major": _LISTS["majors"],
    "person_employer": _joined("employer_names", "employer_trades", " "),
    "person_work_city": _LISTS["cities"],
}
RELATIONS = tuple(SETS["people"])
NUM_PEOPLE = len(FIRST_NAMES) * len(MIDDLE_NAMES) * len(LAST_NAMES)
# names are shuffled over a square that holds them all
SIDE = isqrt(NUM_PEOPLE - 1) + 1
ROUNDS = 4


@dataclass(frozen=True)
class Biographies:
    """The people of one seed, numbered from 0 to NUM_PEOPLE - 1."""

    seed: int

    def name(self, person: int) -> str:
        """First, middle and last name of a person; no other number yields the same."""
        index, last = divmod(self._shuffled(person), len(LAST_NAMES))
        first, middle = divmod(index, len(MIDDLE_NAMES))
        return f"{FIRST_NAMES[first]} {MIDDLE_NAMES[middle]} {LAST_NAMES[last]}"

    def facts(self, places: Iterable[int]) -> Iterator[Fact]:
        """The facts at these places, counted person by person: one uniform draw each."""
        known, name = -1, ""
        for place in places:
            person, number = divmod(place, len(RELATIONS))
            if person != known:
                known, name = person, self.name(person)
            answers = ANSWERS[RELATIONS[number]]
            drawn = self._hash(RELATIONS[number], person) % len(answers)
            yield Fact(RELATIONS[number], name, answers[drawn])

    def control_facts(self, relation: str) -> Iterator[Fact]:
        """Facts about the last person, the last but one, ...: whom no corpus gets to."""
        last = (NUM_PEOPLE - 1) * len(RELATIONS) + RELATIONS.index(relation)
        return self.facts(range(last, -1, -len(RELATIONS)))

    def _hash(self, purpose: str, number: int) -> int:
        # 64 bits: the remainder by a few thousand answers is uniform to within 1 in 2**48
        key = f"{self.seed}/{purpose}/{number}".encode()
        return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")

    def _shuffled(self, person: int) -> int:
        """A permutation of all people: a Feistel network over the square, walked until inside."""
        if not 0 <= person < NUM_PEOPLE:
            raise ValueError(f"person {person}: there are names for 0 to {NUM_PEOPLE - 1:,}")
        index = person
        while True:
            left, right = divmod(index, SIDE)
            for turn in range(ROUNDS):
                left, right = right, (left + self._hash(f"name{turn}", right)) % SIDE
            index = left * SIDE + right
            if index < NUM_PEOPLE:
                return index
