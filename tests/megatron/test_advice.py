"""The advice of every refusal leads out: with it the run may start, or has another reason.

A case is a command line that is refused and the same one after following the advice. Nothing is
trained: the command line is parsed and validated by Megatron and checked as a run checks it.
"""

import argparse
import ast
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import megatron.core
import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.training import arguments
from packaging.version import Version

from megamem import config, resolution, saved_settings
from megamem.checkpoint import (
    FORMAT,
    SAVED,
    placement_key,
    settings_of,
    state_key,
    sub_keys_key,
    table_key,
)
from megamem.config import ConfigurationError, MemoryConfig
from megamem.megatron import arguments as memory_arguments
from megamem.megatron import compat, patches
from megamem.megatron.startup import checks, data_checks, features, saved_model
from megamem.optimizer.state import HITS
from megamem.parallel import traffic
from megamem.resolution import resolve
from megamem.tools.convert import torch_dist
from megamem.tools.convert.lazy import of_tensor
from tests.helpers.megatron_runs import MODEL, SWITCHES, TRAINING

pytestmark = pytest.mark.skipif(
    Version(megatron.core.__version__) < Version("0.19"),
    reason="older releases lack flags of these command lines",
)

MEMORY = "--memory-layers 1 2 --memory-num-keys 16 --memory-heads 2 --memory-topk 4"
# a machine without Transformer Engine and a GPU builds no other layers
LOCAL = (
    "--transformer-impl local --no-rope-fusion --no-masked-softmax-fusion "
    "--no-gradient-accumulation-fusion --no-persist-layer-norm"
)


@dataclass(frozen=True)
class Case:
    """A refusal, and what its advice is taken to mean."""

    given: str
    """The flags that are refused. The message has each of them with its value."""

    says: str
    """Words of the message."""

    instead: str
    """The flags after following the advice, which the message contains, except for `own`."""

    beside: str = ""
    """Further flags of both command lines."""

    memory: tuple[str, str] = (MEMORY, MEMORY)
    """The flags of memory layers in the first and the second command line."""

    ranks: int = 1
    then: str = ""
    """Words of the next refusal; without them the run may start."""

    own: str = ""
    """Words in `instead` that a user has to find himself."""

    shown: str | None = None
    """The flags with the values that the message shows, if that is not all of `given`."""

    mend: Callable[[Path], None] | None = None
    """What the advice means for files in the folder DIR, which the flags may name."""


def _flags(words: str) -> dict[str, list[str]]:
    """Flag -> its values."""
    found: dict[str, list[str]] = {}
    for word in words.split():
        if re.match("--[a-z]", word):
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return found


FLAGS_OF_CONFIG = {
    "a layer named twice": Case(
        "--memory-layers 1 1", "more than once", "--memory-layers 1", own="1"
    ),
    "a negative layer": Case("--memory-layers -1", "is negative", "--memory-layers 0"),
    "no sub-keys": Case(
        "--memory-num-keys 0",
        "at least 1.",
        "--memory-num-keys 1",
        then="--memory-topk 4 is larger",
    ),
    "no heads": Case("--memory-heads 0", "at least 1", "--memory-heads 1"),
    "no rows": Case(
        "--memory-finetune-rows 0",
        "at least 1",
        "--memory-finetune-rows 1",
        beside="--memory-optimizer sgd",
    ),
    "more rows than sub-keys": Case(
        "--memory-topk 17 --memory-num-keys 16", "is larger than", "--memory-topk 16"
    ),
    "fewer sub-keys than rows": Case(
        "--memory-topk 17 --memory-num-keys 16",
        "is larger than",
        "--memory-num-keys 17",
        beside="--memory-topk 17",
    ),
    "too many sub-keys": Case(
        "--memory-num-keys 50000", "must fit into 31 bits", "--memory-num-keys 46340"
    ),
    "an odd key": Case("--memory-key-dim 9", "is odd", "--memory-key-dim 10"),
    "a width that is no multiple of 8": Case(
        "--memory-value-dim 12", "is not a multiple of 8", "--memory-value-dim 16"
    ),
    "columns without 2d": Case(
        "--memory-column-ranks 2",
        "needs --memory-mode 2d",
        "--memory-mode 2d",
        beside="--memory-column-ranks 2 --memory-group-size 2",
        ranks=2,
    ),
    "columns without 2d, dropped": Case("--memory-column-ranks 2", "drop --memory-col", ""),
    "sparse finetuning by Adam": Case(
        "--memory-finetune-rows 9 --memory-optimizer adamw",
        "updates every row",
        "--memory-optimizer sgd",
        beside="--memory-finetune-rows 9",
    ),
    "a background without finetuning": Case(
        "--memory-background DIR",
        "which is not given",
        "--memory-finetune-rows 9",
        beside="--memory-background DIR --memory-optimizer sgd",
        own="9",
        then="holds no checkpoint",
    ),
    "a background without finetuning, dropped": Case(
        "--memory-background DIR", "drop --memory-background", ""
    ),
    "no grid": Case(
        "--memory-grid 2x2", "must be four positive numbers", "--memory-grid 1x1x1x1", own="1x1x1x1"
    ),
    "a grid and a mode": Case(
        "--memory-mode column",
        "both name a layout; drop one",
        "",
        beside="--memory-grid 1x1x1x1",
    ),
    "a grid and another size": Case(
        "--memory-group-size 2",
        "drop --memory-group-size or use 1",
        "--memory-group-size 1",
        beside="--memory-grid 1x1x1x1",
    ),
    "no piece": Case("--memory-pieces 0", "must be at least 1", "--memory-pieces 1"),
    "a seed out of range": Case(
        "--memory-placement-seed -1", "must be from 0 to", "--memory-placement-seed 0"
    ),
    "a rate that is no number": Case("--memory-lr nan", "finite", "--memory-lr 1", own="1"),
    "a negative rate": Case("--memory-lr -1", "zero or more", "--memory-lr 0", own="0"),
}

