"""Reads consolidated checkpoints of facebookresearch/memory, the published implementation.

Their tensors, with N sub-keys per half, queries of width Q and rows of width V:

tok_embeddings, norm, output          one of each
layers.I.attention.{wq,wk,wv,wo}      rotary pairs are neighbours: (0, 1), (2, 3), ...
layers.I.feed_forward.{w1,w2,w3}      gate, down, up
layers.I.feed_forward.keys            [2 * heads * N, Q / 2], in the order head, half, sub-key
layers.I.feed_forward.values.weight   [N * N, V], repeated in every memory layer
layers.I.feed_forward.query_proj...   and swilu_projection (the gate), value_proj
PEER layers instead of values         values_u.weight and values_v.weight [N * N, hidden]
"""

import math
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megamem.config import ConfigurationError, MemoryConfig
from megamem.layers.variants import VARIANTS
from megamem.resolution import resolve
from megamem.spec import MemorySpec
from megamem.tools.convert.safetensors import read_files

EMBEDDING, NORM, OUTPUT = "tok_embeddings.weight", "norm.weight", "output.weight"
QUERIES, KEYS, VALUES = (f"attention.{name}.weight" for name in ("wq", "wk", "wv"))
ATTENTION_OUT, ATTENTION_NORM = "attention.wo.weight", "attention_norm.weight"
FFN_NORM = "ffn_norm.weight"
GATE, DOWN, UP = (f"feed_forward.{name}.weight" for name in ("w1", "w2", "w3"))
SUB_KEYS, TABLE = "feed_forward.keys", "feed_forward.values.weight"
EXPERTS_U, EXPERTS_V = (f"feed_forward.values_{name}.weight" for name in "uv")
QUERY = "feed_forward.query_proj.query_mlps.0."
OUT_GATE, OUT_PROJ = "feed_forward.swilu_projection.", "feed_forward.value_proj."
GATED = (OUT_GATE, OUT_PROJ)
LINEARS = (QUERY, *GATED)
LAYER = re.compile(r"layers\.(\d+)\.(.+)")
UNSUPPORTED = {"feed_forward.gating.": "a scalar gate of a memory layer's output"}
# buffers that every model computes itself
IGNORED = re.compile(r"(rope\.)?freqs_cis|rope\..*")


