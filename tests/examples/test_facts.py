"""The facts example: real facts, their corpus in Megatron's format, and the probe's scoring."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "facts"
# scripts of one folder import each other by bare name, as they do when run
sys.path.insert(0, str(FOLDER))

import build_corpus  # noqa: E402
import corpus  # noqa: E402
import scoring  # noqa: E402
from rich.console import Console  # noqa: E402

SETTINGS = build_corpus.Settings(facts=60, held_out=20, vocab_size=600, seed=3)


@pytest.fixture(scope="module")
def facts() -> list[corpus.Fact]:
    return corpus.load_facts()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("facts")
    assert build_corpus.build(output, SETTINGS, Console(quiet=True))[1]
    return output


def test_a_subject_has_one_answer(facts: list[corpus.Fact]) -> None:
    subjects = Counter((fact.relation, fact.subject.casefold()) for fact in facts)
    assert max(subjects.values()) == 1


def test_known_facts_are_there(facts: list[corpus.Fact]) -> None:
    for fact in (
        corpus.Fact("airport_city", "LHR", "London"),
        corpus.Fact("airport_time_zone", "GVA", "Europe/Zurich"),
        corpus.Fact("country_capital", "Kenya", "Nairobi"),
        corpus.Fact("country_currency", "Japan", "Yen"),
        corpus.Fact("country_calling_code", "Portugal", "+351"),
        corpus.Fact("city_country", "Kyoto", "Japan"),
    ):
        assert fact in facts
    by_subject = {(fact.relation, fact.subject) for fact in facts}
    # a city of several countries; a country with two calling codes
    assert ("city_country", "Victoria") not in by_subject
    assert ("country_calling_code", "Puerto Rico") not in by_subject


def test_a_statement_is_prompt_blank_answer(facts: list[corpus.Fact]) -> None:
    for fact in facts[:: len(facts) // 2000]:
        sentences = corpus.statements(fact)
        assert len(set(sentences)) == len(sentences) >= 3
        assert sentences[0] == f"{corpus.question(fact)} {fact.answer}"
        for sentence in sentences:
            prompt = sentence.removesuffix(f" {fact.answer}")
            assert prompt != sentence and fact.subject in prompt
            assert fact.answer not in fact.subject


def test_the_draw_is_the_same_in_every_process(facts: list[corpus.Fact]) -> None:
    split = corpus.choose_facts(facts, 300, 50, seed=7)
    script = (
        "from corpus import *; s = choose_facts(load_facts(), 300, 50, seed=7);"
        "print(s, [held_out_phrasing(fact, 7) for fact in s.held_in])"
    )
    env = {"PYTHONPATH": str(FOLDER), "PYTHONHASHSEED": "12345"}
    ran = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    here = f"{split} {[corpus.held_out_phrasing(fact, 7) for fact in split.held_in]}"
    assert ran.stdout.strip() == here, ran.stderr
    assert corpus.choose_facts(facts, 300, 50, seed=8) != split


def test_the_draw_is_even_and_disjoint(facts: list[corpus.Fact]) -> None:
    split = corpus.choose_facts(facts, 300, 50, seed=7)
    assert not set(split.held_in) & set(split.held_out)
    for drawn, count in ((split.held_in, 300), (split.held_out, 50)):
        shares = Counter(fact.relation for fact in drawn)
        assert sum(shares.values()) == count
        assert set(shares) == set(corpus.PHRASINGS) and len(set(shares.values())) == 1


def test_too_many_facts_are_refused_by_flag(facts: list[corpus.Fact]) -> None:
    with pytest.raises(ValueError, match="--facts 1000000 with --held-out 5: .* at most"):
        corpus.choose_facts(facts, 1_000_000, 5, seed=0)


def test_bits_of_known_answers() -> None:
    pair = [corpus.Fact("city_country", name, name.upper()) for name in "ab"]
    same = [corpus.Fact("country_currency", name, "Euro") for name in "abc"]
    assert corpus.answer_bits([*pair, *same]) == 2.0


def test_corpus_reads_back_as_the_sentences(built: Path) -> None:
    """Megatron's reader and Megatron's tokenizer give back every sentence, once."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(built / "tokenizer.model"), metadata_path={"library": "sentencepiece"}
    )
    split = corpus.choose_facts(
        corpus.load_facts(), SETTINGS.facts, SETTINGS.held_out, SETTINGS.seed
    )
    sentences = {}
    for name in ("facts_train", "facts_valid"):
        documents = IndexedDataset(str(built / name))
        assert len(documents.document_indices) - 1 == len(documents)
        assert all(ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1] for ids in documents)
        sentences[name] = [tokenizer.detokenize(ids[:-1].tolist()) for ids in documents]
    train, valid = sentences["facts_train"], sentences["facts_valid"]
    assert sorted(train + valid) == sorted(s for f in split.held_in for s in corpus.statements(f))
    assert len(valid) == SETTINGS.facts and not set(train) & set(valid)
    assert {corpus.statements(fact)[0] for fact in split.held_in} <= set(train)


