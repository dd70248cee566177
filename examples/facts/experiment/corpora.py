"""The corpora of the experiment: the facts, and some more that are taught later."""

import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sentencepiece
from build_corpus import Report, Settings, build
from corpus import FactSplit, choose_facts, real_sets
from documents import write_documents
from relations import Fact, held_out_phrasing, prompt, question
from rich.console import Console

from experiment.scales import Scale


def settings_of(scale: Scale) -> Settings:
    """What build_corpus.py makes the corpus from."""
    return Settings(**vars(scale.corpus))


def build_facts(folder: Path, scale: Scale, console: Console) -> Report:
    """The corpus in `folder`/corpus, built unless it is there."""
    return build(folder / "corpus", settings_of(scale), console)[0]


def build_new_facts(folder: Path, scale: Scale, console: Console) -> int:
    """The next scale.new_facts facts in `folder`/new, in the tokens of `folder`/corpus.

    A corpus of more facts states all that a smaller one does, so what it adds is new: no training
    document names these subjects' answers, and none is in the control.

    Returns:
        how many facts they are
    """
    settings, output = settings_of(scale), folder / "new"
    marker = output / "facts.json"
    stamp = {"settings": vars(settings), "new": scale.new_facts}
    if marker.is_file() and json.loads(marker.read_text())["settings"] == stamp:
        return scale.new_facts
    output.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    facts = new_facts(settings, scale.new_facts)
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "corpus" / "tokenizer.model")
    )
    split = _choose(settings, settings.facts)
    taught = FactSplit(real=tuple(facts), generated=0, held_out=(), people=split.people)
    write_documents(output, taught, tokenizer, settings.seed, settings.exposures, console)
    listed = [_as_json(fact, settings.seed, held_in=True) for fact in facts]
    listed += [_as_json(fact, settings.seed, held_in=False) for fact in split.held_out]
    part = output / "facts.json.part"
    part.write_text(json.dumps({"settings": stamp, "facts": listed}, indent=1) + "\n")
    os.replace(part, marker)
    return len(facts)


def new_facts(settings: Settings, number: int) -> list[Fact]:
    """`number` facts that the corpus of these settings neither states nor holds out."""
    small = _choose(settings, settings.facts)
    large = _choose(settings, settings.facts + number + settings.held_out)
    known = {(fact.relation, fact.subject) for fact in itertools.chain(small.real, small.held_out)}
    fresh = (fact for fact in large.real if (fact.relation, fact.subject) not in known)
    people = itertools.islice(large.people.facts(large.generated), small.generated, None)
    chosen = list(itertools.islice(itertools.chain(fresh, people), number))
    if len(chosen) < number:
        raise ValueError(f"{number} new facts: only {len(chosen)} are left beyond the corpus")
    return chosen


def _choose(settings: Settings, facts: int) -> FactSplit:
    sets = real_sets(settings.kind)
    return choose_facts(sets, facts, settings.held_out, settings.seed, settings.kind != "real")


def _as_json(fact: Fact, seed: int, held_in: bool) -> dict[str, Any]:
    return {
        **asdict(fact),
        "question": question(fact),
        "unseen": prompt(fact, held_out_phrasing(fact, seed)),
        "held_in": held_in,
    }
