"""Reads checkpoints of the released code of UltraMem and UltraMemV2.

It is ZihaoHuang-notabot/Ultra-Sparse-Memory-Network, which is built on OLMo. A checkpoint that is
not sharded is a folder with config.yaml and model.pt. Of the tensors in it, with H heads, n
sub-keys per side, keys of width C, A Tucker ranks, R rows and E virtual blocks, these are the
memories':

    transformer.mem_blocks.M.query_proj.weight        [2 C, D], with a query per rank [2 A C, D]
                            .keys                     [H, 2, n, C, A]
                            .tucker_core.O            [H, A, A], one for each core
                            .tucker_core_u, ..._v     [1, H, 1, A]
                            .query_norm, keys_norm    [C]
                            .shuffle_index            [n * n]: pair i * n + j -> block * R + row
                            .values_proj.weight       [D, V], or [D, E V]
                            .pre_values_proj.weight   [P, D], UltraMemV2 alone
                            .values_for_look_up       [R, V], UltraMem alone
    transformer.full_memory_layer.values_for_look_up, pre_values_for_look_up, UltraMemV2 alone: a
        ring of the rows of all memories, of which each reads R rows from its own first one on
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor

from megamem.config import ConfigurationError
from megamem.layers.tucker_keys import EPS
from megamem.tools.convert.reference_file import read_torch
from megamem.tools.convert.safetensors import read_files

CONFIG, WEIGHTS = "config.yaml", ("model.pt", "model.safetensors")
VARIANTS = {"ultramem_v1": "ultramem", "ultramem_v2": "ultramem-v2"}
EMBEDDING, FINAL_NORM = "transformer.wte.weight", "transformer.ln_f.weight"
OUTPUT = "transformer.ff_out.weight"
RING = "transformer.full_memory_layer."
VALUES, PRE_VALUES = "values_for_look_up", "pre_values_for_look_up"
ATTENTION = ("attn_norm", "att_proj", "attn_out")
FEED_FORWARD = ("ff_norm", "ff_proj", "ff_out")
QK_NORMS = ("q_norm", "k_norm")
BLOCK = re.compile(r"transformer\.blocks\.(\d+)\.(\w+)\.weight")
MEMORY = re.compile(r"transformer\.mem_blocks\.(\d+)\.(.+)")
MEMORY_WEIGHTS = (
    *("query_proj.weight", "keys", "values_proj.weight", "query_norm.weight", "keys_norm.weight"),
    *("shuffle_index", "tucker_core_u", "tucker_core_v"),
)

Queries = Literal["released", "ranks"]


@dataclass(frozen=True)
class Released:
    """A checkpoint of the released code."""

    model: dict[str, Any]
    """The settings of the model, from config.yaml."""
    weights: dict[str, Tensor]
    """By their names in the file."""

    def setting(self, name: str, default: Any) -> Any:
        """A setting; the default where the file has none."""
        found = self.model.get(name)
        return default if found is None else found

    def block(self, layer: int, name: str) -> Tensor:
        """A weight of a transformer block."""
        return self.weights[f"transformer.blocks.{layer}.{name}.weight"]

    def memory(self, number: int, name: str) -> Tensor:
        """A tensor of a memory."""
        return self.weights[f"transformer.mem_blocks.{number}.{name}"]

    def cores(self, number: int) -> list[Tensor]:
        """The cores of a memory."""
        prefix = f"transformer.mem_blocks.{number}.tucker_core."
        count = sum(name.startswith(prefix) for name in self.weights)
        return [self.weights[f"{prefix}{core}"] for core in range(count)]

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return 1 + max(int(m[1]) for name in self.weights if (m := BLOCK.fullmatch(name)))


def read_released(folder: Path) -> Released:
    """Read a folder; weights are memory-mapped, and no code in the files is executed.

    Raises:
        ConfigurationError: a file is missing or damaged, or the model has parts that a GPT of
            Megatron with memory layers does not have.
    """
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None or not (folder / CONFIG).is_file():
        raise ConfigurationError(
            f"{folder} does not hold {CONFIG} and {WEIGHTS[0]}; give the folder of a checkpoint "
            "that is not sharded, as scripts/unshard.py of the released code makes."
        )
    try:
        said = yaml.safe_load((folder / CONFIG).read_text())
        model = said.get("model", said)
        known = model["n_heads"], model["mem_type"], model["mem_knn"]
    except (yaml.YAMLError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{folder / CONFIG} is not the config of a model with memories "
            f"({type(error).__name__}: {error}); copy it from the run again."
        ) from error
    assert known
    weights = read_files([file])[0] if file.suffix == ".safetensors" else read_torch(file)
    found = Released(model, weights)
    ConfigurationError.collect(_problems(found)[:5])
    return found


def _problems(source: Released) -> list[str]:
    """A sentence for each part of a model that cannot be converted."""
    wanted = {
        "block_type": ("sequential",),
        "layer_norm_type": ("rms",),
        "activation_type": ("swiglu",),
        "include_bias": (False,),
        "layer_norm_eps": (EPS,),
        "rope": (True,),
        "mem_type": tuple(VARIANTS),
    }
    usual = {"include_bias": True, "layer_norm_eps": 1e-5, "rope": False}
    unsupported = {
        "norm_after": False,
        "clip_qkv": None,
        "scale_logits": False,
        "embedding_layer_norm": False,
        "mem_use_glu_act": False,
    }
    found = [
        f"{CONFIG} has {name}: {value}, but only {' or '.join(map(str, allowed))} can be converted."
        for name, allowed in wanted.items()
        if (value := source.setting(name, usual.get(name))) not in allowed
    ]
    found += [
        f"{CONFIG} has {name}: {value}, which a GPT of Megatron with memory layers does not have."
        for name, default in unsupported.items()
        if (value := source.setting(name, default)) != default
    ]
    return found or _strange_weights(source)


def _strange_weights(source: Released) -> list[str]:
    names, found = set(source.weights), []
    if not any(BLOCK.fullmatch(name) for name in names):
        return ["the checkpoint has no transformer.blocks, so it is not one of the released code."]
    qk = QK_NORMS if source.setting("attention_layer_norm", False) else ()
    wanted = {EMBEDDING, FINAL_NORM}
    wanted |= {
        f"transformer.blocks.{layer}.{name}.weight"
        for layer in range(source.layers)
        for name in (*ATTENTION, *qk, *FEED_FORWARD)
    }
    if not source.setting("weight_tying", True):
        wanted.add(OUTPUT)
    second = source.model["mem_type"] == "ultramem_v2"
    memories = {int(m[1]) for name in names if (m := MEMORY.fullmatch(name))}
    tables = (VALUES, PRE_VALUES) if second else (VALUES,)
    for number in range(len(memories)):
        own = [*MEMORY_WEIGHTS, "pre_values_proj.weight" if second else VALUES]
        own += [f"tucker_core.{core}" for core in range(len(source.cores(number)) or 1)]
        wanted |= {f"transformer.mem_blocks.{number}.{name}" for name in own}
    if second:
        wanted |= {RING + name for name in tables}
    if not memories:
        found.append("the checkpoint has no transformer.mem_blocks, so it has no memories.")
    if lacking := sorted(wanted - names):
        found.append(f"the checkpoint lacks {', '.join(lacking[:3])}; copy it again.")
    if unknown := sorted(names - wanted):
        found.append(
            f"the checkpoint has {', '.join(unknown[:3])}, which no released model with these "
            "settings has, so it cannot be converted."
        )
    return found


@dataclass(frozen=True)
class Memories:
    """The sizes of the memories, from the shapes of their tensors, and where they are."""

    variant: str
    layers: tuple[int, ...]
    """The layer that each reads."""
    skip: int
    """Layers between this one and the one after which its output is added."""
    heads: int
    sub_keys: int
    """n, per side."""
    width: int
    """C."""
    ranks: int
    cores: int
    blocks: int
    """E."""
    rows: int
    """R, of a memory."""
    value_width: int
    pre_value_width: int
    ring: int
    """Rows of the ring of UltraMemV2, or of a table."""
    per_layer: int
    """Rows by which the memories' first rows in the ring are apart."""
    block_projections: bool
    query_rows: int
    """Rows of query_proj."""

    @classmethod
    def of(cls, source: Released) -> "Memories":
        """Read the sizes.

        Raises:
            ConfigurationError: shapes contradict each other, or memories lie where megamem has
                none.
        """
        variant = VARIANTS[source.model["mem_type"]]
        layers, skip = _places(source, variant)
        heads, _, sub_keys, width, ranks = source.memory(0, "keys").shape
        second = variant == "ultramem-v2"
        table = source.weights[RING + VALUES] if second else source.memory(0, VALUES)
        ring = len(table)
        # where layers share rows, each knows only the number of its pairs of sub-keys
        side = _key_expansion(source, variant, ring)
        rows = (sub_keys // side) ** 2
        found = cls(
            variant=variant,
            layers=layers,
            skip=skip,
            heads=heads,
            sub_keys=sub_keys,
            width=width,
            ranks=ranks,
            cores=len(source.cores(0)),
            blocks=side**2,
            rows=rows,
            value_width=table.shape[1],
            pre_value_width=source.weights[RING + PRE_VALUES].shape[1] if second else 0,
            ring=ring,
            per_layer=ring // len(layers) if second else 0,
            block_projections=side > 1
            and source.memory(0, "values_proj.weight").shape[1] == side**2 * table.shape[1],
            query_rows=len(source.memory(0, "query_proj.weight")),
        )
        found._check(source)
        return found

    def _check(self, source: Released) -> None:
        hidden = source.weights[EMBEDDING].shape[1]
        projected = self.value_width * (self.blocks if self.block_projections else 1)
        wanted = {
            "query_proj.weight": (self.query_rows, hidden),
            "keys": (self.heads, 2, self.sub_keys, self.width, self.ranks),
            "values_proj.weight": (hidden, projected),
            "query_norm.weight": (self.width,),
            "keys_norm.weight": (self.width,),
            "shuffle_index": (self.blocks * self.rows,),
            "tucker_core_u": (1, self.heads, 1, self.ranks),
            "tucker_core_v": (1, self.heads, 1, self.ranks),
            VALUES: (self.rows, self.value_width),
            "pre_values_proj.weight": (self.pre_value_width, hidden),
        }
        wanted |= {f"tucker_core.{c}": (self.heads, self.ranks, self.ranks) for c in range(99)}
        problems = [
            f"{name} has shape {list(tensor.shape)}, but must have {list(wanted[match[2]])}."
            for name, tensor in source.weights.items()
            if (match := MEMORY.fullmatch(name)) and tuple(tensor.shape) != wanted[match[2]]
        ]
        if self.heads > 2:
            problems.append(
                f"the memories have {self.heads} heads, but the released code computes at most two "
                "with one pair of queries; more cannot be converted."
            )
        if self.query_rows not in (2 * self.width, 2 * self.ranks * self.width):
            problems.append(
                f"query_proj has {self.query_rows} rows, but keys of width {self.width} need "
                f"{2 * self.width}, or {2 * self.ranks * self.width} with a query for each rank."
            )
        ConfigurationError.collect(problems[:5])


def _key_expansion(source: Released, variant: str, ring: int) -> int:
    """The square root of the number of virtual blocks."""
    if variant == "ultramem-v2":
        return int(source.setting("mem_key_expand_time", 1))
    return math.isqrt(source.memory(0, "keys").shape[2] ** 2 // ring)


def _places(source: Released, variant: str) -> tuple[tuple[int, ...], int]:
    """The layers that memories read, and the layers between reading and adding.

    Raises:
        ConfigurationError: megamem has no memories that lie like this.
    """
    way = source.setting("mem_insert_way", "full")
    if way == "full":
        return tuple(range(source.layers)), 0
    spans = [tuple(map(int, span.split(":"))) for span in way.split("/")]
    said = f"{CONFIG} has mem_insert_way: {way}, "
    skips = {last - first for first, last in spans}
    if len(skips) > 1:
        raise ConfigurationError(
            f"{said}whose spans differ in length, but --memory-skip is one for all memory layers."
        )
    if max(last for _, last in spans) >= source.layers:
        raise ConfigurationError(
            f"{said}which adds an output after layer {max(last for _, last in spans)} of "
            f"{source.layers}, so that the released code drops it; this cannot be converted."
        )
    if any(last >= first for (_, last), (first, _) in zip(spans, spans[1:], strict=False)):
        raise ConfigurationError(
            f"{said}whose spans overlap, so that the released code drops an output; this cannot be "
            "converted."
        )
    skip = skips.pop()
    if skip and variant == "ultramem-v2":
        raise ConfigurationError(
            f"{said}but --memory-variant ultramem-v2 adds its output where it reads."
        )
    return tuple(first for first, _ in spans), skip
