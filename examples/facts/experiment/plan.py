"""The models that are compared at equal FLOPs, and the runs that the experiment is made of.

A model is the dense one with other flags, whose feed-forwards get the width (a multiple of 8) at
which a token costs what it costs in the dense model, or twice that for `dense 2x`. FLOPs are those
that a run reports, by the planner's closed form, so a plan needs no Megatron.

A run is known by the hash of its flags, its corpus and what it starts from. So the best run of the
sweep of learning rates is the first seed of the main table, and nothing is trained twice.
"""

import hashlib
import json
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

from corpus import Settings

from megamem.config import ConfigurationError, MemoryConfig
from megamem.planner import sizes
from megamem.resolution import resolve
from megamem.spec import MemorySpec

Flags = dict[str, Any]
# factors of the learning rate of the model, and of the table
Rates = tuple[float, float]
EMPTY: Mapping[str, Any] = MappingProxyType({})

# what a scale says of these takes the place of all that cpu says
WHOLE = ("models", "ablations", "sweep", "ways")
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
        flops: of a token, in units of the dense model's.
        rates: factors of the swept rates; longer: factor of the steps.
        seeds: it is trained at the first ones, so many; 0: at all.
        several: it is trained only where ablations get several seeds; lean: then at all seeds.
    """

    name: str
    family: str = "memory+"
    flags: Flags = field(default_factory=dict)
    flops: float = 1.0
    rates: Rates = (1.0, 1.0)
    longer: int = 1
    seeds: int = 0
    several: bool = False
    lean: bool = False

    @property
    def rows(self) -> int:
        """Of one table; 0 without memories."""
        return int(self.flags.get("memory_num_keys", 0)) ** 2


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of the experiment; scales.toml says what each number is.

    Attributes:
        short: flags that the sweep's runs have instead, which are then judged by their validation
            loss. Without any they are whole runs, judged by the facts that they know.
        in_one_process: a run is trained and asked by one process, which saves no checkpoint.
    """

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
    short: Flags
    in_one_process: bool
    new: dict[str, Any]

    @property
    def left_out(self) -> set[str]:
        """Parts of the experiment that this scale has nothing for."""
        has = {"ablations": self.ablations, "continual": self.new["ways"]}
        return {part for part, runs in has.items() if not runs}

    def seeds_of(self, model: Model) -> list[int]:
        """The seeds at which a model of the main part is trained."""
        return self.seeds[: model.seeds or None]

    @property
    def reference(self) -> Model:
        """The Memory+ that ablations change."""
        return next(model for model in self.models if model.flags == self.memory)

    @property
    def taught(self) -> Model:
        """The model that is taught new facts."""
        return next(model for model in self.models if model.name == self.new["model"])


def read_scale(name: str, base: dict[str, Any], own: dict[str, Any]) -> Scale:
    """The scale with the numbers of `base` but for its own, which are tables of scales.toml."""
    numbers = _merged(base, own)
    memory, experts = numbers["memory"], numbers.pop("experts")
    settings = {field.name for field in fields(Model)}

    def model(name: str, said: dict[str, Any]) -> Model:
        shared = {"dense": {}, "dense 2x": {}, "moe": experts}.get(said.get("family", ""), memory)
        chosen = {key: value for key, value in said.items() if key in settings}
        flags = {key: value for key, value in said.items() if key not in settings}
        return Model(name, **chosen, flags={**shared, **flags})

    for kind in ("models", "ablations"):
        numbers[kind] = [model(name, said) for name, said in numbers[kind].items()]
    sweep = {family: [*map(tuple, grid)] for family, grid in numbers["sweep"].items()}
    corpus = Settings(**numbers["corpus"])
    return Scale(**{**numbers, "name": name, "corpus": corpus, "sweep": sweep})


