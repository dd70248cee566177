"""How large the experiment is: corpus, models, training and the grid of learning rates, as data.

Every number that a result depends on is in here, and results.json repeats the flags made of them.
"""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """What build_corpus.py is asked for; the fields are its flags."""

    facts: int
    kind: str
    exposures: int | None = None
    held_out: int
    vocab_size: int
    probe_facts: int = 20_000
    seed: int = 1234


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of the experiment.

    Attributes:
        duration: what it takes, for people.
        ffn: feed-forward width of the dense model, whose FLOPs are the yardstick.
        seq, batch, iterations, warmup, micro: of training, in tokens, sequences and steps; micro is
            the sequences of one forward.
        probes: at how many evenly spaced points of training the facts are asked.
        lr, memory_lr: middle of the sweep, of the model and of the table.
        one, three: layers that become memories in Memory and PEER, and in Memory+.
        deep, deep_layers: a deeper model, and which of its layers are memories, for the ablation of
            their number.
        keys: N of each size of Memory+; rows are N * N.
        reference: the N of every other memory, of the sweep and of the ablations.
        experts, every: experts of the mixture, and which layers have them.
        families: of models, those that are trained.
        sweep: family -> (factor of lr, factor of memory_lr), each tried at the first seed.
        ablations: names of those of models.ablations that are trained; None is all.
        ablation_seeds: how many of the seeds they get; from two on, optimizers get more than that.
        new_facts, new_iterations: taught to a trained model, in so many steps.
        new_rates: way to teach them -> factors of both learning rates; see Plan. None is taught
            where it is empty.
        new_keys: the N of the Memory+ that is taught.
        new_rows: that sparse finetuning trains at a step.
        precision: flags of it.
    """

    name: str
    duration: str
    device: str
    corpus: CorpusSettings
    layers: int
    hidden: int
    attention_heads: int
    ffn: int
    seq: int
    batch: int
    micro: int
    iterations: int
    warmup: int
    log_interval: int
    probes: int = 4
    lr: float
    memory_lr: float
    one: tuple[int, ...]
    three: tuple[int, ...]
    deep: int
    deep_layers: tuple[tuple[int, ...], ...]
    keys: tuple[int, ...]
    reference: int
    heads: int
    topk: int
    key_dim: int
    experts: int
    every: int
    families: tuple[str, ...]
    seeds: tuple[int, ...]
    sweep: dict[str, tuple[tuple[float, float], ...]]
    ablations: tuple[str, ...] | None = None
    ablation_seeds: int = 1
    new_facts: int = 500
    new_iterations: int
    new_rates: dict[str, tuple[float, ...]]
    new_keys: int
    new_rows: int
    precision: dict[str, Any]

    @property
    def left_out(self) -> set[str]:
        """Parts of the experiment that this scale has nothing for."""
        has = {"ablations": self.ablations != (), "continual": self.new_rates != {}}
        return {part for part, runs in has.items() if not runs}

    @property
    def tokens_per_iteration(self) -> int:
        return self.batch * self.seq

    @property
    def probe_interval(self) -> int:
        """Iterations between two probed checkpoints."""
        return self.iterations // self.probes


FAMILIES = ("dense", "dense 2x", "moe", "peer", "memory", "memory+")
# the model's rate; where there is a table, lower ones with four times the table's, and the middle
# one of these with the table's own
RATES = ((1.0, 1.0), (0.5, 1.0), (2.0, 1.0))
CROSS = ((1.0, 4.0), (0.5, 4.0), (0.25, 4.0), (0.5, 1.0))
SWEEP = {
    **dict.fromkeys(("dense", "dense 2x", "moe"), RATES),
    **dict.fromkeys(("peer", "memory", "memory+"), CROSS),
}
# the fewer parameters are trained, the faster
NEW_RATES = {"full": (0.1, 0.5), "table": (0.25, 0.5), "sparse": (1.0, 4.0)}

SMOKE = Scale(
    name="smoke",
    duration="about two minutes on two cores",
    device="cpu",
    corpus=CorpusSettings(facts=40, kind="real", held_out=30, vocab_size=500),
    layers=4,
    hidden=32,
    attention_heads=2,
    ffn=96,
    seq=64,
    batch=8,
    micro=8,
    iterations=300,
    warmup=10,
    log_interval=10,
    probes=2,
    lr=1e-2,
    memory_lr=3e-2,
    one=(1,),
    three=(0, 1, 2),
    deep=4,
    deep_layers=(),
    keys=(16, 32),
    reference=32,
    heads=2,
    topk=4,
    key_dim=16,
    experts=4,
    every=2,
    families=("dense", "memory+"),
    seeds=(1,),
    sweep={"dense": ((1.0, 1.0),), "memory+": ((1.0, 1.0),)},
    ablations=(),
    new_facts=20,
    new_iterations=60,
    new_rates={"full": (0.5,)},
    new_keys=32,
    new_rows=100,
    precision={},
)

CPU = Scale(
    name="cpu",
    duration="just under 90 minutes on two cores",
    device="cpu",
    corpus=CorpusSettings(
        facts=3000, kind="biographies", held_out=300, vocab_size=2048, probe_facts=1500
    ),
    layers=4,
    hidden=64,
    attention_heads=4,
    ffn=112,
    seq=64,
    batch=32,
    micro=32,
    iterations=500,
    warmup=50,
    log_interval=25,
    lr=3.2e-2,
    memory_lr=2e-2,
    one=(2,),
    three=(1, 2, 3),
    deep=8,
    deep_layers=((4,), (2, 4, 6), (1, 2, 3, 4, 5, 6)),
    keys=(128, 256, 512, 1024),
    reference=128,
    heads=1,
    topk=16,
    key_dim=16,
    experts=8,
    every=2,
    families=FAMILIES,
    seeds=(1, 2, 3),
    sweep=SWEEP,
    new_iterations=100,
    new_rates=NEW_RATES,
    new_keys=512,
    new_rows=10_000,
    precision={},
)

# what cpu cannot show in its time: a corpus that is larger than dense can hold
LONG = replace(
    CPU,
    name="long",
    duration="about two hours on two cores",
    corpus=replace(CPU.corpus, facts=36_000),
    batch=64,
    micro=64,
    iterations=6000,
    warmup=100,
    log_interval=50,
    probes=10,
    lr=8e-3,
    memory_lr=8e-2,
    keys=(256,),
    reference=256,
    new_keys=256,
    families=("dense", "memory+"),
    seeds=(1,),
    # Memory+ takes what cpu found best; dense, whose failure would be the claim, is tuned
    sweep={"dense": ((0.5, 1.0), (1.0, 1.0)), "memory+": ((2.0, 1.0),)},
    ablations=("dense, twice the steps",),
    new_rates={},
)

GPU = Scale(
    name="gpu",
    duration="in pieces of 10 minutes on one H100 (--minutes 10)",
    device="gpu",
    corpus=CorpusSettings(
        facts=1_000_000,
        kind="biographies",
        exposures=3,
        held_out=3000,
        vocab_size=8192,
    ),
    layers=8,
    hidden=256,
    attention_heads=4,
    ffn=1024,
    seq=128,
    batch=256,
    micro=256,
    iterations=8000,
    warmup=200,
    log_interval=50,
    lr=1e-3,
    memory_lr=5e-3,
    one=(4,),
    three=(2, 4, 6),
    deep=12,
    deep_layers=((6,), (2, 6, 10), (1, 3, 5, 7, 9, 11)),
    keys=(128, 256, 512, 1024),
    reference=512,
    heads=4,
    topk=32,
    key_dim=128,
    experts=8,
    every=1,
    families=FAMILIES,
    seeds=(1, 2, 3),
    sweep=SWEEP,
    new_iterations=500,
    new_rates=NEW_RATES,
    new_keys=1024,
    new_rows=10_000,
    precision={"bf16": True},
)

SCALES = {scale.name: scale for scale in (SMOKE, CPU, LONG, GPU)}


def choose(name: str, **changed: Any) -> Scale:
    """A scale by name, with some of its numbers replaced."""
    return replace(SCALES[name], **changed)
