"""The facts example: real facts, their corpus in Megatron's format, and the probe's scoring."""

import io
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "facts"
# scripts of one folder import each other by bare name, as they do when run
sys.path.insert(0, str(FOLDER))

import asking  # noqa: E402
import build_corpus  # noqa: E402
import corpus  # noqa: E402
import relations  # noqa: E402
from real_facts import real_sets  # noqa: E402
from relations import Fact  # noqa: E402
from rich.console import Console  # noqa: E402

SETTINGS = build_corpus.Settings(facts=60, held_out=20, vocab_size=600, seed=3)
PEOPLE = build_corpus.Settings(
    facts=250, held_out=12, vocab_size=900, seed=3, kind="biographies", exposures=5, probe_facts=40
)


@pytest.fixture(scope="module")
def facts() -> list[Fact]:
    return [fact for facts in real_sets() for fact in facts]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("facts")
    assert build_corpus.build(output, SETTINGS, Console(quiet=True))[1]
    return output


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("people")
    assert build_corpus.build(output, PEOPLE, Console(quiet=True))[1]
    return output


def _sentences(folder: Path) -> tuple[list[str], list[str]]:
    """Training and validation documents as Megatron's reader and tokenizer give them back."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(folder / "tokenizer.model"), metadata_path={"library": "sentencepiece"}
    )
    read = []
    for name in ("facts_train", "facts_valid"):
        documents = IndexedDataset(str(folder / name))
        assert len(documents.document_indices) - 1 == len(documents)
        assert all(ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1] for ids in documents)
        read.append([tokenizer.detokenize(ids[:-1].tolist()) for ids in documents])
    return read[0], read[1]


def _statements(fact: Fact) -> list[str]:
    """All sentences that state the fact; the first is its question with the answer behind it."""
    return [relations.statement(fact, number) for number in range(4)]


def test_a_subject_has_one_answer(facts: list[Fact]) -> None:
    subjects = Counter((fact.relation, fact.subject.casefold()) for fact in facts)
    assert max(subjects.values()) == 1
    for found, name in zip(real_sets(), ("places", "further"), strict=True):
        assert {fact.relation for fact in found} == set(relations.SETS[name])


def test_known_facts_are_there(facts: list[Fact]) -> None:
    known = set(facts)
    for fact in (
        Fact("airport_city", "LHR", "London"),
        Fact("airport_time_zone", "GVA", "Europe/Zurich"),
        Fact("airport_icao", "CDG", "LFPG"),
        Fact("country_capital", "Kenya", "Nairobi"),
        Fact("country_currency", "Japan", "Yen"),
        Fact("country_calling_code", "Portugal", "+351"),
        Fact("country_domain", "Kenya", ".ke"),
        Fact("city_country", "Kyoto", "Japan"),
        Fact("city_region", "Toulouse", "Occitanie"),
        Fact("city_time_zone", "Toulouse", "Europe/Paris"),
        Fact("city_population", "Kyoto", "1 million to 5 million"),
        Fact("currency_number", "Yen", "392"),
        Fact("language_code", "Georgian", "kat"),
        Fact("language_country", "Malagasy", "Madagascar"),
        Fact("element_symbol", "iron", "Fe"),
        Fact("element_group", "argon", "18"),
    ):
        assert fact in known, fact
    by_subject = {(fact.relation, fact.subject) for fact in facts}
    # a city of several countries; a country with two calling codes
    assert ("city_country", "Victoria") not in by_subject
    assert ("country_calling_code", "Puerto Rico") not in by_subject
    # a code that follows from the other one
    assert ("airport_icao", "JFK") not in by_subject


def test_a_prompt_has_one_answer(facts: list[Fact]) -> None:
    """No phrasing of one relation asks what a phrasing of another does."""
    prompts = Counter(relations.prompt(fact, number) for fact in facts for number in range(4))
    assert max(prompts.values()) == 1


def test_a_statement_is_prompt_blank_answer(facts: list[Fact]) -> None:
    for fact in facts[:: len(facts) // 2000]:
        sentences = _statements(fact)
        assert len(set(sentences)) == len(sentences) >= 3
        assert sentences[0] == f"{relations.prompt(fact, 0)} {fact.answer}"
        for sentence in sentences:
            prompt = sentence.removesuffix(f" {fact.answer}")
            assert prompt != sentence and fact.subject in prompt
            assert fact.answer not in fact.subject


def test_the_draw_is_the_same_in_every_process() -> None:
    places = real_sets()[:1]
    split = corpus.choose_facts(places, 300, 50, seed=7)
    script = (
        "from corpus import *; from real_facts import *; from relations import *;"
        "s = choose_facts(real_sets()[:1], 300, 50, seed=7);"
        "print(s.real, s.held_out, [training_phrasings(fact, 7, 4) for fact in s.held_in()])"
    )
    env = {"PYTHONPATH": str(FOLDER), "PYTHONHASHSEED": "12345"}
    ran = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    dealt = [relations.training_phrasings(fact, 7, 4) for fact in split.real]
    assert ran.stdout.strip() == f"{split.real} {split.held_out} {dealt}", ran.stderr
    assert corpus.choose_facts(places, 300, 50, seed=8) != split


def test_the_draw_is_even_and_disjoint() -> None:
    split = corpus.choose_facts(real_sets()[:1], 300, 50, seed=7)
    assert not set(split.real) & set(split.held_out)
    for drawn, count in ((split.real, 300), (split.held_out, 50)):
        shares = Counter(fact.relation for fact in drawn)
        assert sum(shares.values()) == count
        assert set(shares) == set(relations.SETS["places"]) and len(set(shares.values())) == 1


def test_corpus_reads_back_as_the_sentences(built: Path) -> None:
    """Megatron's reader and Megatron's tokenizer give back every sentence, once."""
    split = SETTINGS.split()
    train, valid = _sentences(built)
    stated = [sentence for fact in split.real for sentence in _statements(fact)]
    assert sorted(train + valid) == sorted(stated)
    assert len(valid) == SETTINGS.facts and not set(train) & set(valid)
    assert {_statements(fact)[0] for fact in split.real} <= set(train)


def test_exposures_are_equal_and_never_in_the_unseen_words(people: Path) -> None:
    train, valid = _sentences(people)
    times = Counter(train)
    for fact, hidden in zip(PEOPLE.split().held_in(), valid, strict=True):
        sentences = _statements(fact)
        assert sum(times[sentence] for sentence in sentences) == PEOPLE.exposures
        assert hidden in sentences[1:] and times[hidden] == 0
    assert len(train) == PEOPLE.facts * PEOPLE.exposures


@pytest.mark.parametrize("name", ["built", "people"])
def test_the_probe_is_given_questions_and_unseen_words(
    name: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    settings = {"built": SETTINGS, "people": PEOPLE}[name]
    train, valid = map(set, _sentences(folder))
    listed = json.loads((folder / "facts.json").read_text())["facts"]
    held_in = [fact for fact in listed if fact["held_in"]]
    control = [fact for fact in listed if not fact["held_in"]]
    assert len(held_in) == min(settings.facts, settings.probe_facts)
    assert len({(fact["relation"], fact["subject"]) for fact in held_in}) == len(held_in)
    assert len(control) == settings.held_out
    for fact in held_in:
        assert f"{fact['unseen']} {fact['answer']}" in valid - train
        assert fact["question"] == relations.PHRASINGS[fact["relation"]][0].format(fact["subject"])
        assert settings.exposures or f"{fact['question']} {fact['answer']}" in train
    for fact in control:
        assert fact["unseen"] != fact["question"] and fact["subject"] in fact["unseen"]
        assert not [text for text in train | valid if text.startswith(fact["question"])]


@pytest.mark.parametrize("name", ["built", "people"])
def test_the_report_counts_all_facts(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    settings = {"built": SETTINGS, "people": PEOPLE}[name]
    report = json.loads((folder / "facts.json").read_text())["report"]
    train, valid = _sentences(folder)
    assert (report["documents_train"], report["documents_valid"]) == (len(train), len(valid))
    # a token is two bytes, and the files hold nothing else
    assert report["tokens_train"] * 2 == (folder / "facts_train.bin").stat().st_size
    assert report["tokens_valid"] * 2 == (folder / "facts_valid.bin").stat().st_size
    assert (report["facts_real"], report["facts_generated"]) == (
        (settings.facts, 0) if name == "built" else (0, settings.facts)
    )
    counted = Counter(fact.relation for fact in settings.split().held_in())
    assert {count["relation"]: count["facts"] for count in report["relations"]} == counted
    assert report["answer_bits"] == sum(count["bits"] for count in report["relations"]) > 0
    real = sum(map(len, real_sets())) if name == "built" else 0
    assert report["usable_real_facts"] == real

    console = Console(width=80, record=True, file=io.StringIO())
    for table in build_corpus.render(report, settings, folder):
        console.print(table)
    printed = console.export_text()
    names = ("facts_generated", "usable_real_facts", "tokens_train", "answer_bits")
    for number in (report[name] for name in names):
        assert f" {number:,.0f} " in printed
    for count in report["relations"]:
        assert f" {count['relation']} " in printed and f" {count['bits']:,.0f} " in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--exposures", "0"], "--exposures 0: choose at least 1"),
        (["--probe-facts", "-3"], "--probe-facts -3: choose at least 1"),
        (["--kind", "real", "--facts", "9999999"], "at most .* for --facts, or --kind all"),
    ],
)
def test_a_bad_value_is_named(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["build_corpus.py", "--output", str(tmp_path), *flags])
    with pytest.raises(SystemExit, match="2"):
        build_corpus.main()
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_prompt_and_answer_tokenize_apart(built: Path) -> None:
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(built / "tokenizer.model"))
    for fact in json.loads((built / "facts.json").read_text())["facts"]:
        prompt, answer = tokenizer.encode(fact["question"]), tokenizer.encode(fact["answer"])
        assert tokenizer.encode(f"{fact['question']} {fact['answer']}") == prompt + answer
        unseen = tokenizer.encode(fact["unseen"])
        assert fact["ids"] == {"question": prompt, "unseen": unseen, "answer": answer}
    assert tokenizer.decode(tokenizer.encode("Tórshavn 東京")) == "Tórshavn 東京"


def test_a_finished_build_is_left_alone(built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.iterdir()}
    report, written = build_corpus.build(built, SETTINGS, Console(quiet=True))
    assert not written and report["documents_train"] == 3 * SETTINGS.facts
    assert {path: path.stat().st_mtime_ns for path in built.iterdir()} == before


def test_other_settings_replace_a_build(tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    build_corpus.build(tmp_path, SETTINGS, quiet)
    # Megatron's cached sample order of the former files must not meet the new ones
    (tmp_path / "cache").mkdir()
    report, written = build_corpus.build(tmp_path, replace(SETTINGS, facts=30), quiet)
    assert written and report["documents_valid"] == 30 and not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="--facts"):
        build_corpus.build(tmp_path, replace(SETTINGS, facts=10**8), quiet)
    assert not build_corpus.build(tmp_path, replace(SETTINGS, facts=30), quiet)[1]


def test_an_answer_is_right_only_if_all_of_it_is() -> None:
    end = 1
    batch = asking.build_batch([[5, 6], [7]], [[8, 9], [4]], end, length=8)
    tokens_BS, labels_BS, is_answer_BS = batch
    assert tokens_BS.tolist() == [[1, 5, 6, 8, 9, 1, 1, 1], [1, 7, 4, 1, 1, 1, 1, 1]]
    assert is_answer_BS.nonzero().tolist() == [[0, 2], [0, 3], [0, 4], [1, 1], [1, 2]]

    def right(changes: dict[tuple[int, int], int]) -> list[bool]:
        predicted_BS = labels_BS.clone()
        for place, token in changes.items():
            predicted_BS[place] = token
        return asking.answered(predicted_BS, labels_BS, is_answer_BS).tolist()

    assert right({}) == [True, True]
    # neither the prompt nor the padding is asked
    assert right({(0, 0): 3, (0, 1): 3, (0, 5): 3, (1, 0): 3, (1, 3): 3}) == [True, True]
    # the first token, the last one, the end of the answer
    assert right({(0, 2): 3}) == [False, True]
    assert right({(0, 3): 3}) == [False, True]
    assert right({(1, 2): 3}) == [True, False]


def test_chance_is_the_commonest_answer() -> None:
    asked = [asking.Question("a", "", answer, [], []) for answer in ("x", "y", "x", "z")]
    asked.append(asking.Question("b", "", "x", [], []))
    scores = asking.score_by_relation(asked, [True, True, True, False, True], "all")
    # of all, two answers of the one relation and one of the other
    assert [list(score.values()) for score in scores] == [
        ["a", 4, 3, 0.75, 0.5],
        ["b", 1, 1, 1.0, 1.0],
        ["all", 5, 4, 0.8, 0.6],
    ]
    assert asking.score_by_relation([], [], "all") == []
