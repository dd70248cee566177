"""The facts example: which facts a corpus states, in which words, how often, and their bits."""

import hashlib
import sys
from collections import Counter
from itertools import pairwise
from math import log2
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "facts"
# scripts of one folder import each other by bare name, as they do when run
sys.path.insert(0, str(FOLDER))

import corpus  # noqa: E402
import people  # noqa: E402
import relations  # noqa: E402
from people import RELATIONS  # noqa: E402
from relations import Fact  # noqa: E402

# two sets of facts as the packages might have them, but independent of any release
FIRST, SECOND = (
    [
        Fact(relation, f"{relation} subject {number}", f"answer {number % 7}")
        for relation in sorted(table)
        for number in range(40)
    ]
    for table in (relations.SETS["places"], relations.SETS["further"])
)
SETS = [FIRST, SECOND]
REAL = len(FIRST) + len(SECOND)


def test_a_small_corpus_is_what_it_always_was() -> None:
    """The quickstart is tuned to this text: the sum was taken before there were further sets."""
    split = corpus.choose_facts(SETS, 150, 23, seed=5, generate=True)
    train = [
        relations.statement(fact, number)
        for fact in split.held_in()
        for number in relations.training_phrasings(fact, 5, exposures=None)
    ]
    valid = [
        relations.statement(fact, relations.held_out_phrasing(fact, 5)) for fact in split.held_in()
    ]
    text = "\n".join([*train, *valid, *map(str, split.held_out)])
    expected = "b5d62b1e2d12dfe15f16615a95ca9a6745aa5337c2ec9d90653c5bda4a6aac56"
    assert hashlib.sha256(text.encode()).hexdigest() == expected


def test_every_relation_has_words_of_its_own() -> None:
    phrasings = [text for table in relations.PHRASINGS.values() for text in table]
    assert len(set(phrasings)) == len(phrasings)
    assert all(text.count("{}") == 1 for text in phrasings)
    assert set(people.ANSWERS) == set(relations.SETS["people"])
    # as many of each, so that every fact is stated equally often without --exposures
    assert {len(table) for table in relations.PHRASINGS.values()} == {4}
    for table in relations.PHRASINGS.values():
        assert [text.endswith("?") for text in table] == [True, False, False, False]


@pytest.mark.parametrize("number", [0, 1, 5, 6, 7, 600, 1003])
def test_facts_of_people_are_counted_exactly(number: int) -> None:
    split = corpus.FactSplit((), number, (), people.Biographies(0))
    counted = Counter(fact.relation for fact in split.held_in())
    assert {row["relation"]: row["facts"] for row in corpus.count_relations(split)} == counted


@pytest.mark.parametrize("kind", ["real", "all"])
def test_a_larger_corpus_states_all_that_a_smaller_one_does(kind: str) -> None:
    sizes = [100, 380, 390, 400, 900, REAL - 30, REAL - 20]
    sizes += [REAL, REAL + 100, 3 * REAL] if kind == "all" else []
    splits = [corpus.choose_facts(SETS, n, 20, 9, generate=kind == "all") for n in sizes]
    for size, split in zip(sizes, splits, strict=True):
        held_in = list(split.held_in())
        assert len(set(held_in)) == len(held_in) == split.num_held_in == size
        assert len(set(split.held_out)) == 20 and not set(held_in) & set(split.held_out)
    for smaller, larger in pairwise(splits):
        assert set(smaller.held_in()) < set(larger.held_in())


def test_a_set_is_drawn_from_only_when_those_before_are_used_up() -> None:
    first, second = {fact.relation for fact in FIRST}, {fact.relation for fact in SECOND}
    for number, whole in ((380, first), (381, first | second), (REAL, None)):
        split = corpus.choose_facts(SETS, number, 20, 9, generate=True)
        asked = {fact.relation for fact in split.held_out}
        if whole is None:
            # twenty of the relations in turn, whichever set they are of
            names = sorted(first | second | set(RELATIONS))
            assert asked == set(names[:20])
            assert len(split.real) + split.generated == REAL
            control = [fact for fact in split.held_out if fact.relation not in RELATIONS]
            assert len(split.real) == REAL - len(control)
        else:
            assert asked <= whole and split.generated == 0


def test_facts_of_people_only() -> None:
    split = corpus.choose_facts([], 100, 30, 9, generate=True)
    assert split.real == () and split.generated == 100
    assert list(split.held_in()) == list(split.people.facts(range(100)))
    assert Counter(fact.relation for fact in split.held_out) == dict.fromkeys(RELATIONS, 5)
    assert not {f.subject for f in split.held_in()} & {f.subject for f in split.held_out}


