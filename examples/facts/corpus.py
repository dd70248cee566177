"""Which facts a corpus states, which it holds back, and how many bits that is.

Facts come from sets in order: real ones about airports, countries and places, further real ones,
then generated biographies. A set is drawn from only when those before it are used up, so a larger
corpus states all that a smaller one with the same seed does.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from math import log2
from typing import Any

from people import ANSWERS, NUM_PEOPLE, RELATIONS, Biographies
from relations import Fact


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
        return chain(self.real, self.people.facts(range(self.generated)))

    def sample(self, number: int, purpose: str, seed: int) -> Iterator[Fact]:
        """`number` of the held-in facts, or all where there are fewer; in the order of held_in."""
        every = range(self.num_held_in)
        places: Sequence[int] = every
        if number < len(every):
            places = sorted(random.Random(f"{seed}/{purpose}").sample(every, number))
        real = len(self.real)
        yield from (self.real[place] for place in places if place < real)
        yield from self.people.facts(place - real for place in places if place >= real)


def choose_facts(
    sets: Sequence[Sequence[Fact]], held_in: int, held_out: int, seed: int, generate: bool = False
) -> FactSplit:
    """A seeded draw with as even a share of every relation as the facts allow.

    Args:
        sets: real facts; no relation occurs in two sets.
        held_in: facts that training states; held_out: facts kept back, of biographies about
            people that no corpus states anything of.
        generate: whether biographies follow where the sets are used up.

    Raises:
        ValueError: there are not so many facts; the message names the flags.
    """
    real = sum(map(len, sets))
    # the control may take a person for every fact of it
    most = real + ((NUM_PEOPLE - held_out) * len(RELATIONS) if generate else -held_out)
    if held_in < 1 or held_out < 0 or held_in > most:
        people, other = (f" and {NUM_PEOPLE} people", "") if generate else ("", ", or --kind all")
        raise ValueError(
            f"--facts {held_in} with --held-out {held_out}: there are {real} real facts{people}; "
            f"choose at least 1 and at most {most} for --facts{other}"
        )
    everyone = Biographies(seed)
    groups: dict[str, Iterable[Fact]] = {}
    stated: list[Fact] = []
    control: dict[Fact, None] = {}
    for facts in (*sets, None):
        if len(stated) >= held_in:
            break
        own = _shuffled(facts or (), seed)
        # what a smaller corpus states comes first, so that a larger one states it too
        drawn = chain(list(control), _in_turn(own))
        groups |= own
        if facts is None:
            groups |= {relation: everyone.control_facts(relation) for relation in RELATIONS}
        control = dict.fromkeys(islice(_in_turn(groups), held_out))
        stated += (fact for fact in drawn if fact not in control)
    del stated[held_in:]
    generated = held_in - len(stated)
    return FactSplit(tuple(sorted(stated)), generated, tuple(sorted(control)), everyone)


def count_relations(split: FactSplit) -> list[dict[str, Any]]:
    """What the held-in facts hold, relation by relation, in order of their names.

    Returns:
        a row for each: its `relation`, its numbers of `facts` and possible `answers`, the `bits` to
        pick the right answers, and how these are `measured`. "uniform", generated: facts *
        log2(answers), what a uniform draw costs. "frequency", real: the entropy of the answers'
        frequencies in this corpus times facts.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for fact in split.real:
        answers[fact.relation][fact.answer] += 1
    counted = {}
    for name, times in answers.items():
        facts = times.total()
        bits = sum(n * log2(facts / n) for n in times.values())
        counted[name] = facts, len(times), bits, "frequency"
    for place, name in enumerate(RELATIONS[: split.generated]):
        facts, possible = len(range(place, split.generated, len(RELATIONS))), len(ANSWERS[name])
        counted[name] = facts, possible, facts * log2(possible), "uniform"
    columns = ("relation", "facts", "answers", "bits", "measured")
    return [dict(zip(columns, (name, *row), strict=True)) for name, row in sorted(counted.items())]


def _shuffled(facts: Iterable[Fact], seed: int) -> dict[str, list[Fact]]:
    """Relation -> its facts, in the order of a draw."""
    groups: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        groups[fact.relation].append(fact)
    for relation, group in groups.items():
        # a string seed is hashed with sha512, not with the salted hash() of this process
        random.Random(f"{seed}/{relation}").shuffle(group)
    return groups


def _in_turn(groups: Mapping[str, Iterable[Fact]]) -> Iterator[Fact]:
    """One fact of every relation by name, then the next of each, and so on."""
    for turn in zip_longest(*(groups[relation] for relation in sorted(groups))):
        yield from (fact for fact in turn if fact)