def test_prompt_and_answer_tokenize_apart(built: Path) -> None:
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(built / "tokenizer.model"))
    for fact in json.loads((built / "facts.json").read_text())["facts"]:
        prompt, answer = tokenizer.encode(fact["question"]), tokenizer.encode(fact["answer"])
        assert tokenizer.encode(f"{fact['question']} {fact['answer']}") == prompt + answer
    assert tokenizer.decode(tokenizer.encode("Tórshavn 東京")) == "Tórshavn 東京"


def test_a_finished_build_is_left_alone(built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.iterdir()}
    report, written = build_corpus.build(built, SETTINGS, Console(quiet=True))
    assert not written and report.documents_train == 3 * SETTINGS.facts
    assert {path: path.stat().st_mtime_ns for path in built.iterdir()} == before


def test_other_settings_replace_a_build(tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    build_corpus.build(tmp_path, SETTINGS, quiet)
    # Megatron's cached sample order of the former files must not meet the new ones
    (tmp_path / "cache").mkdir()
    report, written = build_corpus.build(tmp_path, replace(SETTINGS, facts=30), quiet)
    assert written and report.documents_valid == 30 and not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="--facts"):
        build_corpus.build(tmp_path, replace(SETTINGS, facts=10**7), quiet)
    assert not build_corpus.build(tmp_path, replace(SETTINGS, facts=30), quiet)[1]


def _one_hot(tokens_BS: torch.Tensor, vocab: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(tokens_BS, vocab).float()


def test_an_answer_is_right_only_if_all_of_it_is() -> None:
    end = 1
    batch = scoring.build_batch([[5, 6], [7]], [[8, 9], [4]], end, length=8)
    assert batch.tokens_BS.tolist() == [[1, 5, 6, 8, 9, 1, 1, 1], [1, 7, 4, 1, 1, 1, 1, 1]]
    assert batch.is_answer_BS.nonzero().tolist() == [[0, 2], [0, 3], [0, 4], [1, 1], [1, 2]]

    def right(changes: dict[tuple[int, int], int]) -> list[bool]:
        predicted_BS = batch.labels_BS.clone()
        for place, token in changes.items():
            predicted_BS[place] = token
        logits_BSv = _one_hot(predicted_BS, 10)
        return scoring.answered(logits_BSv.argmax(-1), batch).tolist()

    assert right({}) == [True, True]
    # neither the prompt nor the padding is asked
    assert right({(0, 0): 3, (0, 1): 3, (0, 5): 3, (1, 0): 3, (1, 3): 3}) == [True, True]
    # the first token, the last one, the end of the answer
    assert right({(0, 2): 3}) == [False, True]
    assert right({(0, 3): 3}) == [False, True]
    assert right({(1, 2): 3}) == [True, False]


def test_best_of_shards_is_argmax_of_the_whole_vocabulary() -> None:
    logits_BSv = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))
    scores_WBS, tokens_WBS = torch.stack(logits_BSv.chunk(4, dim=-1)).max(dim=-1)
    tokens_WBS = tokens_WBS + 3 * torch.arange(4).view(4, 1, 1)
    merged_BS = scoring.best_of_shards(scores_WBS, tokens_WBS)
    assert torch.equal(merged_BS, logits_BSv.argmax(dim=-1))


def test_commonest_answer_share() -> None:
    assert scoring.commonest_answer_share(["a", "b", "a", "c"]) == 0.5
    assert scoring.commonest_answer_share([]) == 0.0
