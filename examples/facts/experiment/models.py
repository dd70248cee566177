"""The scales of the experiment, and the models that it compares at equal FLOPs.

A model is the dense one with other flags. Its feed-forwards then get the width (a multiple of 8) at
which a token costs what it costs in the dense model, or twice that for `dense 2x`: a memory that
replaces three feed-forwards and costs less than they did leaves the other ones wider, and a table
of more rows, whose sub-keys cost more, leaves them narrower.

FLOPs are those that a run reports: matrix products of forward and backward, causal attention,
memories in place of what they replaced, rows as parameters alone. The planner has them in closed
form, so a plan needs no Megatron; the tests compare it with what Megatron counts for the same flags
and with what torch counts in a real forward and backward. Not counted by either is the router of
the mixture of experts.
"""

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from build_corpus import Settings

from megamem.config import ConfigurationError, MemoryConfig
from megamem.planner import sizes
from megamem.resolution import resolve
from megamem.spec import MemorySpec

Flags = dict[str, Any]
# factors of the learning rate of the model, and of the table
Rates = tuple[float, float]

# these stand for one thing: what a scale says of them takes the place of what cpu does
WHOLE = ("models", "ablations", "sweep", "rates")
MULTIPLE = 8
TOLERANCE = 0.01
# Megatron pads the vocabulary to this
VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Model:
    """A row of the comparison.

    Attributes:
        family: models that share learning rates, found once by the sweep.
        flags: what it adds to the dense model's.
        flops: FLOPs of a token, in units of the dense model's.
        rates: factors of the swept rates.
        longer: how many times the scale's steps it is trained.
        several: it is trained only where ablations get several seeds.
        lean: it then gets all seeds that there are.
    """

    name: str
    family: str = "memory+"
    flags: Flags = field(default_factory=dict)
    flops: float = 1.0
    rates: Rates = (1.0, 1.0)
    longer: int = 1
    several: bool = False
    lean: bool = False

    @property
    def rows(self) -> int:
        """Of one table; 0 without memories."""
        return int(self.flags.get("memory_num_keys", 0)) ** 2


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of the experiment; scales.toml says what each number is."""

    name: str
    duration: str
    device: str
    seeds: list[int]
    ablation_seeds: int
    corpus: Settings
    flags: Flags
    memory: Flags
    models: list[Model]
    ablations: list[Model]
    sweep: dict[str, list[Rates]]
    new: dict[str, Any]

    @property
    def left_out(self) -> set[str]:
        """Parts of the experiment that this scale has nothing for."""
        has = {"ablations": self.ablations, "continual": self.new["rates"]}
        return {part for part, runs in has.items() if not runs}

    @property
    def families(self) -> list[str]:
        """Of the models, in their order."""
        return list(dict.fromkeys(model.family for model in self.models))

    @property
    def reference(self) -> Model:
        """The Memory+ that ablations change."""
        return next(model for model in self.models if model.flags == self.memory)

    @property
    def taught(self) -> Model:
        """The model that is taught new facts."""
        return next(model for model in self.models if model.name == self.new["model"])


def read_scale(name: str, base: dict[str, Any], own: dict[str, Any]) -> Scale:
    """The scale with the numbers of `base` but for its own: tables as scales.toml has them."""
    numbers = _merged(base, own)
    memory, experts = numbers["memory"], numbers.pop("experts")
    settings = {field.name for field in fields(Model)}

    def models(table: dict[str, dict[str, Any]]) -> list[Model]:
        found = []
        for name, said in table.items():
            chosen = {key: value for key, value in said.items() if key in settings}
            family = said.get("family", "memory+")
            shared = {"dense": {}, "dense 2x": {}, "moe": experts}.get(family, memory)
            own = {key: value for key, value in said.items() if key not in settings}
            found.append(Model(name, **chosen, flags={**shared, **own}))
        return found

    for kind in ("models", "ablations"):
        numbers[kind] = models(numbers[kind])
    sweep = {
        family: [(lr, table) for lr, table in grid] for family, grid in numbers["sweep"].items()
    }
    corpus = Settings(**numbers["corpus"])
    return Scale(**{**numbers, "name": name, "corpus": corpus, "sweep": sweep})


def flops_per_token(flags: Flags, vocab_size: int) -> int:
    """As a run with these flags reports them, for one token; of experts, the one it visits."""
    spec = _memories(flags)
    total = sizes.dense_flops_per_token(_shape(flags, vocab_size), spec)
    return total + (len(spec.layers) * sizes.memory_flops_per_token(spec) if spec else 0)


def parameters(flags: Flags, vocab_size: int) -> tuple[int, int]:
    """All parameters, and how many of them are rows of tables."""
    shape, spec = _shape(flags, vocab_size), _memories(flags)
    total = sizes.total_parameters(shape, spec)["total"]
    if experts := flags.get("num_experts"):
        layers = len(range(0, shape.num_layers, flags["moe_layer_freq"]))
        router = experts * shape.hidden_size
        total += layers * ((experts - 1) * sizes.dense_parts(shape).ffn + router)
    return total, sizes.table_parameters(spec) if spec else 0


def ffn_width(model: Model, scale: Scale, vocab_size: int) -> int:
    """The feed-forward width at which a token of the model costs what it should.

    Raises:
        ConfigurationError: no width does, to within TOLERANCE.
    """
    flags = {**scale.flags, **model.flags}
    dense = {**scale.flags, "num_layers": flags["num_layers"]}
    wanted = model.flops * flops_per_token(dense, vocab_size)

    def cost(width: int) -> int:
        return flops_per_token({**flags, "ffn_hidden_size": width}, vocab_size)

    narrow = cost(MULTIPLE)
    step = cost(2 * MULTIPLE) - narrow
    width = MULTIPLE * (1 + round((wanted - narrow) / step if step else 0))
    if width >= MULTIPLE and abs(cost(width) / wanted - 1) <= TOLERANCE:
        return width
    raise ConfigurationError(
        f"{model.name} cannot cost {wanted:,.0f} FLOPs a token at scale {scale.name}: with "
        f"feed-forwards of {MULTIPLE} it takes {narrow:,}, and {step:,} more for each {MULTIPLE} "
        "of width; choose wider feed-forwards of the scale, fewer keys or fewer memory layers"
    )


def _memories(flags: Flags) -> MemorySpec | None:
    chosen = {name: value for name, value in flags.items() if name.startswith("memory_")}
    return resolve(MemoryConfig(**chosen), flags["hidden_size"]) if chosen else None


def _shape(flags: Flags, vocab_size: int) -> sizes.ModelShape:
    names = [field.name for field in fields(sizes.ModelShape)]
    return sizes.ModelShape(
        **{name: flags[name] for name in names if name in flags},
        padded_vocab_size=-(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        add_bias_linear=False,
        layer_norm_bias=False,
        untied=True,
    )


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    parts = [name for name, value in own.items() if isinstance(value, dict) and name not in WHOLE]
    return {**base, **own, **{name: _merged(base[name], own[name]) for name in parts}}


TABLES = tomllib.loads(Path(__file__).with_name("scales.toml").read_text())
SCALES = {name: read_scale(name, TABLES["cpu"], own) for name, own in TABLES.items()}