ULTRAMEM = "--memory-variant ultramem"
SKIPPING = "--memory-layers 0 2 --memory-num-keys 16 --memory-heads 2 --memory-topk 4"
LAYERS_THAT_SKIP = (SKIPPING, SKIPPING)

FLAGS_OF_A_MODEL = {
    "a part that is dropped": Case(
        "--memory-dropout 1",
        "must be at least 0 and below 1",
        "--memory-dropout 0",
        own="0",
        beside=ULTRAMEM,
    ),
    "a negative skip": Case(
        "--memory-skip -1", "must be zero or more", "--memory-skip 0", own="0", beside=ULTRAMEM
    ),
    "cores without Tucker scores": Case("--memory-cores 2", "needs --memory-variant", ""),
    "blocks that are no square": Case(
        "--memory-expansion 5", "is not a square", "--memory-expansion 4", beside=ULTRAMEM
    ),
    "more rows than pairs": Case(
        "--memory-final-topk 17",
        "is larger than the 16 pairs",
        "--memory-final-topk 16",
        beside=ULTRAMEM,
    ),
    "pre-values of another variant": Case(
        "--memory-pre-value-dim 8", "needs --memory-variant ultramem-v2", "", beside=ULTRAMEM
    ),
    "pre-values of another variant, changed": Case(
        "--memory-pre-value-dim 8 --memory-variant ultramem",
        "needs --memory-variant ultramem-v2",
        "--memory-variant ultramem-v2",
        beside="--memory-pre-value-dim 8",
    ),
    "a skip of another variant": Case(
        "--memory-skip 1",
        "needs --memory-variant ultramem,",
        "",
        beside="--memory-variant ultramem-v2",
        memory=LAYERS_THAT_SKIP,
    ),
    "memories on their way at the same time": Case(
        "--memory-skip 2",
        "one memory at a time",
        "--memory-skip 1",
        beside=ULTRAMEM,
        memory=LAYERS_THAT_SKIP,
    ),
    "two ways to share": Case(
        "--memory-share-layers 2 --memory-pool shared",
        "both say which layers share a table",
        "--memory-share-layers 2",
        beside=ULTRAMEM,
    ),
    "sets of layers that do not come out": Case(
        "--memory-share-layers 3",
        "does not divide the 2 layers",
        "--memory-share-layers 2",
        beside=ULTRAMEM,
    ),
    "more sub-keys than ids": Case(
        "--memory-num-keys 30000 --memory-expansion 4",
        "fits into 31 bits",
        "--memory-num-keys 16",
        own="16",
        beside=ULTRAMEM,
        shown="--memory-num-keys 30000",
    ),
    "more sub-keys chosen than there are": Case(
        "--memory-topk 33",
        "the 32 sub-keys per query half",
        "--memory-topk 32",
        beside=ULTRAMEM,
    ),
    "more ranks than numbers": Case(
        "--memory-tucker-rank 9 --memory-key-dim 16",
        "is larger than the 8 numbers of half a query",
        "--memory-tucker-rank 8",
        own="8",
        beside=f"{ULTRAMEM} --memory-key-dim 16",
    ),
    "parts of a row that kernels cannot load": Case(
        "--memory-value-dim 24 --memory-cores 2",
        "is not a multiple of 8 for each",
        "--memory-value-dim 32",
        beside=ULTRAMEM,
    ),
    "a group that does not divide the ranks": Case(
        "--memory-group-size 3", "does not divide the 4 ranks", "--memory-group-size 2", ranks=4
    ),
    "rows of peer are not cut": Case(
        "--memory-variant peer --memory-mode column",
        "needs complete rows",
        "--memory-mode row",
        beside="--memory-variant peer --memory-topk 2",
    ),
    "more ranks than blocks of columns": Case(
        "--memory-mode column",
        "each rank needs a block of 8 columns",
        "--memory-mode 2d --memory-column-ranks 2",
        beside="--memory-value-dim 16 --memory-group-size 4",
        ranks=4,
    ),
    "more ranks than blocks of columns, rows": Case(
        "--memory-mode column",
        "each rank needs a block of 8 columns",
        "--memory-mode row",
        beside="--memory-value-dim 16 --memory-group-size 4",
        ranks=4,
    ),
    "column ranks that do not divide the group": Case(
        "--memory-column-ranks 3 --memory-group-size 4",
        "does not divide --memory-group-size",
        "--memory-column-ranks 2",
        beside="--memory-mode 2d --memory-group-size 4",
        ranks=4,
    ),
    "a grid that does not divide the ranks": Case(
        "--memory-grid 1x3x1x1",
        "which do not divide the 4 ranks of a pipeline stage",
        "--memory-grid 1x2x1x1",
        own="1x2x1x1",
        ranks=4,
    ),
    "a grid with more column ranks than blocks": Case(
        "--memory-grid 1x2x1x2",
        "each rank needs a block of 8 columns",
        "--memory-grid 2x1x2x1",
        beside="--memory-value-dim 16",
        ranks=4,
    ),
    "rows of peer are not cut by a grid": Case(
        "--memory-grid 1x2x1x1",
        "splits rows, but --memory-variant peer needs complete rows",
        "--memory-grid 2x1x1x1",
        beside="--memory-variant peer --memory-topk 2",
        ranks=2,
    ),
    "more pieces than tokens": Case(
        "--memory-pieces 4096", "is more than the 64 tokens of a microbatch", "--memory-pieces 64"
    ),
    "a hidden size that is no width": Case(
        "--hidden-size 60",
        "is not a multiple of 8",
        "--memory-value-dim 64",
        beside="--hidden-size 60",
    ),
    "a hidden size that is no width, changed": Case(
        "--hidden-size 60", "is not a multiple of 8", "--hidden-size 64"
    ),
    "a hidden size that is no width, without projection": Case(
        "--hidden-size 60",
        "is not a multiple of 8",
        "--memory-variant memory+ --memory-value-dim 64",
        beside="--hidden-size 60 --memory-variant memory",
    ),
    "a width without projection": Case(
        "--memory-value-dim 32 --memory-variant memory",
        "has no projection",
        "--memory-variant memory+",
        beside="--memory-value-dim 32",
    ),
    "a width without projection, dropped": Case(
        "--memory-value-dim 32 --memory-variant memory",
        "drop --memory-value-dim",
        "",
        beside="--memory-variant memory",
    ),
    "a layer out of range": Case("--memory-layers 4", "counted from 0", "--memory-layers 3"),
    "no feed-forward": Case(
        "--memory-layers 0",
        "is no feed-forward",
        "--memory-layers 1",
        beside="--hybrid-layer-pattern *-*- --num-layers HYBRID",
    ),
    "no feed-forwards at all": Case(
        "--memory-layers 1 --hybrid-layer-pattern ****",
        "has none; add some (-)",
        "--hybrid-layer-pattern *-*-",
        beside="--memory-layers 1 --num-layers HYBRID",
        own="*-*-",
    ),
    "a constant rate of its own": Case(
        "--memory-lr-schedule constant",
        "needs a learning rate",
        "--memory-lr 0.001",
        beside="--memory-lr-schedule constant",
    ),
    "stochastic rounding": Case(
        "--memory-stochastic-rounding",
        "rounds to bf16",
        "--bf16",
        beside="--memory-stochastic-rounding",
    ),
    "stochastic rounding, dropped": Case(
        "--memory-stochastic-rounding", "drop --memory-stochastic-rounding", ""
    ),
}
SHARDED = "--use-distributed-optimizer"
ENGINE = "--transformer-impl transformer_engine"
FP8 = f"{ENGINE} --fp8-format hybrid --bf16"
EXPERTS = "--num-experts 2 --moe-layer-freq 2 --moe-router-topk 1 --disable-bias-linear"

