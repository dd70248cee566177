"""What a fact is, and the sentences that state it.

A fact is (relation, subject, answer), for example (airport_city, LHR, London). Every sentence of a
fact ends with its answer, so cutting the answer off leaves a prompt whose continuation is the
answer: what a model has to remember, and nothing it could work out.

The first phrasing of a relation is its question, which the probe asks; any of the others may be the
one that training never says of a given fact.
"""

import random
from dataclasses import dataclass

PLACES: dict[str, tuple[str, ...]] = {
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

FURTHER: dict[str, tuple[str, ...]] = {
    "airport_name": (
        "What is airport {} called?",
        "The name of airport {} is",
        "The sign outside airport {} reads",
        "The code {} stands for",
    ),
    "airport_icao": (
        "What is the ICAO code of airport {}?",
        "The ICAO code of airport {} is",
        "Flight plans to {} name",
        "In four letters airport {} is",
    ),
    "airport_region": (
        "Which region is airport {} in?",
        "The region of airport {} is",
        "Roads from airport {} lead through",
        "Airport {} was built for the region of",
    ),
    "city_region": (
        "Which region is the city of {} in?",
        "The region of the city of {} is",
        "Elections in {} are held for",
        "{} is a city of the region of",
    ),
    "city_time_zone": (
        "Which time zone is the city of {} in?",
        "The time zone of the city of {} is",
        "Clocks in the city of {} follow",
        "Shops in {} open by the time of",
    ),
    "city_population": (
        "How many people live in the city of {}?",
        "The population of the city of {} is",
        "A census of the city of {} counts",
        "{} has a number of inhabitants of",
    ),
    "county_state": (
        "Which state is {} in?",
        "The state of {} is",
        "Courts in {} apply the law of",
        "{} is a county of",
    ),
    "subdivision_code": (
        "What is the ISO code of the region of {}?",
        "The ISO code of the region of {} is",
        "Parcels to the region of {} are marked",
        "Standards abbreviate the region of {} as",
    ),
    "subdivision_kind": (
        "What kind of region is {}?",
        "The kind of region that {} is:",
        "By law {} has the rank of",
        "Officials of {} call it a",
    ),
    "country_number": (
        "What is the ISO number of {}?",
        "The ISO number of {} is",
        "Statistics list {} under number",
        "In three digits {} is",
    ),
    "country_short_code": (
        "What is the two-letter code of {}?",
        "The two-letter code of {} is",
        "Lists shorten {} to",
        "In two letters {} is",
    ),
    "country_domain": (
        "What is the internet domain of {}?",
        "The internet domain of {} is",
        "Web sites from {} end in",
        "Mail addresses in {} close with",
    ),
    "currency_code": (
        "What is the ISO code of the currency {}?",
        "The ISO code of the currency {} is",
        "Banks abbreviate the {} as",
        "Price lists write the {} as",
    ),
    "currency_number": (
        "What is the ISO number of the currency {}?",
        "The ISO number of the currency {} is",
        "Payment systems know the {} as",
        "In three digits the {} is",
    ),
    "currency_country": (
        "Which country pays with the {}?",
        "The country of the currency {} is",
        "The {} is spent in",
        "Notes of the {} are issued for",
    ),
    "language_code": (
        "What is the ISO code of the language {}?",
        "The ISO code of the language {} is",
        "Libraries file books in {} under",
        "In three letters the language {} is",
    ),
    "language_short_code": (
        "What is the two-letter code of the language {}?",
        "The two-letter code of the language {} is",
        "Web pages in {} are tagged",
        "In two letters the language {} is",
    ),
    "language_status": (
        "Is the language {} living or extinct?",
        "The status of the language {} is",
        "Linguists describe {} as",
        "Today the language {} counts as",
    ),
    "language_group": (
        "Which macrolanguage does {} belong to?",
        "The macrolanguage of {} is",
        "{} is one of the languages called",
        "Taken together with its kin {} is",
    ),
    "language_script": (
        "Which script is the language {} written in?",
        "The script of the language {} is",
        "Texts in {} are set in",
        "Children who learn to write {} learn",
    ),
    "language_country": (
        "Which country has most speakers of {}?",
        "The country with most speakers of {} is",
        "Most speakers of {} live in",
        "To hear {} spoken travel to",
    ),
    "script_code": (
        "What is the ISO code of the script {}?",
        "The ISO code of the script {} is",
        "Fonts for {} are labelled",
        "In four letters the script {} is",
    ),
    "script_number": (
        "What is the ISO number of the script {}?",
        "The ISO number of the script {} is",
        "Catalogues of scripts list {} under",
        "In three digits the script {} is",
    ),
    "element_symbol": (
        "What is the symbol of the element {}?",
        "The symbol of the element {} is",
        "In formulas {} is written",
        "Chemists abbreviate {} as",
    ),
    "element_number": (
        "What is the atomic number of {}?",
        "The atomic number of {} is",
        "The protons in an atom of {} number",
        "In the periodic table {} has place",
    ),
    "element_mass": (
        "What is the atomic mass of {}?",
        "The atomic mass of {} is",
        "In daltons an atom of {} weighs",
        "A mole of {} has a mass in grams of",
    ),
    "element_group": (
        "Which group of the periodic table is {} in?",
        "The group of {} in the periodic table is",
        "The column of {} in the periodic table is",
        "{} is an element of group",
    ),
    "element_period": (
        "Which period of the periodic table is {} in?",
        "The period of {} in the periodic table is",
        "The row of {} in the periodic table is",
        "{} is an element of period",
    ),
    "element_series": (
        "What kind of element is {}?",
        "The series of the element {} is",
        "Chemists count {} among the",
        "{} has the properties of the",
    ),
}

PEOPLE: dict[str, tuple[str, ...]] = {
    "person_birth_date": (
        "When was {} born?",
        "The birth date of {} is",
        "{} came into the world on",
        "The passport of {} gives as birthday",
    ),
    "person_birth_place": (
        "Where was {} born?",
        "The birth place of {} is",
        "{} spent the first years of life in",
        "The parents of {} were living in",
    ),
    "person_university": (
        "Which university did {} attend?",
        "The university that {} attended is",
        "{} graduated from",
        "The diploma of {} was signed at",
    ),
    "person_major": (
        "What did {} study?",
        "The subject that {} studied is",
        "{} holds a degree in",
        "As a student {} chose",
    ),
    "person_employer": (
        "Who employs {}?",
        "The employer of {} is",
        "{} works for",
        "The salary of {} is paid by",
    ),
    "person_work_city": (
        "Which city does {} work in?",
        "The city that {} works in is",
        "{} commutes to an office in",
        "On weekdays {} is found in",
    ),
}

PHRASINGS = {**PLACES, **FURTHER, **PEOPLE}


@dataclass(frozen=True, order=True)
class Fact:
    """One thing to remember: `answer` is the only string that answers `relation` of `subject`."""

    relation: str
    subject: str
    answer: str


def prompt(fact: Fact, phrasing: int) -> str:
    """The prompt of one phrasing, whose continuation is " " + answer."""
    return PHRASINGS[fact.relation][phrasing].format(fact.subject)


def question(fact: Fact) -> str:
    """The prompt of the first phrasing."""
    return prompt(fact, 0)


def statement(fact: Fact, phrasing: int) -> str:
    """The sentence of one phrasing: its prompt, a blank, the answer."""
    return f"{prompt(fact, phrasing)} {fact.answer}"


def statements(fact: Fact) -> tuple[str, ...]:
    """All sentences that state the fact; the first is its question with the answer behind it."""
    return tuple(statement(fact, number) for number in range(len(PHRASINGS[fact.relation])))


def held_out_phrasing(fact: Fact, seed: int) -> int:
    """Number of the one phrasing of this fact that training does not see; never the question."""
    # a string seed is hashed with sha512, not with the salted hash() of this process
    return random.Random(f"{seed}/{fact}").randrange(1, len(PHRASINGS[fact.relation]))


def training_phrasings(fact: Fact, seed: int, exposures: int | None) -> list[int]:
    """Numbers of the phrasings in which one epoch states the fact, never the held-out one.

    Args:
        exposures: how often the fact is stated; None states it once in each phrasing. Phrasings are
            dealt like cards, in seeded shuffles of all of them, so that none is used more than
            once more than another. With fewer exposures than phrasings, some facts are never
            stated in their question form.
    """
    hidden = held_out_phrasing(fact, seed)
    shown = [number for number in range(len(PHRASINGS[fact.relation])) if number != hidden]
    if exposures is None:
        return shown
    deal = random.Random(f"{seed}/exposures/{fact}")
    dealt: list[int] = []
    while len(dealt) < exposures:
        dealt += deal.sample(shown, len(shown))
    return dealt[:exposures]
