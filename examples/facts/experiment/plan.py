"""Which runs the experiment is made of: a sweep of learning rates, then what uses its best.

A run is known by the hash of its flags, its corpus and what it starts from. So the sweep's best run
is the first seed of the main table, and nothing is trained twice.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass

from experiment.models import (
    LEAN,
    Flags,
    Model,
    ablations,
    at_depth_of,
    ffn_width,
    flops_per_token,
    main_models,
    memory_plus,
    parameters,
    reference,
)
from experiment.scales import Scale

Rates = tuple[float, float]
MIDDLE: Rates = (1.0, 1.0)

# what a run needs on a GPU without Transformer Engine and Apex; on a CPU the launcher sets it
GPU_FLAGS: Flags = {
    "transformer_impl": "local",
    "no_rope_fusion": True,
    "no_masked_softmax_fusion": True,
    "no_gradient_accumulation_fusion": True,
    "no_persist_layer_norm": True,
}


@dataclass(frozen=True)
class Run:
    """One training run and the probe behind it.

    Attributes:
        rates: factors of the scale's learning rates, of the model and of the table.
        flags: of Megatron, but for those that name files.
        stamp: what its corpus was made from.
        corpus: folder of what it trains on: "corpus", or "new" for the facts that are taught later.
        start: key of the run whose checkpoint it starts from.
        keep: its last checkpoint stays, as others start from it.
        flops, parameters, table: what the plan expects, of a token, of the model, of its tables.
        points: iterations whose checkpoints are asked.
    """

    group: str
    model: Model
    seed: int
    rates: Rates
    flags: Flags
    stamp: str
    corpus: str = "corpus"
    start: str = ""
    keep: bool = False
    flops: int = 0
    parameters: int = 0
    table: int = 0
    points: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """The hash that names its folder."""
        said = {"flags": self.flags, "corpus": [self.corpus, self.stamp], "start": self.start}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def iterations(self) -> int:
        iterations = self.flags["train_iters"]
        assert isinstance(iterations, int)
        return iterations

    @property
    def name(self) -> str:
        """For people; the key tells runs apart."""
        rates = (
            ""
            if self.rates == MIDDLE or self.start
            else f", rates x{self.rates[0]:g} x{self.rates[1]:g}"
        )
        return f"{self.model.name}, seed {self.seed}{rates}"


class Plan:
    """Makes the runs of one scale.

    Args:
        vocab_size: of the corpus that was built.
        stamp: what the corpus is, as a short text.
    """

    def __init__(self, scale: Scale, vocab_size: int, stamp: str) -> None:
        self.scale, self.vocab_size, self.stamp = scale, vocab_size, stamp

    def families(self, parts: Collection[str]) -> list[str]:
        """Whose learning rates these parts need: all for the main table, else their models'."""
        needed = {"memory+"}
        if "ablations" in parts:
            needed |= {model.family for model in ablations(self.scale)}
        return [f for f in self.scale.families if "main" in parts or f in needed]

    def sweep(self, families: Iterable[str]) -> list[Run]:
        """Every pair of learning rates of the grid for one model of each family, at one seed.

        The first pairs of all families come first, for an early look at how they compare.
        """
        models = {model.family: model for model in main_models(self.scale)}
        if "memory+" in models:
            models["memory+"] = reference(self.scale)
        grids = {family: self.scale.sweep[family] for family in families if family in models}
        return [
            self.run("sweep", models[family], self.scale.seeds[0], rates)
            for place in range(max(map(len, grids.values()), default=0))
            for family, grid in grids.items()
            for rates in grid[place : place + 1]
        ]

    def main(self, best: Mapping[str, Rates]) -> list[Run]:
        """Every model at every seed, the first seed of all models first."""
        return [
            self.run("main", model, seed, best[model.family])
            for seed in self.scale.seeds
            for model in main_models(self.scale)
        ]

    def ablations(self, best: Mapping[str, Rates]) -> list[Run]:
        """The reference, then each change of it, at the first seeds; see models.LEAN."""
        base, few = reference(self.scale), self.scale.seeds[: self.scale.ablation_seeds]
        all_seeds = {base.name, *(LEAN if len(few) > 1 else ())}
        return [
            self.run("ablations", model, seed, best[model.family])
            for model in (base, *ablations(self.scale))
            for seed in (self.scale.seeds if model.name in all_seeds else few)
        ]

    def continual(self, best: Mapping[str, Rates]) -> list[Run]:
        """A trained Memory+, then everything that teaches it new facts."""
        base = memory_plus(self.scale, self.scale.new_keys)
        trained = self.run("continual", base, self.scale.seeds[0], best[base.family])
        return [trained, *(self._teach(trained, *method) for method in self._methods())]

    def run(self, group: str, model: Model, seed: int, rates: Rates) -> Run:
        """A training run from scratch."""
        scale = self.scale
        ffn = ffn_width(model, scale, self.vocab_size)
        total, table = parameters(model, scale, ffn, self.vocab_size)
        shape: Flags = {
            "num_layers": at_depth_of(model, scale).layers,
            "hidden_size": scale.hidden,
            "num_attention_heads": scale.attention_heads,
            "ffn_hidden_size": ffn,
            "seq_length": scale.seq,
            "max_position_embeddings": scale.seq,
            "position_embedding_type": "rope",
            "normalization": "RMSNorm",
            "swiglu": True,
            "disable_bias_linear": True,
            "untie_embeddings_and_output_weights": True,
            "attention_dropout": 0,
            "hidden_dropout": 0,
        }
        iterations, interval = (n * model.longer for n in (scale.iterations, scale.probe_interval))
        training: Flags = {
            "micro_batch_size": scale.micro,
            "global_batch_size": scale.batch,
            "train_iters": iterations,
            "lr": _rounded(scale.lr * rates[0] * model.rates[0]),
            "min_lr": _rounded(scale.lr * rates[0] * model.rates[0] / 20),
            "lr_warmup_iters": scale.warmup,
            "lr_decay_style": "cosine",
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "clip_grad": 1.0,
            "seed": seed,
            "save_interval": interval,
            "log_interval": scale.log_interval,
            "eval_interval": iterations,
            "eval_iters": 10,
        }
        own: Flags = dict(model.flags)
        if "num_experts" in own:
            own["moe_ffn_hidden_size"] = ffn
        if model.memory.enabled:
            own["memory_lr"] = _rounded(scale.memory_lr * rates[1] * model.rates[1])
        device = GPU_FLAGS if scale.device == "gpu" else {}
        points = range(interval, iterations + 1, interval)
        return Run(
            group=group,
            model=model,
            seed=seed,
            rates=rates,
            flags={**shape, **training, **device, **scale.precision, **own},
            stamp=self.stamp,
            keep=model == memory_plus(scale, scale.new_keys) and seed == scale.seeds[0],
            flops=flops_per_token(model, scale, ffn, self.vocab_size),
            parameters=total,
            table=table,
            points=tuple(points),
        )

    def _teach(self, trained: Run, name: str, rate: float, flags: Flags) -> Run:
        """The same model again, from where `trained` ended, on the new facts alone."""
        scale, before = self.scale, trained.flags
        lr, memory_lr = before["lr"], before["memory_lr"]
        assert isinstance(lr, float) and isinstance(memory_lr, float)
        changed: Flags = {
            "train_iters": scale.new_iterations,
            "save_interval": scale.new_iterations,
            "eval_interval": scale.new_iterations,
            "log_interval": min(scale.log_interval, scale.new_iterations),
            "lr_warmup_iters": max(1, scale.new_iterations // 20),
            "lr": _rounded(lr * rate),
            "min_lr": _rounded(lr * rate / 20),
            "memory_lr": _rounded(memory_lr * rate),
        }
        return Run(
            group="continual",
            model=Model(name, trained.model.family, trained.model.flags),
            seed=trained.seed,
            rates=(rate, rate),
            flags={**before, **changed, **flags},
            stamp=f"{self.stamp}, then {scale.new_facts} new",
            corpus="new",
            start=trained.key,
            flops=trained.flops,
            parameters=trained.parameters,
            table=trained.table,
            points=(scale.new_iterations,),
        )

    def _methods(self) -> list[tuple[str, float, Flags]]:
        """Ways to teach: what it is called, the factor of both rates, what it changes."""
        rows = self.scale.new_rows
        lazy: Flags = {"memory_optimizer": "lazy_adamw"}
        methods: dict[str, tuple[str, Flags]] = {
            "full": ("full finetuning", {}),
            "table": ("the table alone", {**lazy, "lr": 0.0, "min_lr": 0.0}),
            "sparse": (f"{rows:,} rows a step alone", {**lazy, "memory_finetune_rows": rows}),
        }
        return [
            (f"{methods[way][0]} x{rate:g}", rate, methods[way][1])
            for way, rates in self.scale.new_rates.items()
            for rate in rates
        ]


def words(flags: Flags) -> list[str]:
    """Flags as a command line has them."""
    said: list[str] = []
    for name, value in flags.items():
        if value is False:
            continue
        said.append("--" + name.replace("_", "-"))
        if value is not True:
            values = value if isinstance(value, tuple | list) else (value,)
            said += map(str, values)
    return said


def unique(runs: Iterable[Run]) -> list[Run]:
    """Each key once: the first run that has it."""
    return list({run.key: run for run in reversed(list(runs))}.values())[::-1]


def stamp_of(settings: object) -> str:
    """What a corpus was made from, in one line, for the key of a run."""
    return json.dumps(asdict(settings), sort_keys=True)  # type: ignore[call-overload]


def _rounded(rate: float) -> float:
    """Without the last digits of a product, so that equal rates are written equally."""
    return float(f"{rate:.6g}")
