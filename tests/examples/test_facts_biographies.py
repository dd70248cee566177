"""Generated people: unique names, uniform attributes, each person a function of seed and number."""

import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from itertools import islice
from math import sqrt
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "facts"
# scripts of one folder import each other by bare name, as they do when run
sys.path.insert(0, str(FOLDER))

import people  # noqa: E402
from people import NUM_PEOPLE, RELATIONS, Biographies  # noqa: E402

POOLS = (people.FIRST_NAMES, people.MIDDLE_NAMES, people.LAST_NAMES)


def test_a_million_facts_have_names_to_be_about() -> None:
    assert len(RELATIONS) * NUM_PEOPLE > 10_000_000
    for pool in POOLS:
        # three words of three pools spell one name only: no word is there twice or holds a blank
        assert len(set(pool)) == len(pool) and not any(" " in name for name in pool)


def test_numbers_are_shuffled_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(people, "NUM_PEOPLE", 1000)
    monkeypatch.setattr(people, "SIDE", 32)
    numbers = [Biographies(3)._shuffled(person) for person in range(1000)]
    assert sorted(numbers) == list(range(1000)) != numbers
    with pytest.raises(ValueError, match="person 1000: there are names for 0 to 999"):
        Biographies(3)._shuffled(1000)


def test_names_are_unique_and_mixed() -> None:
    everyone = Biographies(3)
    numbers = [*range(20_000), *range(NUM_PEOPLE - 1000, NUM_PEOPLE)]
    names = [everyone.name(number) for number in numbers]
    assert len(set(names)) == len(names)
    for place, pool in enumerate(POOLS):
        assert {name.split()[place] for name in names} == set(pool)
    # neighbours in number are no neighbours in name
    for place in range(3):
        words = [name.split()[place] for name in names]
        same = sum(one == other for one, other in zip(words, words[1:], strict=False))
        assert same < 3 * len(words) / len(POOLS[place])


def test_a_person_is_the_same_in_a_corpus_of_any_size() -> None:
    everyone = Biographies(11)
    few, many = list(everyone.facts(range(100))), list(everyone.facts(range(5000)))
    assert few == many[:100]
    # the last person is cut off in the middle, and is the same one nevertheless
    assert [fact.relation for fact in few] == [RELATIONS[n % 6] for n in range(100)]
    assert [fact.subject for fact in few] == [everyone.name(n // 6) for n in range(100)]
    # nor does it matter who else is asked for
    assert list(everyone.facts(reversed(range(100)))) == few[::-1]
    assert list(Biographies(12).facts(range(100))) != few


def test_a_person_is_the_same_in_every_process() -> None:
    script = "from people import *; print(list(Biographies(7).facts(range(50))))"
    env = {"PYTHONPATH": str(FOLDER), "PYTHONHASHSEED": "12345"}
    ran = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert ran.stdout.strip() == str(list(Biographies(7).facts(range(50)))), ran.stderr


def test_the_control_is_about_nobody_else() -> None:
    everyone = Biographies(5)
    stated = {fact.subject for fact in everyone.facts(range(3000))}
    for relation in RELATIONS:
        control = list(islice(everyone.control_facts(relation), 40))
        assert len({fact.subject for fact in control}) == 40
        assert {fact.relation for fact in control} == {relation}
        assert not stated & {fact.subject for fact in control}


@pytest.mark.parametrize("relation", RELATIONS)
def test_answers_are_drawn_uniformly(relation: str) -> None:
    everyone = Biographies(1)
    answers = people.ANSWERS[relation]
    assert len(set(answers)) == len(answers) > 100
    place = {answer: number for number, answer in enumerate(answers)}
    bins, draws = 100, 10_000
    drawn = Counter(
        place[fact.answer] * bins // len(answers)
        for fact in everyone.facts(range(RELATIONS.index(relation), 6 * draws, 6))
    )
    sizes = Counter(number * bins // len(answers) for number in range(len(answers)))
    expected = {b: draws * sizes[b] / len(answers) for b in range(bins)}
    chi_squared = sum((drawn[b] - expected[b]) ** 2 / expected[b] for b in range(bins))
    # of 99 degrees of freedom: mean 99, and within six standard deviations
    assert abs(chi_squared - 99) < 6 * sqrt(2 * 99)


def test_attributes_of_a_person_say_nothing_of_each_other() -> None:
    """Of two attributes with the same answers, chance alone makes them agree."""
    everyone, asked = Biographies(2), 10_000
    born, works = (
        everyone.facts(range(RELATIONS.index(relation), 6 * asked, 6))
        for relation in ("person_birth_place", "person_work_city")
    )
    agree = sum(one.answer == other.answer for one, other in zip(born, works, strict=True))
    expected = asked / len(people.ANSWERS["person_work_city"])
    assert abs(agree - expected) < 6 * sqrt(expected)


def test_no_answer_is_in_a_name() -> None:
    names = {name.casefold() for pool in POOLS for name in pool}
    for relation, answers in people.ANSWERS.items():
        # the names of months are no loss: a date has a day and a year besides
        words = {word for answer in answers for word in answer.casefold().split()}
        assert not words & names, relation
    assert people.ANSWERS["person_birth_date"][0] == "1 January 1900"
    assert people.ANSWERS["person_birth_date"][-1] == "31 December 1999"


def test_facts_stream_fast_and_in_constant_memory() -> None:
    everyone = Biographies(0)
    start = time.process_time()
    assert sum(1 for _ in everyone.facts(range(60_000))) == 60_000
    # 0.2 s on an idle core; the bound only catches what would make a million facts take hours
    assert time.process_time() - start < 10
    tracemalloc.start()
    for _ in everyone.facts(range(10_000)):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 10,000 facts kept would take megabytes
    assert peak < 100_000
