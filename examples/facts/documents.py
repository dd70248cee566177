"""Facts as tokens: the tokenizer, and documents in Megatron's indexed format."""

import io
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import numpy
import sentencepiece
from corpus import FactSplit
from relations import held_out_phrasing, statement, training_phrasings
from rich.console import Console
from rich.progress import track

# the tokenizer is trained on so many facts at most: pieces are counted, and counts of that many
# sentences are close to those of all
TOKENIZER_FACTS = 60_000
# facts encoded in one call
BATCH = 2048


@dataclass
class Documents:
    """One pair of files being written; documents and tokens so far."""

    prefix: Path
    builder: Any
    documents: int = 0
    tokens: int = 0

    def add(self, rows: Iterable[list[int]], end_token: int) -> None:
        """One document per row, each with the end-of-document token behind it."""
        for row in rows:
            ids = numpy.array([*row, end_token])
            self.builder.add_document(ids, [len(ids)])
            self.documents += 1
            self.tokens += len(ids)

    def finalize(self) -> None:
        """Write the index."""
        self.builder.finalize(f"{self.prefix}.idx")


def training_sentences(split: FactSplit, seed: int) -> Iterator[str]:
    """Each training phrasing once, of the facts that the tokenizer is trained on."""
    for fact in split.sample(TOKENIZER_FACTS, "tokenizer", seed):
        for number in training_phrasings(fact, seed, exposures=None):
            yield statement(fact, number)


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> bytes:
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
    output: Path,
    split: FactSplit,
    tokenizer: sentencepiece.SentencePieceProcessor,
    seed: int,
    exposures: int | None,
    console: Console,
) -> tuple[Documents, Documents]:
    """Write facts_train and facts_valid in one pass over the facts with Megatron's own builder.

    Returns:
        what was written to train, and to valid
    """
    train = _open(output / "facts_train", tokenizer)
    valid = _open(output / "facts_valid", tokenizer)
    end_token = tokenizer.eos_id()
    facts = track(
        split.held_in(),
        "writing documents",
        total=split.num_held_in,
        console=console,
        transient=True,
    )
    for batch in batched(facts, BATCH):
        shown = [
            statement(fact, number)
            for fact in batch
            for number in training_phrasings(fact, seed, exposures)
        ]
        hidden = [statement(fact, held_out_phrasing(fact, seed)) for fact in batch]
        train.add(tokenizer.encode(shown), end_token)
        valid.add(tokenizer.encode(hidden), end_token)
    train.finalize()
    valid.finalize()
    return train, valid


def _open(prefix: Path, tokenizer: sentencepiece.SentencePieceProcessor) -> Documents:
    # Megatron takes seconds to import, which a finished build need not wait for, and warns about
    # GPU packages that writing files has no use for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(tokenizer.vocab_size())
    return Documents(prefix, IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype))
