"""Turns a MemoryConfig into a MemorySpec; no other module makes one."""

import itertools
import math
from dataclasses import replace
from typing import Any, Literal

from megamem.config import MAX_NUM_KEYS, ConfigurationError, MemoryConfig, flag
from megamem.layers.variants import VARIANTS, Variant
from megamem.layers.variants.variant import Tucker
from megamem.parallel.choices import choose_layout, choose_wire
from megamem.parallel.exchange_cost import USUAL_TOKENS, Exchange
from megamem.parallel.row_shard import COLUMN_BLOCK
from megamem.parallel.traffic import choose_reduced_rows, divisors, mode_problem
from megamem.spec import Grid, Layout, MemorySpec, Mode, ReducedRows, next_multiple


def resolve(
    config: MemoryConfig,
    hidden_size: int,
    *,
    tensor_ranks: int = 1,
    stage_ranks: int | None = None,
    ranks_per_node: int = 8,
    number_bytes: int = 2,
    link: float = 350e9,
    network: float = 45e9,
    seed: int = 1234,
    tokens_vary: bool = False,
    batch_tokens: int | None = None,
    microbatch_tokens: float = USUAL_TOKENS,
    timeout_minutes: float = 10,
    num_layers: int | None = None,
    ffn_width: int | None = None,
) -> MemorySpec:
    """The spec of a model of this hidden size: all widths, and the layout of its tables.

    Args:
        config: the settings.
        hidden_size: D, the width of the hidden states.
        tensor_ranks: the tensor-parallel size, which is the default of --memory-group-size.
        stage_ranks: number of ranks of a pipeline stage, a multiple of the size of a memory group;
            by default one memory group.
        ranks_per_node: number of neighbouring ranks that are connected by fast links.
        number_bytes: size of one element of a row.
        link, network: bandwidth of a rank in bytes per second, within a node and between nodes.
        seed: the seed of the run.
        tokens_vary: whether ranks that share a table may get sequences of different lengths.
        batch_tokens: tokens of a batch, of all ranks; None if they are not known.
        microbatch_tokens: tokens of a microbatch for which a rank makes the lookups, on which
            `auto` depends.
        timeout_minutes: how long a collective of a memory group waits for a rank.
        num_layers: layers of the model, on which initial values of UltraMem depend; by default up
            to the last memory layer.
        ffn_width: inner width of a feed-forward, on which they depend, too; by default 4 times the
            hidden size.

    Raises:
        ConfigurationError: the settings cannot work with this hidden size or these ranks.
    """
    variant = VARIANTS[config.memory_variant]
    tucker = _tucker(config, hidden_size, variant)
    value_dim = _value_dim(config, hidden_size, variant, tucker.get("cores", 1))
    heads, topk = config.memory_heads or variant.heads, config.memory_topk or variant.topk
    reads = tucker.get("final_topk", topk)
    grid = Grid.parse(config.memory_grid) if config.memory_grid else None
    size = config.asked_group_size or tensor_ranks
    stage = stage_ranks or size
    if stage % size:
        named = (
            f"--memory-grid {grid} has {size} ranks, which do"
            if grid
            else (f"--memory-group-size {size} does")
        )
        raise ConfigurationError(
            f"{named} not divide the {stage} ranks of a pipeline stage "
            f"(tensor x context x data parallel); use {'a grid of ' if grid else ''}one of "
            f"{', '.join(map(str, divisors(stage)))}{' ranks' if grid else ''}."
        )
    if grid and grid.column_ranks > value_dim // COLUMN_BLOCK:
        raise ConfigurationError(
            f"--memory-grid {grid} divides the columns of --memory-value-dim {value_dim} over "
            f"{grid.column_ranks} ranks, but each rank needs a block of {COLUMN_BLOCK} columns; "
            f"use a grid with at most {value_dim // COLUMN_BLOCK} node columns x local columns, "
            f"such as {Grid(grid.nodes, 1, grid.local, 1)}."
        )
    exchange = Exchange(
        width=value_dim,
        lookups=heads * reads,
        tokens=microbatch_tokens,
        number_bytes=number_bytes,
        num_rows=config.memory_share_layers * config.memory_num_keys**2,
        weight_bytes=2 if config.memory_lookup_weights == "bf16" else 4,
        sends_tokens=variant.reads_tokens,
        pieces=config.memory_pieces,
        cores=tucker.get("cores", 1),
        blocks=tucker["expansion"] if tucker.get("expansion_proj") == "block" else 1,
        token_width=tucker.get("pre_value_dim") or None,
        link=link,
        network=network,
    )
    if grid:
        layout = Layout.of_grid(grid)
    elif config.memory_mode == "auto" and variant.cuts_rows:
        layout = choose_layout(
            exchange, size, ranks_per_node=ranks_per_node, wire=config.memory_wire
        )
    else:
        neighbours = config.memory_column_ranks or min(tensor_ranks, size)
        mode: Mode = "row" if config.memory_mode == "auto" else config.memory_mode
        columns = {"row": 1, "column": size, "2d": neighbours}[mode]
        layout = Layout.of_mode(mode, size, columns, ranks_per_node)
    if layout.mode != "row" and not variant.cuts_rows:
        named, rows = f"--memory-mode {layout.mode}", "--memory-mode row"
        if grid:
            named = f"--memory-grid {grid}"
            rows = f"--memory-grid {Grid(grid.nodes, 1, grid.local, 1)}"
        raise ConfigurationError(
            f"{named} splits rows, but --memory-variant {config.memory_variant} needs complete "
            f"rows on a rank; use {rows}."
        )
    if problem := mode_problem(layout, value_dim):
        raise ConfigurationError(problem)
    spec = MemorySpec(
        layers=tuple(sorted(config.memory_layers)),
        variant=config.memory_variant,
        hidden_size=hidden_size,
        num_keys=config.memory_num_keys,
        heads=heads,
        topk=topk,
        key_dim=config.memory_key_dim or variant.key_dim(hidden_size, value_dim),
        value_dim=value_dim,
        pool=config.memory_pool or variant.pool,
        qk_norm=config.memory_qk_norm or variant.qk_norm,
        keep_ffn=config.memory_keep_ffn or variant.keeps_ffn,
        value_init_std=0,
        layout=layout,
        wire=choose_wire(config.memory_wire, layout.grid, exchange),
        pieces=config.memory_pieces,
        lookup_weights=config.memory_lookup_weights,
        placement_seed=config.memory_placement_seed,
        check_row_ids=config.memory_check_row_ids,
        tokens_vary=tokens_vary,
        seed=seed,
        timeout_minutes=timeout_minutes,
        reduce_rows=_reduced_rows(config, variant, heads * reads, batch_tokens),
        optimizer=config.memory_optimizer,
        stochastic_rounding=config.memory_stochastic_rounding,
        lr=_or_model(config.memory_lr),
        lr_schedule=config.memory_lr_schedule,
        weight_decay=_or_model(config.memory_weight_decay),
        clip_grad=_or_model(config.memory_clip_grad),
        finetune_rows=config.memory_finetune_rows or 0,
        background=config.memory_background or "",
        metrics=config.memory_metrics,
        tuning=config.memory_tuning or "",
        **tucker,
    )
    ConfigurationError.collect(_key_problems(spec))
    scales: dict[str, Any] = variant.initial_scales(
        spec, num_layers or max(spec.layers, default=0) + 1, ffn_width or 4 * hidden_size
    )
    if config.memory_value_init_std is not None:
        scales["value_init_std"] = config.memory_value_init_std
    return replace(spec, **scales)


