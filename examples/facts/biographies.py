"""Generated people: a name that nobody else has, and six facts about it that nothing gives away.

After the synthetic biographies (bioS) of "Physics of Language Models: Part 3.1" (Allen-Zhu and Li,
arXiv 2309.14316): birth date, birth place, university, major, employer, city of work. Unlike there,
the city of work does not follow from the employer: every fact is a uniform draw of its own, so
n facts of a relation hold exactly n * log2(its possible answers) bits. Names are given in every
prompt and count for nothing.

A person is a function of (seed, number): the first thousand people of a corpus of a thousand and of
a corpus of a million are the same people, and nothing is ever held in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from math import isqrt, log2

from people import ANSWERS, FIRST_NAMES, LAST_NAMES, MIDDLE_NAMES
from relations import PEOPLE, Fact

RELATIONS = tuple(PEOPLE)
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
        index = self._shuffled(person)
        index, last = divmod(index, len(LAST_NAMES))
        first, middle = divmod(index, len(MIDDLE_NAMES))
        return f"{FIRST_NAMES[first]} {MIDDLE_NAMES[middle]} {LAST_NAMES[last]}"

    def fact(self, person: int, relation: str) -> Fact:
        """What `relation` of a person is: one uniform draw out of the relation's answers."""
        return self._fact(person, self.name(person), relation)

    def facts(self, number: int) -> Iterator[Fact]:
        """The first `number` facts, person by person."""
        return islice(self._all_facts(), number)

    def control_facts(self, relation: str) -> Iterator[Fact]:
        """Facts about the last person, the last but one, ...: whom no corpus gets to."""
        for person in reversed(range(NUM_PEOPLE)):
            yield self.fact(person, relation)

    def _all_facts(self) -> Iterator[Fact]:
        for person in range(NUM_PEOPLE):
            name = self.name(person)
            for relation in RELATIONS:
                yield self._fact(person, name, relation)

    def _fact(self, person: int, name: str, relation: str) -> Fact:
        answers = ANSWERS[relation]
        return Fact(relation, name, answers[self._hash(relation, person) % len(answers)])

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


def facts_of_relation(number: int, relation: str) -> int:
    """How many of the first `number` facts are of `relation`."""
    people, rest = divmod(number, len(RELATIONS))
    return people + (RELATIONS.index(relation) < rest)


def bits_of(relation: str) -> float:
    """Bits of one fact of a relation: log2 of its number of possible answers."""
    return log2(len(ANSWERS[relation]))
