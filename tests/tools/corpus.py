"""A corpus in which every sample is the same sequence, so that the loss of a run is known."""

from pathlib import Path

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from torch import Tensor

SEQUENCE = 32
DOCUMENTS = 64


def build(folder: Path, vocabulary: int) -> tuple[Path, Tensor]:
    """Write equal documents of one sequence each; return their prefix, and sequence + next token.

    In any order of the documents every sample starts at the beginning of a document.
    """
    tokens = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(5))[:SEQUENCE]
    prefix = folder / "corpus"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for _ in range(DOCUMENTS):
        builder.add_document(tokens, [SEQUENCE])
    builder.finalize(f"{prefix}.idx")
    return prefix, torch.cat((tokens, tokens[:1]))