# the file of --heterogeneous-layers-config-path
LAYERS = {
    **{"hidden_act": "silu", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4},
    **{"tie_word_embeddings": False, "rope_theta": 10000, "rope_scaling": {"factor": 8.0}},
    "block_configs": [{"attention": {"n_heads_in_group": 2}}],
}

FEATURES = {
    "context parallelism with a convolution before queries": Case(
        "--context-parallel-size 2 --memory-query-conv 3",
        "a rank then holds two pieces",
        "",
        ranks=2,
        beside=f"{ULTRAMEM} {ENGINE}",
    ),
    "several documents in a sequence that do not see each other, with a convolution before "
    "queries": Case(
        "--reset-attention-mask --memory-query-conv 3",
        "would see tokens of the document before",
        "--reset-attention-mask",
        beside=ULTRAMEM,
    ),
    "the same in other units, or with the later layer on another stage": Case(
        "--memory-skip 1",
        "recomputes the two at different times",
        "--recompute-method uniform --recompute-num-layers 4",
        beside=f"{ULTRAMEM} --memory-skip 1 --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
        memory=LAYERS_THAT_SKIP,
    ),
    "the same with recomputation of feed-forwards or norms": Case(
        "--memory-skip 1 --recompute-modules mlp",
        "without the one behind which",
        "--recompute-modules core_attn",
        own="core_attn",
        beside=f"{ULTRAMEM} --memory-skip 1 --recompute-granularity selective",
        memory=LAYERS_THAT_SKIP,
    ),
    "the same where Megatron computes layers in an order of its own": Case(
        "--memory-skip 1 --mlp-chunks-for-training 2",
        "in their order",
        "",
        beside=ULTRAMEM,
        memory=LAYERS_THAT_SKIP,
    ),
    "tables that memory layers of different stages share": Case(
        "--memory-share-layers 2",
        "on different pipeline stages",
        "--memory-layers 0 1",
        own="0 1",
        ranks=2,
        beside=f"{ULTRAMEM} --memory-share-layers 2 --pipeline-model-parallel-size 2",
    ),
    "Megatron's FSDP": Case(
        "--use-megatron-fsdp --ckpt-format fsdp_dtensor",
        "all of it on every rank",
        SHARDED,
        shown="--use-megatron-fsdp",
        ranks=2,
    ),
    "FSDP2 of torch before Megatron-Core 0.19": Case(
        "--use-torch-fsdp2",
        "fails with it",
        SHARDED,
        ranks=2,
        beside="--untie-embeddings-and-output-weights",
    ),
    "weights sharded over further ranks": Case(
        "--tensor-parallel-num-weight-shards 2", "keep complete", "", ranks=2, beside=ENGINE
    ),
    "experts made of a dense checkpoint at start": Case(
        "--moe-use-upcycling",
        "is neither",
        "--moe-use-upcycling",
        beside=f"{EXPERTS} --save DIR/new --save-interval 1",
        memory=(MEMORY, ""),
    ),
    "hybrid models with Megatron-Core 0.17": Case(
        "--hybrid-layer-pattern *-*-",
        "no HybridModel",
        "--num-layers 4",
        own="4",
        beside="--num-layers HYBRID",
    ),
    "layers of different configurations": Case(
        "--heterogeneous-layers-config-path DIR/layers.json",
        "its own configuration",
        "",
        beside="--swiglu --normalization RMSNorm --group-query-attention --num-query-groups 2 "
        "--use-rope-scaling --use-rotary-position-embeddings --untie-embeddings-and-output-weights",
    ),
    "layers for inference": Case("--transformer-impl inference_optimized", "fused layers", ENGINE),
    "recomputation of norms in fp8 or fp4": Case(
        "--recompute-modules layernorm core_attn --fp8-format hybrid",
        "saves the input",
        "--recompute-modules core_attn",
        own="core_attn",
        beside=f"{FP8} --recompute-granularity selective",
    ),
    "recomputation of feed-forwards in fp8 or fp4": Case(
        "--recompute-modules mlp --fp8-format hybrid",
        "contain layers of its own",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        own="--recompute-method uniform --recompute-num-layers 1",
        beside=f"{FP8} --recompute-granularity selective",
    ),
    "CUDA graphs of anything else": Case(
        "--cuda-graph-impl transformer_engine --cuda-graph-modules attn mlp",
        "captured",
        "--cuda-graph-impl transformer_engine --cuda-graph-modules attn",
        beside=ENGINE,
    ),
    "the same with a memory in the last layer": Case(
        "--memory-layers 2 3",
        "final norm only after a layer of experts",
        "--memory-layers 1 2",
        own="1 2",
        beside=f"{EXPERTS} --expert-model-parallel-size 2 --bf16 "
        "--moe-token-dispatcher-type alltoall --overlap-moe-expert-parallel-comm",
        ranks=2,
    ),
    "tensor-parallel communication fused for inference": Case(
        "--inference-fuse-tp-communication", "linear layers of an MLP", "", beside=ENGINE
    ),
    "settings of Megatron in a file": Case("--yaml-cfg DIR/settings.yaml", "ignores all flags", ""),
    "sparse finetuning of a model whose experts have biases": Case(
        "--moe-router-enable-expert-bias",
        "at every step",
        "",
        beside=f"{EXPERTS} --memory-layers 1 --memory-finetune-rows 9 --memory-optimizer sgd "
        "--moe-router-score-function sigmoid",
    ),
    "other formats": Case(
        "--ckpt-format torch",
        "by rows",
        "--ckpt-format torch_dist",
        beside="--save DIR/new --save-interval 1",
    ),
    "conversion to other formats": Case(
        "--ckpt-convert-format torch",
        "state of its optimizer",
        "",
        beside="--load DIR/memory --save DIR/new --save-interval 1 --ckpt-convert-save DIR/torch",
    ),
}
DATA = {
    "a suffix": Case("--data-path DIR/facts.idx", "without its suffix", "--data-path DIR/facts"),
    "a prefix that is nearly right": Case(
        "--data-path DIR/fact", "did you mean", "--data-path DIR/facts"
    ),
    "no such dataset": Case(
        "--data-path DIR/none/x",
        "give the path of the dataset's two files",
        "--data-path DIR/facts",
        own="DIR/facts",
    ),
    "a weight that is missing": Case(
        "--data-path 0.5 DIR/facts DIR/facts",
        "a weight before each prefix or before none",
        "--data-path DIR/facts DIR/facts",
        own="DIR/facts",
        shown="--data-path 0.5",
    ),
    "a file of datasets that is not there": Case(
        "--data-args-path DIR/none.txt",
        "cannot be read",
        "--data-args-path DIR/blend.txt",
        own="DIR/blend.txt",
    ),
    "a file of datasets with half a weight": Case(
        "--per-split-data-args-path DIR/half.json",
        "cannot read DIR/facts 0.5",
        "",
        shown="--per-split-data-args-path DIR/half.json",
        beside="--per-split-data-args-path DIR/half.json",
        mend=lambda folder: _splits(folder, "half", [0.5, f"{folder}/facts"]),
    ),
    "a file of datasets without keys": Case(
        "--per-split-data-args-path DIR/keys.json",
        "train, valid, test",
        "",
        beside="--per-split-data-args-path DIR/keys.json",
        mend=lambda folder: _splits(folder, "keys", [f"{folder}/facts"]),
    ),
}


