"""A corpus in which every sample of a run is the same sequence, so that its loss is known."""

from pathlib import Path

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from torch import Tensor

SEQUENCE = 32
DOCUMENTS = 64


def build(folder: Path, vocabulary: int) -> tuple[Path, Tensor]:
    """Write documents of one sequence each, all alike; return where, and sequence and next token.

    However documents are ordered and samples are cut, a sample starts where a document does.
    """
    tokens = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(5))[:SEQUENCE]
    prefix = folder / "corpus"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for _ in range(DOCUMENTS):
        builder.add_document(tokens, [SEQUENCE])
    builder.finalize(f"{prefix}.idx")
    return prefix, torch.cat((tokens, tokens[:1]))