def test_too_many_facts_are_refused_by_flag() -> None:
    with pytest.raises(ValueError, match=f"--facts {REAL} with --held-out 5: .* most {REAL - 5}"):
        corpus.choose_facts(SETS, REAL, 5, seed=0)
    corpus.choose_facts(SETS, REAL - 5, 5, seed=0)
    for held_in, held_out in ((0, 5), (5, -1)):
        with pytest.raises(ValueError, match=f"--facts {held_in} with --held-out {held_out}: "):
            corpus.choose_facts(SETS, held_in, held_out, seed=0, generate=True)
    most = REAL + 6 * (corpus.NUM_PEOPLE - 5)
    with pytest.raises(ValueError, match=f"{corpus.NUM_PEOPLE} people; .* at most {most} "):
        corpus.choose_facts(SETS, most + 1, 5, seed=0, generate=True)


def test_counts_and_bits_are_those_of_a_direct_computation() -> None:
    split = corpus.choose_facts(SETS, REAL + 1001, 20, 9, generate=True)
    counts = {count["relation"]: count for count in corpus.count_relations(split)}
    held_in = list(split.held_in())
    assert {name: count["facts"] for name, count in counts.items()} == Counter(
        fact.relation for fact in held_in
    )
    for name, count in counts.items():
        answers = [fact.answer for fact in held_in if fact.relation == name]
        if name in RELATIONS:
            assert count["measured"] == "uniform"
            assert count["answers"] == len(people.ANSWERS[name])
            # an answer costs what a uniform choice among all possible ones does
            assert count["bits"] == pytest.approx(sum(log2(count["answers"]) for _ in answers))
        else:
            assert count["measured"] == "frequency" and count["answers"] == len(set(answers))
            # an answer costs minus log2 of its share
            shares = [answers.count(answer) / len(answers) for answer in answers]
            assert count["bits"] == pytest.approx(-sum(map(log2, shares)))


def test_bits_of_known_answers() -> None:
    pair = [Fact("city_country", name, name.upper()) for name in "ab"]
    same = [Fact("country_currency", name, "Euro") for name in "abc"]
    split = corpus.choose_facts([[*pair, *same]], 5, 0, seed=0)
    assert [count["bits"] for count in corpus.count_relations(split)] == [2.0, 0.0]


def test_each_phrasing_but_one_is_shown_once() -> None:
    hidden = set()
    for fact in FIRST[:200]:
        shown = relations.training_phrasings(fact, 4, exposures=None)
        unseen = relations.held_out_phrasing(fact, 4)
        assert sorted([*shown, unseen]) == [0, 1, 2, 3] and unseen > 0
        hidden.add(unseen)
    assert hidden == {1, 2, 3}


@pytest.mark.parametrize("exposures", [1, 2, 3, 4, 7, 30])
def test_exposures_are_equal_and_as_varied_as_can_be(exposures: int) -> None:
    orders = set()
    for fact in FIRST[:100]:
        dealt = relations.training_phrasings(fact, 4, exposures)
        assert dealt == relations.training_phrasings(fact, 4, exposures)
        assert len(dealt) == exposures
        assert relations.held_out_phrasing(fact, 4) not in dealt
        times = Counter(dealt)
        if exposures >= 3:
            assert len(times) == 3
        assert max(times.values()) - min(times.values()) <= 1
        orders.add(tuple(dealt))
    assert len(orders) >= 3


def test_a_sample_is_of_the_held_in_facts_and_does_not_walk_all_of_them() -> None:
    split = corpus.choose_facts(SETS, 5_000_000, 20, 9, generate=True)
    sample = list(split.sample(2000, "probe", seed=1))
    assert len(set(sample)) == 2000 and sample == list(split.sample(2000, "probe", seed=1))
    assert sample != list(split.sample(2000, "probe", seed=2))
    small = corpus.choose_facts(SETS, REAL + 500, 20, 9, generate=True)
    held_in = list(small.held_in())
    chosen = set(small.sample(700, "probe", seed=1))
    assert len(chosen) == 700
    assert [fact for fact in held_in if fact in chosen] == list(small.sample(700, "probe", seed=1))
    # real and generated facts by their shares
    real = sum(fact.relation not in RELATIONS for fact in chosen)
    assert abs(real - 700 * len(small.real) / len(held_in)) < 80
    assert list(small.sample(10**6, "probe", seed=1)) == held_in