_TUCKER = (
    *("final_topk", "tucker_rank", "cores", "expansion", "expansion_proj", "core_aux_weight"),
    *("lr_times", "pre_value_dim"),
)
"""Settings of variants with Tucker scores whose default is the variant's."""
_TUCKER_DEFAULTS = (
    *("query_conv", "skip", "share_layers", "dropout", "core_aux_margin", "balance_weight"),
    *("lr_times_until", "init", "placement"),
)
"""Their settings with defaults of their own."""


def _tucker(config: MemoryConfig, hidden_size: int, variant: Variant) -> dict[str, Any]:
    """The fields of a spec that belong to Tucker scores; none for other variants."""
    given = {name: getattr(config, f"memory_{name}") for name in (*_TUCKER, *_TUCKER_DEFAULTS)}
    given["rank_queries"] = config.memory_rank_queries
    usual = variant.tucker
    if usual is None:
        default = MemoryConfig()
        ConfigurationError.collect(
            [
                f"{flag(f'memory_{name}')} {value} needs --memory-variant ultramem or ultramem-v2, "
                f"but --memory-variant is {config.memory_variant}; drop {flag(f'memory_{name}')}."
                for name, value in given.items()
                if value != getattr(default, f"memory_{name}")
            ]
        )
        return {}
    found = {name: given[name] for name in _TUCKER_DEFAULTS}
    found |= {
        "final_topk": config.memory_final_topk or config.memory_topk or variant.topk,
        "tucker_rank": config.memory_tucker_rank or 2,
        "cores": config.memory_cores or 2,
        "expansion": config.memory_expansion or usual.expansion,
        "expansion_proj": config.memory_expansion_proj or usual.expansion_proj,
        "core_aux_weight": _or(config.memory_core_aux_weight, usual.core_aux_weight),
        "lr_times": _or(config.memory_lr_times, usual.lr_times),
        "rank_queries": usual.rank_queries
        if config.memory_rank_queries == "auto"
        else config.memory_rank_queries == "on",
        "pre_value_dim": 0,
    }
    if usual.pre_values:
        eighth = next_multiple(-(-hidden_size // 8), 8)
        found["pre_value_dim"] = config.memory_pre_value_dim or eighth
    ConfigurationError.collect(_tucker_problems(config, found, usual))
    return found


def _tucker_problems(config: MemoryConfig, found: dict[str, Any], usual: Tucker) -> list[str]:
    problems = []
    topk, final = config.memory_topk or VARIANTS[config.memory_variant].topk, found["final_topk"]
    side = math.isqrt(found["expansion"])
    if side**2 != found["expansion"]:
        problems.append(
            f"--memory-expansion {found['expansion']} is not a square, but the pairs of sqrt(E)*N "
            f"sub-keys must be E blocks of N*N rows; use {side**2} or {(side + 1) ** 2}."
        )
    if final > topk**2:
        problems.append(
            f"--memory-final-topk {final} is larger than the {topk**2} pairs of --memory-topk "
            f"{topk}; use --memory-final-topk {topk**2} or less, or --memory-topk "
            f"{math.isqrt(final - 1) + 1} or more."
        )
    if config.memory_pre_value_dim and not usual.pre_values:
        problems.append(
            f"--memory-pre-value-dim {config.memory_pre_value_dim} needs --memory-variant "
            f"ultramem-v2, but --memory-variant is {config.memory_variant}; use --memory-variant "
            "ultramem-v2, or drop --memory-pre-value-dim."
        )
    if config.memory_skip and not usual.skips:
        problems.append(
            f"--memory-skip {config.memory_skip} needs --memory-variant ultramem, as "
            f"--memory-variant {config.memory_variant} adds its output where it reads; drop "
            "--memory-skip."
        )
    problems += _span_problems(config)
    number, layers = found["share_layers"], len(config.memory_layers)
    if layers % number:
        problems.append(
            f"--memory-share-layers {number} does not divide the {layers} layers of "
            f"--memory-layers {' '.join(map(str, config.memory_layers))}, of which the last would "
            f"have more rows than the others; use one of {', '.join(map(str, divisors(layers)))}."
        )
    if number > 1 and config.memory_pool == "shared":
        problems.append(
            f"--memory-share-layers {number} and --memory-pool shared both say "
            "which layers share a table; drop one of them."
        )
    return problems


def _span_problems(config: MemoryConfig) -> list[str]:
    """A sentence if a memory would read before the one before it is added."""
    layers, skip = sorted(config.memory_layers), config.memory_skip
    near = [(a, b) for a, b in itertools.pairwise(layers) if b - a <= skip]
    if not near or not skip:
        return []
    (first, second), distance = near[0], min(b - a for a, b in near)
    return [
        f"--memory-skip {skip} adds the memory of layer {first} behind layer {first + skip}, but "
        f"the memory of layer {second} is to read first, and the lookups of one memory at a time "
        f"are on their way; use --memory-skip {distance - 1}, or --memory-layers that are at least "
        f"{skip + 1} apart."
    ]


def _key_problems(spec: MemorySpec) -> list[str]:
    """What is wrong with the number of sub-keys."""
    problems, per_side = [], spec.keys_per_side
    if spec.topk > per_side:
        problems.append(
            f"--memory-topk {spec.topk} is larger than --memory-num-keys {spec.num_keys}: a head "
            f"cannot read more rows than the {per_side} sub-keys per query half; use --memory-topk "
            f"{per_side} or less, or a larger --memory-num-keys."
            if spec.tucker_rank
            else f"--memory-topk {spec.topk} is larger than --memory-num-keys {spec.num_keys}: a "
            "head cannot read more rows than there are sub-keys per query half; use --memory-topk "
            f"{spec.num_keys} or less, or --memory-num-keys {spec.topk} or more."
        )
    if per_side > MAX_NUM_KEYS:
        problems.append(
            f"--memory-num-keys {spec.num_keys} with --memory-expansion {spec.expansion} and "
            f"--memory-share-layers {spec.share_layers} means {per_side} sub-keys per query half, "
            f"but at most {MAX_NUM_KEYS} have pairs whose number fits into 31 bits; use a smaller "
            "--memory-num-keys."
        )
    width = spec.key_dim // 2
    if spec.tucker_rank > width:
        problems.append(
            f"--memory-tucker-rank {spec.tucker_rank} is larger than the {width} numbers of half "
            f"a query of --memory-key-dim {spec.key_dim}; use a smaller --memory-tucker-rank."
        )
    return problems


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _reduced_rows(
    config: MemoryConfig, variant: Variant, lookups: int, batch_tokens: int | None
) -> ReducedRows:
    if config.memory_reduce_rows != "auto":
        return config.memory_reduce_rows
    shared = (config.memory_pool or variant.pool) == "shared"
    readers = len(config.memory_layers) if shared else config.memory_share_layers
    rows = config.memory_share_layers * config.memory_num_keys**2
    return choose_reduced_rows(rows, lookups * readers, batch_tokens)


def _value_dim(config: MemoryConfig, hidden_size: int, variant: Variant, cores: int) -> int:
    if config.memory_value_dim is None and variant.tucker is None and hidden_size % 8:
        raise ConfigurationError(
            f"--hidden-size {hidden_size} is not a multiple of 8, as the width of a row must be; "
            + _other_widths(hidden_size, variant)
        )
    value_dim = config.memory_value_dim or variant.value_dim(hidden_size, cores)
    if value_dim % (8 * cores):
        raise ConfigurationError(
            f"--memory-value-dim {value_dim} is not a multiple of 8 for each of --memory-cores "
            f"{cores}, which weight equal parts of a row; use "
            f"{next_multiple(value_dim, 8 * cores)}."
        )
    if not variant.projects and value_dim != hidden_size:
        raise ConfigurationError(
            f"--memory-value-dim {value_dim} differs from --hidden-size {hidden_size}, but "
            f"--memory-variant {config.memory_variant} has no projection between the two; use "
            "--memory-variant memory+ or drop --memory-value-dim."
        )
    return value_dim


def _other_widths(hidden_size: int, variant: Variant) -> str:
    """What to do about a hidden size that cannot be the width of a row."""
    near = -(-hidden_size // 8) * 8
    if variant.projects:
        return f"use --memory-value-dim {near}, or a --hidden-size such as {near}."
    return (
        f"use a --hidden-size such as {near}, or --memory-variant memory+ with "
        f"--memory-value-dim {near}."
    )


def _or_model(value: float | None) -> float | Literal["model"]:
    return "model" if value is None else value
