"""Turns a MemoryConfig into a MemorySpec; no other module makes one."""

from typing import Literal

from megamem.config import ConfigurationError, MemoryConfig
from megamem.layers.variants import VARIANTS, Variant
from megamem.parallel.choices import choose_layout, choose_wire
from megamem.parallel.exchange_cost import USUAL_TOKENS, Exchange
from megamem.parallel.row_shard import COLUMN_BLOCK
from megamem.parallel.traffic import choose_reduced_rows, divisors, mode_problem
from megamem.spec import Grid, Layout, MemorySpec, Mode, ReducedRows


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

    Raises:
        ConfigurationError: the settings cannot work with this hidden size or these ranks.
    """
    variant = VARIANTS[config.memory_variant]
    value_dim = _value_dim(config, hidden_size, variant)
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
        lookups=config.memory_heads * config.memory_topk,
        tokens=microbatch_tokens,
        number_bytes=number_bytes,
        num_rows=config.memory_num_keys**2,
        weight_bytes=2 if config.memory_lookup_weights == "bf16" else 4,
        sends_tokens=variant.reads_tokens,
        pieces=config.memory_pieces,
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
    std = config.memory_value_init_std
    return MemorySpec(
        layers=tuple(sorted(config.memory_layers)),
        variant=config.memory_variant,
        hidden_size=hidden_size,
        num_keys=config.memory_num_keys,
        heads=config.memory_heads,
        topk=config.memory_topk,
        key_dim=config.memory_key_dim or variant.key_dim(value_dim),
        value_dim=value_dim,
        pool=config.memory_pool,
        qk_norm=config.memory_qk_norm,
        keep_ffn=config.memory_keep_ffn,
        value_init_std=value_dim**-0.5 if std is None else std,
        layout=layout,
        wire=choose_wire(config.memory_wire, layout.grid, exchange),
        pieces=config.memory_pieces,
        lookup_weights=config.memory_lookup_weights,
        placement_seed=config.memory_placement_seed,
        check_row_ids=config.memory_check_row_ids,
        tokens_vary=tokens_vary,
        seed=seed,
        timeout_minutes=timeout_minutes,
        reduce_rows=_reduced_rows(config, batch_tokens),
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
    )


def _reduced_rows(config: MemoryConfig, batch_tokens: int | None) -> ReducedRows:
    if config.memory_reduce_rows != "auto":
        return config.memory_reduce_rows
    readers = len(config.memory_layers) if config.memory_pool == "shared" else 1
    lookups = config.memory_heads * config.memory_topk * readers
    return choose_reduced_rows(config.memory_num_keys**2, lookups, batch_tokens)


def _value_dim(config: MemoryConfig, hidden_size: int, variant: Variant) -> int:
    if config.memory_value_dim is None and hidden_size % 8:
        raise ConfigurationError(
            f"--hidden-size {hidden_size} is not a multiple of 8, as the width of a row must be; "
            + _other_widths(hidden_size, variant)
        )
    value_dim = config.memory_value_dim or hidden_size
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
