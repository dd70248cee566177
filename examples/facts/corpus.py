"""Which facts a corpus states, which it holds back, and how many bits that is.

Facts come from sets in order: real ones about airports, countries and places, further real ones,
then generated biographies. A set is drawn from only when those before it are used up, so a larger
corpus states all that a smaller one with the same seed does.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, zip_longest
from math import log2
from pathlib import Path
from typing import Any, Literal

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


Kind = Literal["real", "biographies", "all"]


def _flag(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the files in the output folder depend on, package releases aside; every field a flag."""

    facts: int = _flag(2000, "facts that training states")
    held_out: int = _flag(200, "facts kept back as the control of the probe")
    vocab_size: int = _flag(2048, "pieces of the tokenizer (an upper limit)")
    seed: int = _flag(1234, "draws the facts, the people and the held-out phrasings")
    kind: Kind = _flag("all", "real facts, biographies, or biographies after the last real fact")
    exposures: int | None = _flag(None, "training sentences per fact (default: each phrasing once)")
    probe_facts: int = _flag(20_000, "held-in facts listed in facts.json at most")

    def __post_init__(self) -> None:
        for name, value in (("--exposures", self.exposures), ("--probe-facts", self.probe_facts)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: choose at least 1")

    @property
    def sets(self) -> tuple[tuple[Fact, ...], ...]:
        """The real facts that there are to draw from."""
        if self.kind == "biographies":
            return ()
        # generated people need none of the packages that real facts come from
        from real_facts import real_sets

        return real_sets()

    def split(self) -> FactSplit:
        """The facts that a corpus of these settings states and holds back."""
        return choose_facts(self.sets, self.facts, self.held_out, self.seed, self.kind != "real")


def built(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """What build_corpus.py counted, if `folder` has a corpus of these settings.

    It may have been made elsewhere, with other releases of the packages.
    """
    path = folder / "facts.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    stamp = {**known.get("settings", {})}
    stamp.pop("packages", None)
    return known["report"] if stamp == asdict(settings) else None


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