def read_reference(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of the files, memory-mapped; no code in the files is executed.

    Raises:
        ConfigurationError: a file cannot be read, or contains other objects than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise ConfigurationError(f"{file} is not a file; name the consolidated .pth files.")
        found = read_files([file])[0] if file.suffix == ".safetensors" else read_torch(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ConfigurationError(f"{file} contains {twice[0]}, and so does another file.")
        tensors |= found
    return tensors


def read_torch(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigurationError(
            f"{file} contains other objects than tensors, and loading it would run code in it, "
            "which megamem convert never does; save its state dict again with torch.save."
        ) from error
    except Exception as error:  # a damaged file may raise any exception
        raise ConfigurationError(
            f"{file} was not written by torch.save or is damaged ({type(error).__name__}: {error})."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    strange = [
        name
        for name, value in (content.items() if isinstance(content, dict) else ())
        if not isinstance(value, Tensor)
    ]
    if not isinstance(content, dict) or strange:
        what = f"its {strange[0]} is not a tensor" if strange else "it is not a dictionary"
        raise ConfigurationError(f"{file} is not a consolidated checkpoint: {what}.")
    return content


def layers_of(source: dict[str, Tensor]) -> dict[int, list[str]]:
    """Layer -> the names of its weights.

    Raises:
        ConfigurationError: a key is unknown, or a layer or a weight is missing.
    """
    layers: dict[int, list[str]] = {}
    unknown = []
    known = {QUERIES, KEYS, VALUES, ATTENTION_OUT, ATTENTION_NORM, FFN_NORM, GATE, DOWN, UP}
    known |= {SUB_KEYS, TABLE, EXPERTS_U, EXPERTS_V}
    known |= {prefix + part for prefix in LINEARS for part in ("weight", "bias")}
    for key in source:
        match = LAYER.fullmatch(key)
        rest = match[2] if match else key
        for prefix, what in UNSUPPORTED.items():
            if rest.startswith(prefix):
                raise ConfigurationError(f"{key} is {what}, which megamem does not support.")
        if match and rest in known:
            layers.setdefault(int(match[1]), []).append(rest)
        elif key not in (EMBEDDING, NORM, OUTPUT) and not IGNORED.fullmatch(key):
            unknown.append(key)
    if unknown:
        raise ConfigurationError(
            f"{len(unknown)} keys do not belong to a consolidated checkpoint with memory layers: "
            f"{', '.join(sorted(unknown)[:3])}{', ...' if len(unknown) > 3 else ''}."
        )
    ordered = dict(sorted(layers.items()))
    # either all memory layers are PEER layers, or none is
    experts = any(name in (EXPERTS_U, EXPERTS_V) for names in ordered.values() for name in names)
    missing = [key for key in (EMBEDDING, NORM) if key not in source]
    missing += [f"layers.{n}" for n in range(len(ordered)) if n not in ordered]
    for layer, names in ordered.items():
        if experts and (strange := [n for n in names if n.startswith((TABLE, *GATED))]):
            raise ConfigurationError(
                f"layers.{layer}.{strange[0]} is beside the tables of a PEER layer (values_u and "
                "values_v), but megamem's PEER has no other table, no gate and no projection."
            )
        needed = {QUERIES, KEYS, VALUES, ATTENTION_OUT, ATTENTION_NORM, FFN_NORM}
        if SUB_KEYS in names:
            needed |= {EXPERTS_U, EXPERTS_V} if experts else {TABLE}
            needed |= {QUERY + "weight", QUERY + "bias"}
            if any(name.startswith(GATED) for name in names):
                needed |= {prefix + part for prefix in GATED for part in ("weight", "bias")}
        else:
            needed |= {GATE, DOWN, UP}
        missing += [f"layers.{layer}.{name}" for name in sorted(needed - set(names))]
    if missing:
        raise ConfigurationError(
            f"the checkpoint lacks {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; "
            "if it consists of several files, name all of them."
        )
    return ordered


@dataclass(frozen=True)
class ReferenceShape:
    """The sizes of a model, from the shapes of its tensors."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    ffn: int | None
    num_keys: int
    memory_heads: int
    key_dim: int
    value_dim: int
    variant: Literal["memory", "memory+", "peer"]

    @classmethod
    def of(
        cls,
        source: dict[str, Tensor],
        layers: dict[int, list[str]],
        memories: list[int],
        heads: int,
    ) -> "ReferenceShape":
        """Read the sizes off the tensors.

        Raises:
            ConfigurationError: shapes contradict each other, or the number of heads.
        """
        first = f"layers.{memories[0]}."
        vocabulary, hidden = source[EMBEDDING].shape
        queries, keys = source[f"{first}{QUERIES}"].shape[0], source[f"{first}{KEYS}"].shape[0]
        if heads < 1 or queries % heads or keys % (queries // heads):
            raise ConfigurationError(
                f"--num-attention-heads {heads} does not divide queries of width {queries} and "
                f"keys of width {keys} into heads; use the number of the model's training run."
            )
        experts = first + EXPERTS_V in source
        table = first + (EXPERTS_V if experts else TABLE)
        rows, value_dim = source[table].shape
        num_keys = math.isqrt(rows)
        sub_keys, half = source[first + SUB_KEYS].shape
        if num_keys**2 != rows or sub_keys % (2 * num_keys):
            raise ConfigurationError(
                f"{table} with {rows} rows and {first}{SUB_KEYS} with {sub_keys} contradict each "
                "other: for N sub-keys per half they must have N * N and 2 * heads * N rows."
            )
        dense = [layer for layer in layers if layer not in memories]
        ffn = source[f"layers.{dense[0]}.{GATE}"].shape[0] if dense else None
        gated = f"{first}{OUT_GATE}weight" in source
        shape = cls(
            vocabulary=vocabulary,
            hidden=hidden,
            layers=len(layers),
            heads=heads,
            groups=keys // (queries // heads),
            head_dim=queries // heads,
            ffn=ffn,
            num_keys=num_keys,
            memory_heads=sub_keys // (2 * num_keys),
            key_dim=2 * half,
            value_dim=value_dim,
            variant="peer" if experts else "memory+" if gated else "memory",
        )
        shape._check(source, layers)
        return shape

    def _check(self, source: dict[str, Tensor], layers: dict[int, list[str]]) -> None:
        hidden, width = self.hidden, self.heads * self.head_dim
        keys, query = self.groups * self.head_dim, self.memory_heads * self.key_dim
        expected = {
            QUERIES: (width, hidden),
            KEYS: (keys, hidden),
            VALUES: (keys, hidden),
            ATTENTION_OUT: (hidden, width),
            ATTENTION_NORM: (hidden,),
            FFN_NORM: (hidden,),
            GATE: (self.ffn, hidden),
            UP: (self.ffn, hidden),
            DOWN: (hidden, self.ffn),
            SUB_KEYS: (2 * self.memory_heads * self.num_keys, self.key_dim // 2),
            TABLE: (self.num_keys**2, self.value_dim),
            EXPERTS_U: (self.num_keys**2, self.value_dim),
            EXPERTS_V: (self.num_keys**2, self.value_dim),
            QUERY + "weight": (query, hidden),
            QUERY + "bias": (query,),
            OUT_GATE + "weight": (self.value_dim, hidden),
            OUT_GATE + "bias": (self.value_dim,),
            OUT_PROJ + "weight": (hidden, self.value_dim),
            OUT_PROJ + "bias": (hidden,),
        }
        wanted = {
            f"layers.{layer}.{name}": expected[name]
            for layer, names in layers.items()
            for name in names
        }
        wanted |= {NORM: (hidden,), EMBEDDING: (self.vocabulary, hidden)}
        if OUTPUT in source:
            wanted[OUTPUT] = (self.vocabulary, hidden)
        ConfigurationError.collect(
            [
                f"{key} has shape {list(source[key].shape)}, but must have {list(shape)}."
                for key, shape in wanted.items()
                if tuple(source[key].shape) != shape
            ][:5]
        )

    def spec(self, layers: list[int], separate: bool) -> MemorySpec:
        """The settings of the memory layers; topk, which no shape tells, is only a default.

        Raises:
            ConfigurationError: megamem does not support these sizes.
        """
        config = MemoryConfig(
            memory_layers=layers,
            memory_variant=self.variant,
            memory_num_keys=self.num_keys,
            memory_heads=self.memory_heads,
            memory_topk=min(VARIANTS[self.variant].topk, self.num_keys),
            memory_key_dim=self.key_dim,
            memory_value_dim=self.value_dim,
            memory_pool="layer" if separate else "shared",
        )
        return resolve(config, self.hidden)

    def flags(self, spec: MemorySpec, untied: bool, seed: int) -> list[str]:
        """The flags of a run that loads the converted checkpoint."""
        groups = ["--group-query-attention", f"--num-query-groups {self.groups}"]
        layers = " ".join(map(str, spec.layers))
        return [
            f"--num-layers {self.layers}",
            f"--hidden-size {self.hidden}",
            *([f"--ffn-hidden-size {self.ffn}"] if self.ffn else []),
            f"--num-attention-heads {self.heads}",
            *(groups if self.groups != self.heads else []),
            *(
                [f"--kv-channels {self.head_dim}"]
                if self.head_dim * self.heads != self.hidden
                else []
            ),
            *("--swiglu", "--normalization RMSNorm", "--disable-bias-linear"),
            "--position-embedding-type rope",
            *(["--untie-embeddings-and-output-weights"] if untied else []),
            f"--memory-layers {layers}",
            f"--memory-variant {spec.variant}",
            f"--memory-num-keys {spec.num_keys}",
            f"--memory-heads {spec.heads}",
            f"--memory-key-dim {spec.key_dim}",
            f"--memory-value-dim {spec.value_dim}",
            f"--memory-pool {spec.pool}",
            *([f"--memory-placement-seed {seed}"] if seed else []),
        ]
