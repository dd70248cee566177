"""The models that are compared, and how wide their feed-forwards are at equal FLOPs.

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

from dataclasses import dataclass, replace
from math import isqrt

from experiment.scales import Scale
from megamem.config import ConfigurationError, MemoryConfig
from megamem.planner.sizes import (
    ModelShape,
    dense_flops_per_token,
    dense_parts,
    memory_flops_per_token,
    table_parameters,
    total_parameters,
)

Flag = bool | int | float | str | tuple[int, ...]
Flags = dict[str, Flag]

# ablations that save state of the optimizer: where others get more seeds than one, these get all
LEAN = ("lazy_adamw", "rowwise_adamw")
LONGER = ", twice the steps"

MULTIPLE = 8
TOLERANCE = 0.01
# Megatron pads the vocabulary to this
VOCABULARY_MULTIPLE = 128
# of Megatron's --init-method-std. Values that start as large as the paper's, V**-0.5, would drown
# embeddings that start at this; in wide models the two are the same
INIT_STD = 0.02
EXPERTS: Flags = {
    "moe_router_topk": 1,
    # with one expert a token, a softmax over the chosen ones would always be 1
    "moe_router_pre_softmax": True,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 1e-2,
    "moe_token_dispatcher_type": "alltoall",
}


@dataclass(frozen=True)
class Model:
    """A row of the comparison.

    Attributes:
        family: models that share learning rates, found once by the sweep.
        flags: what it adds to the dense model's.
        flops: FLOPs of a token, in units of the dense model's.
        rates: factors of the swept learning rate of the model and of the table.
        depth: layers, where they are not the scale's.
        longer: how many times the scale's steps it is trained.
    """

    name: str
    family: str
    flags: tuple[tuple[str, Flag], ...] = ()
    flops: float = 1.0
    rates: tuple[float, float] = (1.0, 1.0)
    depth: int = 0
    longer: int = 1

    @property
    def memory(self) -> MemoryConfig:
        """Its memories, off where it has none; not resolved."""
        # a flag is a tuple here, so that a model can be compared and hashed
        return MemoryConfig(
            **{
                name: list(value) if isinstance(value, tuple) else value
                for name, value in self.flags
                if name.startswith("memory_")
            }
        )

    @property
    def rows(self) -> int:
        """Of one table; 0 without memories."""
        return self.memory.num_rows if self.memory.enabled else 0


def main_models(scale: Scale) -> list[Model]:
    """The rows of the main table, of the families that this scale trains."""
    # half a million rows of two tables hold what a million of one do
    peer = isqrt(scale.reference**2 // 2)
    experts: Flags = {
        "num_experts": scale.experts,
        "moe_layer_freq": scale.every,
        **EXPERTS,
    }
    models = [
        Model("dense", "dense"),
        Model("dense 2x", "dense 2x", flops=2.0),
        Model(f"moe {scale.experts}", "moe", _frozen(experts)),
        _memory(scale, f"peer {_si(peer**2)}", "peer", scale.one, peer),
        _memory(scale, f"memory {_si(scale.reference**2)}", "memory", scale.one, scale.reference),
        *(_memory(scale, f"memory+ {_si(n * n)}", "memory+", scale.three, n) for n in scale.keys),
    ]
    return [model for model in models if model.family in scale.families]


def reference(scale: Scale) -> Model:
    """The Memory+ of the sweep and the ablations."""
    return memory_plus(scale, scale.reference)


def memory_plus(scale: Scale, keys: int) -> Model:
    """The Memory+ of the main table that has so many keys."""
    return next(
        model
        for model in main_models(scale)
        if model.family == "memory+" and model.memory.memory_num_keys == keys
    )


def ablations(scale: Scale) -> list[Model]:
    """The reference with one thing changed each, at the reference's learning rates and FLOPs.

    Then dense at twice the steps and half the rate, to tell what it cannot hold from what it has
    not learnt yet, and deeper models with other numbers of memory layers, at the FLOPs of the dense
    model that is as deep: the reference has no room for more.
    """
    base = reference(scale)
    n, heads, topk, key_dim = scale.reference, scale.heads, scale.topk, scale.key_dim
    pools = isqrt(n * n // len(scale.three))
    changed: dict[str, Flags] = {
        "own pools, as many parameters": {"memory_pool": "layer", "memory_num_keys": pools},
        "no gate": {"memory_variant": "memory"},
        "keys half as wide": {"memory_key_dim": key_dim // 2},
        "keys twice as wide": {"memory_key_dim": key_dim * 2},
        "twice the heads, half k": {"memory_heads": heads * 2, "memory_topk": topk // 2},
        "half k": {"memory_topk": topk // 2},
        "twice k": {"memory_topk": topk * 2},
        "no q/k norm": {"memory_qk_norm": False},
        "values start at V**-0.5": {"memory_value_init_std": scale.hidden**-0.5},
        "values do not decay": {"memory_weight_decay": 0.0},
        "lazy_adamw": {"memory_optimizer": "lazy_adamw"},
        "rowwise_adamw": {"memory_optimizer": "rowwise_adamw"},
        "bf16, fp32 master": {"bf16": True},
        "bf16, stochastic rounding": {"bf16": True, "memory_stochastic_rounding": True},
    }
    models = [_changed(base, name, flags) for name, flags in changed.items()]
    models += [
        replace(base, name=f"values learn {factor:g}x", rates=(1.0, factor))
        for factor in (0.25, 4.0)
    ]
    if scale.ablation_seeds > 1:
        models += _optimizers(base, [m for m in models if m.name in LEAN])
    # longer training likes lower rates: of cpu's 3,000 facts dense then knew 2,990 at half of what
    # is best for once the steps, and 2,878 at that
    models.append(Model(f"dense{LONGER}", "dense", rates=(0.5, 1.0), longer=2))
    for layers in scale.deep_layers:
        name = f"{scale.deep} layers, memories {len(layers)}"
        deeper = _changed(base, name, {"memory_layers": layers})
        models.append(replace(deeper, depth=scale.deep))
    return [m for m in models if scale.ablations is None or m.name in scale.ablations]


def at_depth_of(model: Model, scale: Scale) -> Scale:
    """The scale with as many layers as the model has."""
    return replace(scale, layers=model.depth) if model.depth else scale


def shape_of(scale: Scale, ffn: int, vocab_size: int) -> ModelShape:
    """The dense model of a scale with feed-forwards of this width."""
    return ModelShape(
        num_layers=scale.layers,
        hidden_size=scale.hidden,
        num_attention_heads=scale.attention_heads,
        padded_vocab_size=-(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        seq_length=scale.seq,
        ffn_hidden_size=ffn,
        swiglu=True,
        add_bias_linear=False,
        layer_norm_bias=False,
        untied=True,
    )


def flops_per_token(model: Model, scale: Scale, ffn: int, vocab_size: int) -> int:
    """As a run of the model reports them, for one token; of experts, the one that it visits."""
    memory, shape = model.memory, shape_of(at_depth_of(model, scale), ffn, vocab_size)
    total = dense_flops_per_token(shape, memory)
    if memory.enabled:
        layer = memory_flops_per_token(memory.resolve(scale.hidden), scale.hidden)
        total += len(memory.memory_layers) * layer
    return total


def ffn_width(model: Model, scale: Scale, vocab_size: int) -> int:
    """The feed-forward width at which a token of the model costs what it should.

    Raises:
        ConfigurationError: no width does, to within TOLERANCE.
    """
    dense = Model("dense", "dense", depth=model.depth)
    wanted = model.flops * flops_per_token(dense, scale, scale.ffn, vocab_size)
    narrow = flops_per_token(model, scale, MULTIPLE, vocab_size)
    step = flops_per_token(model, scale, 2 * MULTIPLE, vocab_size) - narrow
    steps = round((wanted - narrow) / step) if step else 0
    width = (1 + steps) * MULTIPLE
    if width >= MULTIPLE:
        reached = flops_per_token(model, scale, width, vocab_size)
        if abs(reached / wanted - 1) <= TOLERANCE:
            return width
    raise ConfigurationError(
        f"{model.name} cannot cost {wanted:,.0f} FLOPs a token at scale {scale.name}: with "
        f"feed-forwards of {MULTIPLE} it takes {narrow:,}, and {step:,} more for each {MULTIPLE} "
        "of width; choose a larger Scale.ffn, fewer keys or fewer memory layers"
    )


def parameters(model: Model, scale: Scale, ffn: int, vocab_size: int) -> tuple[int, int]:
    """All parameters, and how many of them are rows of tables."""
    scale = at_depth_of(model, scale)
    memory, shape = model.memory, shape_of(scale, ffn, vocab_size)
    if memory.enabled:
        memory = memory.resolve(scale.hidden)
        return total_parameters(shape, memory)["total"], table_parameters(memory)
    total = total_parameters(shape, None)["total"]
    flags = dict(model.flags)
    if experts := flags.get("num_experts"):
        assert isinstance(experts, int)
        layers = len(range(0, scale.layers, scale.every))
        router = experts * scale.hidden
        total += layers * ((experts - 1) * dense_parts(shape).ffn + router)
    return total, 0


def _memory(scale: Scale, name: str, variant: str, layers: tuple[int, ...], keys: int) -> Model:
    flags: Flags = {
        "memory_variant": variant,
        "memory_layers": layers,
        "memory_num_keys": keys,
        "memory_heads": scale.heads,
        "memory_topk": scale.topk,
        "memory_key_dim": scale.key_dim,
        "memory_qk_norm": True,
        "memory_value_init_std": INIT_STD,
    }
    return Model(name, variant, _frozen(flags))


def _changed(model: Model, name: str, flags: Flags) -> Model:
    return replace(model, name=name, flags=_frozen({**dict(model.flags), **flags}))


def _optimizers(base: Model, lean: list[Model]) -> list[Model]:
    """Lean ones at a faster rate; all at twice the steps, where seeds differ less than at once."""
    faster = [replace(m, name=f"{m.name}, values learn 4x", rates=(1.0, 4.0)) for m in lean]
    names = [(m, m.memory.memory_optimizer) for m in (base, *lean)]
    return faster + [replace(m, name=f"{name}{LONGER}", longer=2) for m, name in names]


def _frozen(flags: Flags) -> tuple[tuple[str, Flag], ...]:
    return tuple(flags.items())


def _si(number: int) -> str:
    """1,048,576 rows are 1m, 65,536 are 64k, as papers write them."""
    if number >= 2**20:
        return f"{number / 2**20:.3g}m"
    return f"{number / 2**10:.3g}k"