def _splits(folder: Path, name: str, train: list[Any]) -> None:
    text = json.dumps({"train": train, "valid": None, "test": None})
    (folder / f"{name}.json").write_text(text)


def _write(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


# name of a dataset -> what is done to one of its files, and what is said
DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "foreign": (".idx", lambda path: _write(path, 0, b"PK"), "not an index of Megatron"),
    "short": (".idx", lambda path: _cut(path, 20), "it has only 20 bytes; build it again"),
    "newer": (".idx", lambda path: _write(path, 9, b"\2"), "has version 2, but Megatron reads 1"),
    "unknown": (".idx", lambda path: _write(path, 17, b"\x63"), "unknown token type 99"),
    "empty": (".idx", lambda path: _write(path, 18, bytes(8)), "has no sequences; build it"),
    "cut": (".idx", lambda path: _cut(path, path.stat().st_size - 1), "bytes; build it again"),
    "lost": (".bin", Path.unlink, "there is no DIR/lost.bin"),
    "incomplete": (".bin", lambda path: _cut(path, 3), "build or copy both files again"),
}


def _dataset(prefix: Path) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    builder.add_document(torch.arange(8), [3, 5])
    builder.finalize(f"{prefix}.idx")


def _rebuilt(name: str) -> Callable[[Path], None]:
    return lambda folder: _dataset(folder / name)


