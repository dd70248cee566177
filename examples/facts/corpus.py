"""Which facts a corpus states, which it holds back, and how many bits that is.

Facts come from sets in order: real ones about airports, countries and places, further real ones,
then generated biographies without end. A set is drawn from only when those before it are used up,
so a corpus of 4,000 facts is the same whatever comes after, and a larger corpus states all that a
smaller one with the same seed does.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import log2
from typing import Literal

from biographies import NUM_PEOPLE, RELATIONS, Biographies, bits_of, facts_of_relation
from further_facts import load_further_facts
from people import ANSWERS
from real_facts import load_facts
from relations import Fact

Kind = Literal["real", "biographies", "all"]


@dataclass(frozen=True)
class FactSplit:
    """Facts that training states, and facts that it never states (the control of the probe)."""

    real: tuple[Fact, ...]
    # the first so many facts of the biographies
    generated: int
    held_out: tuple[Fact, ...]
    people: Biographies

    @property
    def num_held_in(self) -> int:
        return len(self.real) + self.generated

    def held_in(self) -> Iterator[Fact]:
        """Every fact that training states: real ones sorted, generated ones person by person."""
        return chain(self.real, self.people.facts(self.generated))

    def sample(self, number: int, purpose: str, seed: int) -> Iterator[Fact]:
        """`number` of the held-in facts, or all where there are fewer; in the order of held_in."""
        if number >= self.num_held_in:
            yield from self.held_in()
            return
        places = random.Random(f"{seed}/{purpose}").sample(range(self.num_held_in), number)
        for place in sorted(places):
            if place < len(self.real):
                yield self.real[place]
            else:
                person, relation = divmod(place - len(self.real), len(RELATIONS))
                yield self.people.fact(person, RELATIONS[relation])


@dataclass(frozen=True)
class RelationCount:
    """What a corpus holds of one relation.

    Attributes:
        answers: different answers; of a generated relation, all that a draw could have given.
        bits: to pick the right answer of every fact. Generated: facts * log2(answers), what a
            uniform draw costs. Real: the entropy of the answers' frequencies in this corpus times
            facts, so what the relation's commonest answer gives away is not counted.
        measured: "uniform" or "frequency", by the above.
    """

    relation: str
    facts: int
    answers: int
    bits: float
    measured: str


def real_sets(kind: Kind) -> list[tuple[Fact, ...]]:
    """The sets of real facts that a kind of corpus draws from, in order."""
    return [] if kind == "biographies" else [load_facts(), load_further_facts()]


def choose_facts(
    sets: Sequence[Sequence[Fact]],
    held_in: int,
    held_out: int,
    seed: int,
    generate: bool = False,
) -> FactSplit:
    """A seeded draw with as even a share of every relation as the facts allow.

    Args:
        sets: real facts; no relation occurs in two sets.
        held_in: facts that training states.
        held_out: facts kept back, an even share of every relation that the corpus draws from. Of
            biographies, they are about people that no corpus states anything of.
        generate: whether biographies follow where the sets are used up.
    """
    _check_room(sum(map(len, sets)), held_in, held_out, generate)
    people = Biographies(seed)
    groups: dict[str, list[Fact]] = {}
    stated: list[Fact] = []
    control: list[Fact] = []
    for facts in sets:
        own = _shuffled_groups(facts, seed)
        groups |= own
        kept_back = _control(groups, held_out)
        # what a smaller corpus states comes first, so that a larger one states it too
        drawn = (*control, *_take_in_turn(_in_order(own)))
        stated += (fact for fact in drawn if fact not in kept_back)
        control = list(kept_back)
        if len(stated) >= held_in:
            break
    if len(stated) < held_in:
        unnamed = {relation: people.control_facts(relation) for relation in RELATIONS}
        kept_back = _control({**groups, **unnamed}, held_out)
        stated += (fact for fact in control if fact not in kept_back)
        control = list(kept_back)
    del stated[held_in:]
    return FactSplit(
        real=tuple(sorted(stated)),
        generated=held_in - len(stated),
        held_out=tuple(sorted(control)),
        people=people,
    )


def count_relations(split: FactSplit) -> tuple[RelationCount, ...]:
    """What the held-in facts hold, relation by relation, in order of their names."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for fact in split.real:
        answers[fact.relation][fact.answer] += 1
    counts = [
        RelationCount(name, by_answer.total(), len(by_answer), _bits(by_answer), "frequency")
        for name, by_answer in answers.items()
    ]
    for name in RELATIONS:
        facts = facts_of_relation(split.generated, name)
        if facts:
            bits = facts * bits_of(name)
            counts.append(RelationCount(name, facts, len(ANSWERS[name]), bits, "uniform"))
    return tuple(sorted(counts, key=lambda count: count.relation))


def _check_room(num_real: int, held_in: int, held_out: int, generate: bool) -> None:
    # the control may take a person for every fact of it
    generated = (NUM_PEOPLE - max(held_out, 0)) * len(RELATIONS) if generate else 0
    most = num_real + generated - (0 if generate else max(held_out, 0))
    if held_in < 1 or held_out < 0 or held_in > most:
        raise ValueError(
            f"--facts {held_in} with --held-out {held_out}: there are {num_real} real facts"
            + (f" and {NUM_PEOPLE} people" if generate else "")
            + f"; choose at least 1 and at most {most} for --facts"
            + ("" if generate else ", or --kind all")
        )


def _control(groups: Mapping[str, Iterable[Fact]], number: int) -> dict[Fact, None]:
    """The first facts in turn: an ordered set, of as many of each relation as there are."""
    return dict.fromkeys(islice(_take_in_turn(_in_order(groups)), number))


def _in_order(groups: Mapping[str, Iterable[Fact]]) -> list[Iterable[Fact]]:
    return [groups[relation] for relation in sorted(groups)]


def _shuffled_groups(facts: Iterable[Fact], seed: int) -> dict[str, list[Fact]]:
    groups: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        groups[fact.relation].append(fact)
    for relation, group in groups.items():
        # a string seed is hashed with sha512, not with the salted hash() of this process
        random.Random(f"{seed}/{relation}").shuffle(group)
    return dict(groups)


def _take_in_turn(groups: Iterable[Iterable[Fact]]) -> Iterator[Fact]:
    waiting = [iter(group) for group in groups]
    while waiting:
        still = []
        for group in waiting:
            for fact in islice(group, 1):
                yield fact
                still.append(group)
        waiting = still


def _bits(by_answer: Counter[str]) -> float:
    total = by_answer.total()
    return sum(n * log2(total / n) for n in by_answer.values())