def divided(name: str, by: int) -> Scale:
    """The scale with fewer facts, smaller batches and tables and shorter training, for a CPU.

    Widths stay, and there is as much to ask and to log as before.
    """

    def fewer(number: int, least: int) -> int:
        return max(number // by, min(number, least))

    def shorter(flags: Flags) -> Flags:
        points = flags["train_iters"] // flags["save_interval"]
        interval, batch = max(flags["save_interval"] // by, 1), fewer(flags["global_batch_size"], 4)
        whole = dict.fromkeys(("train_iters", "eval_interval"), points * interval)
        each = dict.fromkeys(("save_interval", "log_interval"), interval)
        batches = dict.fromkeys(("micro_batch_size", "global_batch_size"), batch)
        # of training that is one step there is none
        warmup = {"lr_warmup_iters": flags["lr_warmup_iters"] // by}
        return {**flags, **batches, **whole, **each, **warmup}

    def smaller(model: Model) -> Model:
        keys, topk = (model.flags.get(f"memory_{name}", 0) for name in ("num_keys", "topk"))
        table = {"memory_num_keys": fewer(keys, topk)} if keys else {}
        return replace(model, flags={**model.flags, **table})

    scale = SCALES[name]
    corpus = {key: fewer(getattr(scale.corpus, key), 60) for key in ("facts", "held_out")}
    short = shorter({**scale.flags, **scale.short})
    return replace(
        scale,
        name=f"{name} divided by {by}",
        device="cpu",
        corpus=replace(scale.corpus, **corpus),
        flags=shorter(scale.flags),
        memory=smaller(scale.reference).flags,
        models=[smaller(model) for model in scale.models],
        ablations=[smaller(model) for model in scale.ablations],
        short={key: short[key] for key in scale.short},
    )


def flops_per_token(flags: Flags, vocab_size: int) -> int:
    """As a run with these flags reports them, for one token; of experts, the one it visits."""
    spec = memories(flags)
    total = sizes.dense_flops_per_token(model_shape(flags, vocab_size), spec)
    return total + (len(spec.layers) * sizes.memory_flops_per_token(spec) if spec else 0)


def parameters(flags: Flags, vocab_size: int) -> tuple[int, int]:
    """All parameters, and how many of them are rows of tables."""
    shape, spec = model_shape(flags, vocab_size), memories(flags)
    total = sizes.total_parameters(shape, spec)["total"]
    if experts := flags.get("num_experts"):
        layers = len(range(0, shape.num_layers, flags["moe_layer_freq"]))
        router = experts * shape.hidden_size
        total += layers * ((experts - 1) * sizes.dense_parts(shape).ffn + router)
    return total, sizes.table_parameters(spec) if spec else 0


def ffn_width(model: Model, scale: Scale, vocab_size: int) -> int:
    """The feed-forward width at which a token costs what it should; ConfigurationError if none."""
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
        f"{model.name} cannot cost {wanted:,.0f} FLOPs a token at scale {scale.name}; choose wider "
        "feed-forwards of the scale, fewer keys or fewer memory layers"
    )


def memories(flags: Flags) -> MemorySpec | None:
    """The memory layers that these flags ask for."""
    chosen = {name: value for name, value in flags.items() if name.startswith("memory_")}
    return resolve(MemoryConfig(**chosen), flags["hidden_size"]) if chosen else None


def model_shape(flags: Flags, vocab_size: int) -> sizes.ModelShape:
    """The model of these flags, as the planner has it."""
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


@dataclass(frozen=True)
class Run:
    """One training run and the probe behind it.

    Attributes:
        rates: factors of the scale's learning rates.
        flags: of Megatron, but for those that name files.
        stamp: what its corpus was made from.
        flops, parameters, table: what the plan expects, of a token, of the model, of its tables.
        keep: its last checkpoint stays, as others start from it.
        corpus: folder of what it trains on: "corpus", or "new" for the facts that are taught later.
        start: key of the run whose checkpoint it starts from.
    """

    part: str
    model: Model
    seed: int
    rates: Rates
    flags: Flags
    stamp: str
    flops: int
    parameters: int
    table: int
    keep: bool = False
    corpus: str = "corpus"
    start: str = ""

    @property
    def key(self) -> str:
        """The hash that names its folder."""
        said = {"flags": self.flags, "corpus": [self.corpus, self.stamp], "start": self.start}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def iterations(self) -> int:
        return int(self.flags["train_iters"])

    @property
    def points(self) -> list[int]:
        """Iterations whose checkpoints are asked."""
        interval = self.flags["save_interval"]
        return list(range(interval, self.iterations + 1, interval))

    @property
    def name(self) -> str:
        """For people; the key tells runs apart."""
        lr, table = self.rates
        swept = f", rates x{lr:g} x{table:g}" if self.rates != (1, 1) and not self.start else ""
        return f"{self.model.name}, seed {self.seed}{swept}"


class Plan:
    """Makes the runs of one scale, for the vocabulary of the corpus that was built."""

    def __init__(self, scale: Scale, vocab_size: int) -> None:
        self.scale, self.vocab_size = scale, vocab_size
        # what the corpus was made from, for the keys of the runs
        self.stamp = json.dumps(asdict(scale.corpus), sort_keys=True)

    def sweep(self, parts: Collection[str]) -> list[Run]:
        """Every pair of rates at one seed, for a model of each family in these parts, in turn."""
        scale = self.scale
        first = {family: grid[0] for family, grid in scale.sweep.items()}
        needed = {run.model.family for part in parts for run in self.part(part, first)}
        chosen = {m.family: m for m in (*scale.models, scale.reference) if m.family in needed}
        return [
            self.run("sweep", model, scale.seeds[0], rates, scale.short)
            for turn in zip_longest(*(scale.sweep[family] for family in chosen))
            for model, rates in zip(chosen.values(), turn, strict=True)
            if rates
        ]

    def part(self, name: str, best: Mapping[str, Rates]) -> list[Run]:
        """The runs of a part at the best rates of every family; none where it is left out.

        main: every model at its seeds. ablations: the reference, then each change of it, at the
        first seeds. continual: a trained Memory+, then everything that teaches it new facts.
        """
        scale = self.scale
        seeds, few = scale.seeds, scale.seeds[: scale.ablation_seeds]
        several = len(few) > 1
        if name in scale.left_out:
            return []
        if name == "continual":
            trained = self.run(name, scale.taught, seeds[0], best[scale.taught.family])
            return [trained, *self._taught(trained)]
        chosen = [(m, s) for s in seeds for m in scale.models if s in scale.seeds_of(m)]
        if name == "ablations":
            models = (m for m in scale.ablations if several or not m.several)
            chosen = [(scale.reference, seed) for seed in seeds]
            chosen += [(m, seed) for m in models for seed in (seeds if several and m.lean else few)]
        return [self.run(name, model, seed, best[model.family]) for model, seed in chosen]

    def run(
        self, part: str, model: Model, seed: int, rates: Rates, changed: Mapping[str, Any] = EMPTY
    ) -> Run:
        """A training run from scratch, with some of the scale's flags changed."""
        scale, vocab = self.scale, self.vocab_size
        ffn = ffn_width(model, scale, vocab)
        flags = {**scale.flags, **changed, "ffn_hidden_size": ffn, "seed": seed, **model.flags}
        for name in ("train_iters", "save_interval", "eval_interval"):
            flags[name] *= model.longer
        for name in ("lr", "min_lr"):
            flags[name] = _rounded(flags[name] * rates[0] * model.rates[0])
        if model.family == "moe":
            flags["moe_ffn_hidden_size"] = ffn
        if model.rows:
            flags["memory_lr"] = _rounded(flags.pop("memory_lr") * rates[1] * model.rates[1])
        counts = flops_per_token(flags, vocab), *parameters(flags, vocab)
        keep = seed == scale.seeds[0] and model == scale.taught
        return Run(part, model, seed, rates, flags, self.stamp, *counts, keep)

    def _taught(self, trained: Run) -> list[Run]:
        """The runs that go on from a trained one, on the new facts alone."""
        new, was = self.scale.new, trained.flags
        runs = []
        for name, said in new["ways"].items():
            changed = {flag: value for flag, value in said.items() if flag != "rates"}
            for by in said["rates"]:
                rates = {rate: _rounded(was[rate] * by) for rate in ("lr", "min_lr", "memory_lr")}
                flags = {**was, **new["flags"], **rates, **changed}
                model = replace(trained.model, name=f"{name} x{by:g}")
                taught = replace(trained, model=model, rates=(by, by), flags=flags, keep=False)
                stamp = f"{self.stamp}, then {new['facts']} new"
                runs.append(replace(taught, stamp=stamp, corpus="new", start=trained.key))
        return runs


def words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    said: list[str] = []
    for name, value in flags.items():
        if value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            said += ["--" + name.replace("_", "-"), *map(str, values)]
    return said


def unique(runs: Iterable[Run]) -> list[Run]:
    """Each key once: the first run that has it."""
    return list({run.key: run for run in reversed(list(runs))}.values())[::-1]


def _rounded(rate: float) -> float:
    """Without the last digits of a product, so that equal rates are written equally."""
    return float(f"{rate:.6g}")


TABLES = tomllib.loads(Path(__file__).with_name("scales.toml").read_text())
SCALES = {name: read_scale(name, TABLES["cpu"], own) for name, own in TABLES.items()}