for name, (_, _, says) in DAMAGE.items():
    path = f"--data-path DIR/{name}"
    DATA[name] = Case(path, says, path, mend=_rebuilt(name))

# settings of the saved models, beside those of the usual command line
SAVED_MODELS: dict[str, dict[str, Any]] = {
    "memory": {},
    "peer": {"memory_variant": "peer", "memory_pool": "layer"},
    "kept": {"memory_keep_ffn": True},
    "placed": {"memory_placement_seed": 5},
}
LOAD = "--load DIR/memory"
CHECKPOINTS = {
    "a setting that differs": Case(
        "--memory-topk 2", "differs from 4", "--memory-topk 4", beside=LOAD
    ),
    "a flag that was not given": Case(
        "--load DIR/kept", "was trained with it; add", "--memory-keep-ffn", beside="--load DIR/kept"
    ),
    "a flag that was not needed": Case(
        "--memory-keep-ffn", "trained without it; drop", "", beside=LOAD
    ),
    "a newer format": Case(
        "--load DIR/newer",
        "install a newer megamem",
        "",
        beside="--load DIR/newer",
        mend=lambda folder: _renew(folder),
    ),
    "no memory layers": Case(
        "--load DIR/memory",
        "is not given",
        "",
        beside=LOAD,
        memory=("", MEMORY),
    ),
    "a dense model": Case(
        "--load DIR/dense --memory-layers 1 2",
        "without memory layers",
        "--load DIR/memory",
        own="DIR/memory",
    ),
    "a dense model, without --load": Case(
        "--load DIR/dense --memory-layers 1 2", "start without --load", ""
    ),
    "a dense model, without memory": Case(
        "--load DIR/dense --memory-layers 1 2",
        "drop the --memory flags",
        "--load DIR/dense",
        memory=(MEMORY, ""),
    ),
    "another variant": Case(
        "--memory-variant peer",
        "reads values and tables",
        "--memory-variant memory+",
        beside="--load DIR/bare_memory --memory-topk 4",
    ),
    "another pool": Case(
        "--memory-pool layer",
        "reads layer_1, layer_2",
        "--memory-pool shared",
        beside="--load DIR/bare_memory",
    ),
    "a pool for each layer": Case(
        "--memory-pool shared",
        "reads shared",
        "--memory-pool layer --memory-layers 1 2",
        beside="--load DIR/bare_peer --memory-variant peer",
    ),
    "another number of sub-keys": Case(
        "--memory-num-keys 8",
        "means 64 rows",
        "--memory-num-keys 16",
        beside="--load DIR/bare_memory",
    ),
    "another width of rows": Case(
        "--memory-value-dim 32",
        "means rows of that width",
        "--memory-value-dim 64",
        beside="--load DIR/bare_memory",
    ),
    "another hidden size": Case(
        "--hidden-size 32",
        "means rows of that width",
        "--hidden-size 64",
        beside="--load DIR/bare_memory",
    ),
    "other layers": Case(
        "--memory-layers 3",
        "is no memory layer in",
        "--memory-layers 1 2",
        beside="--load DIR/bare_memory",
    ),
    "other heads": Case(
        "--memory-heads 4 --memory-key-dim 16",
        "differs from layer 1",
        "--memory-heads 2 --memory-key-dim 32",
        beside="--load DIR/bare_memory",
    ),
    "another placement": Case(
        "--memory-placement-seed 0",
        "placed the rows",
        "--memory-placement-seed 5",
        beside="--load DIR/bare_placed",
    ),
    "another optimizer": Case(
        "--memory-optimizer lazy_adamw --load DIR/trained",
        "needs",
        "--no-load-optim",
        beside="--memory-optimizer lazy_adamw --load DIR/trained",
    ),
    "another optimizer, changed": Case(
        "--memory-optimizer adamw --load DIR/trained",
        "needs",
        "--memory-optimizer sgd",
        beside="--load DIR/trained",
    ),
    "a damaged file": Case(
        "--load DIR/damaged",
        "is missing",
        "--ckpt-step 1",
        own="1",
        beside="--load DIR/damaged --no-load-optim",
    ),
    "a damaged index": Case(
        "--load DIR/unreadable",
        "cannot be read",
        "--ckpt-step 1",
        own="1",
        beside="--load DIR/unreadable --no-load-optim",
    ),
    "an iteration that is not there": Case(
        "--load DIR/damaged --ckpt-step 7",
        "does not exist",
        "--ckpt-step 1",
        own="1",
        beside="--load DIR/damaged --no-load-optim",
        shown="--load DIR/damaged",
    ),
    "another format": Case(
        "--load DIR/legacy",
        "no checkpoint of format torch_dist",
        "--ckpt-convert-format torch_dist --ckpt-convert-save DIR/new",
        own="DIR/new",
        beside="--load DIR/legacy --save DIR/new --save-interval 1",
        memory=(MEMORY, ""),
    ),
    "a background that is not there": Case(
        "--memory-background DIR/none",
        "holds no checkpoint",
        "--memory-background DIR/trained",
        own="DIR/trained",
        beside="--memory-finetune-rows 9 --memory-optimizer sgd",
    ),
    "a damaged background": Case(
        "--memory-background DIR/unreadable",
        "give another checkpoint",
        "--memory-background DIR/trained",
        own="DIR/trained",
        beside="--memory-finetune-rows 9 --memory-optimizer sgd",
    ),
    "a background without counts": Case(
        "--memory-background DIR/memory",
        "has no read counts",
        "--load DIR/trained",
        own="DIR/trained",
        beside="--memory-finetune-rows 9 --memory-optimizer sgd",
    ),
    "a background of another table": Case(
        "--memory-background DIR/trained --memory-num-keys 8",
        "has read counts for 256 rows",
        "--memory-background DIR/trained",
        own="DIR/trained",
        beside="--memory-finetune-rows 9 --memory-optimizer sgd",
    ),
}
CASES = {
    name: case
    for table in (FLAGS_OF_CONFIG, FLAGS_OF_A_MODEL, FEATURES, DATA, CHECKPOINTS)
    for name, case in table.items()
}


