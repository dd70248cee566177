"""Which runs the experiment is made of: a sweep of learning rates, then what uses its best.

A run is known by the hash of its flags, its corpus and what it starts from. So the sweep's best run
is the first seed of the main table, and nothing is trained twice.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from experiment.models import Flags, Model, Rates, Scale, ffn_width, flops_per_token, parameters


@dataclass(frozen=True)
class Run:
    """One training run and the probe behind it.

    Attributes:
        part: of the experiment.
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
        name, (lr, table) = f"{self.model.name}, seed {self.seed}", self.rates
        swept = self.rates != (1, 1) and not self.start
        return f"{name}, rates x{lr:g} x{table:g}" if swept else name


class Plan:
    """Makes the runs of one scale, for the vocabulary of the corpus that was built."""

    def __init__(self, scale: Scale, vocab_size: int) -> None:
        self.scale, self.vocab_size = scale, vocab_size
        # what the corpus was made from, for the keys of the runs
        self.stamp = json.dumps(asdict(scale.corpus), sort_keys=True)

    def families(self, parts: Collection[str]) -> list[str]:
        """Whose learning rates these parts need: all for the main table, else their models'."""
        needed = {"memory+"}
        if "ablations" in parts:
            needed |= {model.family for model in self.scale.ablations}
        return [f for f in self.scale.families if "main" in parts or f in needed]

    def sweep(self, families: Collection[str]) -> list[Run]:
        """Every pair of learning rates of the grid for one model of each family, at one seed.

        The first pairs of all families come first, for an early look at how they compare.
        """
        scale = self.scale
        chosen = {m.family: m for m in (*scale.models, scale.reference) if m.family in families}
        grids = {family: scale.sweep[family] for family in chosen}
        return [
            self.run("sweep", chosen[family], scale.seeds[0], rates)
            for place in range(max(map(len, grids.values()), default=0))
            for family, grid in grids.items()
            for rates in grid[place : place + 1]
        ]

    def part(self, name: str, best: Mapping[str, Rates]) -> list[Run]:
        """The runs of a part at the best rates of every family; none where the scale leaves it out.

        main: every model at every seed, the first seed of all models first. ablations: the
        reference, then each change of it, at the first seeds. continual: a trained Memory+, then
        everything that teaches it new facts.
        """
        scale, base = self.scale, self.scale.reference
        seeds, few = scale.seeds, scale.seeds[: scale.ablation_seeds]
        several = len(few) > 1
        if name in scale.left_out:
            return []
        if name == "main":
            chosen = [(model, seed) for seed in seeds for model in scale.models]
        elif name == "ablations":
            chosen = [
                (model, seed)
                for model in (base, *scale.ablations)
                if several or not model.several
                for seed in (seeds if model == base or (several and model.lean) else few)
            ]
        else:
            chosen = [(scale.taught, seeds[0])]
        runs = [self.run(name, model, seed, best[model.family]) for model, seed in chosen]
        return runs + (self._taught(runs[0]) if name == "continual" else [])

    def run(self, part: str, model: Model, seed: int, rates: Rates) -> Run:
        """A training run from scratch."""
        scale, vocab = self.scale, self.vocab_size
        ffn = ffn_width(model, scale, vocab)
        flags = {**scale.flags, "ffn_hidden_size": ffn, "seed": seed, **model.flags}
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
        new, rows = self.scale.new, self.scale.new["rows"]
        lazy = {"memory_optimizer": "lazy_adamw"}
        ways: dict[str, tuple[str, Flags]] = {
            "full": ("full finetuning", {}),
            "table": ("the table alone", {**lazy, "lr": 0.0, "min_lr": 0.0}),
            "sparse": (f"{rows:,} rows a step alone", {**lazy, "memory_finetune_rows": rows}),
        }
        runs = []
        for way, factor in ((way, factor) for way, all_ in new["rates"].items() for factor in all_):
            (name, changed), was = ways[way], trained.flags
            lower = {rate: _rounded(was[rate] * factor) for rate in ("lr", "min_lr", "memory_lr")}
            taught = replace(
                trained,
                model=replace(trained.model, name=f"{name} x{factor:g}"),
                rates=(factor, factor),
                flags={**was, **new["flags"], **lower, **changed},
                stamp=f"{self.stamp}, then {new['facts']} new",
                keep=False,
                corpus="new",
                start=trained.key,
            )
            runs.append(taught)
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
