"""What a fact is, and the sentences that state it; phrasings.toml has them all.

A fact is (relation, subject, answer), for example (airport_city, LHR, London). Every sentence of a
fact ends with its answer, so cutting the answer off leaves a prompt whose continuation is the
answer: what a model has to remember, and nothing it could work out.
"""

import random
import tomllib
from pathlib import Path
from typing import NamedTuple

SETS: dict[str, dict[str, list[str]]] = tomllib.loads(
    Path(__file__).with_name("phrasings.toml").read_text()
)
PHRASINGS = {relation: texts for table in SETS.values() for relation, texts in table.items()}


class Fact(NamedTuple):
    """One thing to remember: `answer` is the only string that answers `relation` of `subject`."""

    relation: str
    subject: str
    answer: str


def prompt(fact: Fact, phrasing: int) -> str:
    """The prompt of one phrasing, whose continuation is " " + answer; 0 is the question."""
    return PHRASINGS[fact.relation][phrasing].format(fact.subject)


def statement(fact: Fact, phrasing: int) -> str:
    """The sentence of one phrasing: its prompt, a blank, the answer."""
    return f"{prompt(fact, phrasing)} {fact.answer}"


def held_out_phrasing(fact: Fact, seed: int) -> int:
    """Number of the one phrasing of this fact that training does not see; never the question."""
    # a string seed is hashed with sha512, not with the salted hash() of this process
    return random.Random(f"{seed}/{fact}").randrange(1, len(PHRASINGS[fact.relation]))


def training_phrasings(fact: Fact, seed: int, exposures: int | None) -> list[int]:
    """Numbers of the phrasings in which one epoch states the fact, never the held-out one.

    Args:
        exposures: how often the fact is stated, in seeded shuffles of all phrasings one after the
            other, so that none is used more than once more than another; None: once in each.
    """
    shown = [*range(len(PHRASINGS[fact.relation]))]
    shown.remove(held_out_phrasing(fact, seed))
    if exposures is None:
        return shown
    deal = random.Random(f"{seed}/exposures/{fact}")
    dealt: list[int] = []
    while len(dealt) < exposures:
        dealt += deal.sample(shown, len(shown))
    return dealt[:exposures]