def _model(**changes: Any) -> MemoryConfig:
    usual = _flags(MEMORY)
    numbers = {name: [int(word) for word in words] for name, words in usual.items()}
    settings: dict[str, Any] = {
        name.removeprefix("--").replace("-", "_"): values
        if name == "--memory-layers"
        else values[0]
        for name, values in numbers.items()
    }
    return MemoryConfig(**settings | changes)


def _save(
    folder: Path, wanted: MemoryConfig | None, *, settings: bool, state: bool = False
) -> None:
    """Write a checkpoint with the shapes of a model, or of one without memory layers."""
    tensors = {saved_model.EMBEDDING: torch.zeros(128, MODEL["--hidden-size"])}
    spec = None
    if wanted is not None:
        spec = resolve(wanted, MODEL["--hidden-size"])
        for table in saved_model.table_names(spec):
            tensors[table_key(table)] = torch.zeros(spec.num_rows, spec.value_dim)
            tensors[placement_key(table)] = torch.tensor(spec.placement_seed)
            if state:
                tensors[state_key(table, HITS)] = torch.zeros(spec.num_rows)
        for layer in spec.layers:
            shape = (2, spec.heads, spec.num_keys, spec.key_dim // 2)
            tensors[sub_keys_key(layer)] = torch.zeros(shape)
    torch_dist.write(
        folder,
        {key: of_tensor(tensor) for key, tensor in tensors.items()},
        [],
        lambda count: None,
        settings_of(spec) if settings and spec is not None else None,
    )


def _as_iterations(folder: Path, *steps: int) -> list[Path]:
    """Make a converted checkpoint one that a run has saved, at these steps."""
    made = []
    for step in steps:
        made.append(folder / f"iter_{step:07d}")
        shutil.copytree(folder / torch_dist.RELEASE, made[-1])
    shutil.rmtree(folder / torch_dist.RELEASE)
    (folder / torch_dist.TRACKER).write_text(str(steps[-1]))
    return made


def _renew(folder: Path) -> None:
    """What a newer megamem, which reads this format, would do."""
    path = folder / "newer/release/common.pt"
    common = torch.load(path, weights_only=False)
    common[SAVED]["format"] = FORMAT
    torch.save(common, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the cases name."""
    root = tmp_path_factory.mktemp("advice")
    _dataset(root / "facts")
    (root / "blend.txt").write_text(f"1 {root}/facts")
    _splits(root, "half", [f"{root}/facts", 0.5])
    (root / "keys.json").write_text("{}")
    for name, (suffix, harm, _) in DAMAGE.items():
        _dataset(root / name)
        harm(root / f"{name}{suffix}")
    for name, changes in SAVED_MODELS.items():
        _save(root / name, _model(**changes), settings=True)
        _save(root / f"bare_{name}", _model(**changes), settings=False)
    _save(root / "dense", None, settings=False)
    _save(root / "trained", _model(), settings=True, state=True)
    _as_iterations(root / "trained", 1)
    _save(root / "newer", _model(), settings=True)
    common = torch.load(root / "newer/release/common.pt", weights_only=False)
    common[SAVED]["format"] = FORMAT + 1
    torch.save(common, root / "newer/release/common.pt")
    for name in ("damaged", "unreadable"):
        _save(root / name, _model(memory_optimizer="sgd"), settings=True)
        latest = _as_iterations(root / name, 1, 2)[-1]
        if name == "damaged":
            next(latest.glob("*.distcp")).unlink()
        else:
            (latest / ".metadata").write_bytes(b"not a pickle")
    (root / "legacy/iter_0000001/mp_rank_00").mkdir(parents=True)
    torch.save({}, root / "legacy/iter_0000001/mp_rank_00/model_optim_rng.pt")
    (root / "legacy" / torch_dist.TRACKER).write_text("1")
    (root / "settings.yaml").write_text("num_layers: 4")
    (root / "layers.json").write_text(json.dumps(LAYERS))
    return root


@pytest.fixture(scope="module")
def refusal() -> Iterator[Callable[..., str]]:
    """A function of a command line and the number of its ranks that returns why it is refused."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    arguments.add_megatron_arguments(memory_arguments.add_memory_flags(parser))
    with pytest.MonkeyPatch.context() as change:
        # a training run is not wanted, only its checks
        change.setattr(patches, "install_memory", lambda: None)
        change.setattr(patches, "replace", lambda *rest: None)
        # what Megatron validates is not whether this machine has a GPU and Transformer Engine
        change.setattr(arguments, "is_te_min_version", lambda *rest, **more: True)
        change.setattr(torch.cuda, "get_device_capability", lambda *rest: (9, 0))
        change.setattr(arguments, "get_device_arch_version", lambda: 9)
        validate = patches._validate(arguments.validate_args)

        def why(words: str, ranks: int = 1) -> str:
            change.setenv("WORLD_SIZE", str(ranks))
            # Megatron wants one connection under context parallelism, and more with FSDP
            connections = "1" if "--context-parallel-size" in words else "8"
            change.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
            args = parser.parse_args(words.split())
            args.world_size, args.rank = ranks, 0
            try:
                if args.yaml_cfg:
                    change.setattr(sys, "argv", ["pretrain_gpt.py", *words.split()])
                    patches._refuse_yaml(lambda path: argparse.Namespace())(args.yaml_cfg)
                args = validate(args)
                spec = memory_arguments.run_spec(args)
                ConfigurationError.collect(saved_model.checkpoint_problems(spec, args))
            except ConfigurationError as error:
                return str(error)
            return ""

        yield why


def _command(case: Case, number: int, folder: Path) -> str:
    sizes = MODEL | TRAINING | {"--global-batch-size": 2 * case.ranks}
    usual = " ".join(str(word) for pair in sizes.items() for word in pair)
    words = f"{case.memory[number]} {case.beside} {(case.given, case.instead)[number]}"
    if "data" not in words:
        words = f"--mock-data {words}"
    layers = words.rpartition("--num-layers HYBRID")
    if layers[1]:
        usual = usual.replace("--num-layers 4", "")
        words = f"{layers[0]}{layers[2]}"
    return f"{usual} {' '.join(SWITCHES)} {LOCAL} {words}".replace("DIR", str(folder))


@pytest.fixture(scope="module")
def told(refusal, folder: Path) -> dict[str, str]:
    """Name of a case -> why its first command line is refused, before any file is mended."""
    found = {}
    for name, case in CASES.items():
        with pytest.MonkeyPatch.context() as change:
            if name.endswith("0.17"):
                change.setattr(compat, "HybridModel", None)
            if name.endswith("0.19"):
                change.setattr(compat, "RUNS_TORCH_FSDP2", False)
            found[name] = refusal(_command(case, 0, folder), case.ranks)
    return found


@pytest.mark.parametrize("name", CASES)
def test_advice_leads_out(name: str, told: dict[str, str], refusal, folder: Path) -> None:
    case = CASES[name]
    said = told[name]
    assert case.says.replace("DIR", str(folder)) in said
    shown = case.given if case.shown is None else case.shown
    for flag, values in _flags(shown.replace("DIR", str(folder))).items():
        assert " ".join([flag, *values]) in said
    # a few sentences are nothing but advice
    advice = said.partition(";")[2] or said
    given = _flags(f"{case.beside} {case.given}")
    for flag, values in _flags(case.instead).items():
        # those that the user has to find, and those that stay
        known = [*case.own.split(), *(values if given.get(flag) == values else [])]
        for word in [*([] if flag in [*given, *known] else [flag]), *values]:
            assert word in known or word.replace("DIR", str(folder)) in advice
    if case.mend is not None:
        case.mend(folder)
    after = refusal(_command(case, 1, folder), case.ranks)
    assert case.then in after if case.then else not after


def test_every_refused_feature_has_a_case() -> None:
    refused = {feature.name for feature in features.FEATURES if feature.state == "refused"}
    assert refused == FEATURES.keys()


def _sentences(module: ModuleType) -> Iterator[str]:
    """A pattern for each sentence of a module that ends in a full stop, or that it raises."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    raised = {
        argument
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and str(getattr(node.func, "id", "")).endswith("Error")
        for argument in node.args
    }
    described = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inner = {
        part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
    }
    for node in ast.walk(tree):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        texts = [getattr(part, "value", None) for part in parts if isinstance(part, ast.Constant)]
        if node in described | inner or not texts or not isinstance(texts[-1], str):
            continue
        if node in raised or (texts[-1].endswith(".") and " " in texts[-1]):
            yield ".*".join(re.escape(text) for text in texts)


def test_every_sentence_was_told(told: dict[str, str]) -> None:
    """Of the modules that only hold checks; features have a test of their own."""
    modules = (config, resolution, traffic, saved_settings, checks, data_checks, saved_model)
    patterns = [pattern for module in modules for pattern in _sentences(module)]
    # of local checkpoints, which test_local_checkpoints.py loads
    elsewhere = "--memory-optimizer sgd differs from adamw, whose state --load X holds; use "
    elsewhere += "--memory-optimizer adamw, or start with new optimizer state by --no-load-optim."
    texts = "\n".join([*told.values(), elsewhere])
    assert len(patterns) > 30
    assert not [each for each in patterns if not re.search(each, texts)]
