"""The memory layers of a run with every default filled in.

MemoryConfig holds what a user asked for. MemorySpec holds what this means for one model on its
ranks: each width is a number, and the ranks that hold a table are known. `megamem.resolve` makes it
once, and every layer, optimizer, plan and report takes it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal

Mode = Literal["row", "column", "2d"]
Wire = Literal["alltoall", "allgather"]
ReducedRows = Literal["all", "touched"]
ExpansionProj = Literal["block", "single"]
Optimizer = Literal["adamw", "lazy_adamw", "rowwise_adamw", "sgd"]
OfModel = Literal["model"]
"""Stands in place of a number where the tables use the model's own setting."""


@dataclass(frozen=True)
class Grid:
    """The ranks of a memory group: node rows x node columns x local rows x local columns.

    Consecutive ranks form a node, in which the local column varies fastest; the node column varies
    faster than the node row. Rows of a table are divided over node rows x local rows, columns over
    node columns x local columns. What a node has in common crosses to other nodes once. A grid may
    treat other sets of consecutive ranks than those of one machine as its nodes.
    """

    node_rows: int = 1
    node_columns: int = 1
    local_rows: int = 1
    local_columns: int = 1

    @classmethod
    def parse(cls, text: str) -> "Grid":
        """Return the grid that a flag names, such as 1x16x8x1.

        Raises:
            ValueError: the text is not four positive numbers with an x between them.
        """
        sizes = [int(number) for number in text.split("x")]
        if len(sizes) != 4 or min(sizes) < 1:
            raise ValueError(text)
        return cls(*sizes)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.node_rows * self.node_columns

    @property
    def local(self) -> int:
        """Number of ranks of a node."""
        return self.local_rows * self.local_columns

    @property
    def size(self) -> int:
        """W, the ranks of the memory group."""
        return self.nodes * self.local

    @property
    def row_ranks(self) -> int:
        """Number of shards that the rows are divided into."""
        return self.node_rows * self.local_rows

    @property
    def column_ranks(self) -> int:
        """Number of shards that the columns of a row are divided into."""
        return self.node_columns * self.local_columns

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """Ranks along each axis, in the order of coordinates()."""
        return self.node_rows, self.node_columns, self.local_rows, self.local_columns

    def routes(self, wire: Wire) -> bool:
        """Whether a wire sends each lookup to the owner of its row alone."""
        return wire == "alltoall" and self.row_ranks > 1

    def coordinates(self, member: int) -> tuple[int, int, int, int]:
        """Return the node row, node column, local row and local column of a member."""
        node, local = divmod(member, self.local)
        return *divmod(node, self.node_columns), *divmod(local, self.local_columns)

    def member(self, coordinates: Sequence[int]) -> int:
        """Return the member that has these coordinates."""
        node_row, node_column, local_row, local_column = coordinates
        node = node_row * self.node_columns + node_column
        return node * self.local + local_row * self.local_columns + local_column

    def __str__(self) -> str:
        return f"{self.node_rows}x{self.node_columns}x{self.local_rows}x{self.local_columns}"


@dataclass(frozen=True)
class Layout:
    """How a table is sharded over the ranks of a memory group."""

    mode: Mode = "row"
    group_size: int = 1
    """W, the ranks of the memory group."""
    column_ranks: int = 1
    """Number of ranks that the columns of a row are divided over."""
    node_rows: int = 1
    """Number of sets of nodes that hold different rows."""
    node_columns: int = 1
    """Number of sets of nodes that hold different columns."""

    @classmethod
    def of_grid(cls, grid: Grid) -> "Layout":
        """Return the layout of a grid; its mode is the name of what the grid divides."""
        mode: Mode = "2d"
        if grid.column_ranks == 1:
            mode = "row"
        elif grid.row_ranks == 1:
            mode = "column"
        return cls(mode, grid.size, grid.column_ranks, grid.node_rows, grid.node_columns)

    @classmethod
    def of_mode(
        cls, mode: Mode, group_size: int, column_ranks: int, ranks_per_node: int
    ) -> "Layout":
        """Return the layout that a mode names: rows go over nodes before columns do.

        Where the nodes do not divide the group, or the column ranks neither divide a node nor
        consist of whole nodes, all ranks count as one node.
        """
        near, flat = min(group_size, ranks_per_node), cls(mode, group_size, column_ranks)
        if group_size % near:
            return flat
        nodes = group_size // near
        if column_ranks <= near and near % column_ranks == 0:
            return replace(flat, node_rows=nodes)
        if column_ranks % near == 0 and group_size % column_ranks == 0:
            columns = column_ranks // near
            return replace(flat, node_rows=nodes // columns, node_columns=columns)
        return flat

    @property
    def grid(self) -> Grid:
        """The layout of the ranks."""
        return Grid(
            self.node_rows,
            self.node_columns,
            self.row_ranks // self.node_rows,
            self.column_ranks // self.node_columns,
        )

    @property
    def row_ranks(self) -> int:
        """Number of ranks, or of sets of ranks, that the rows are divided over."""
        return self.group_size // self.column_ranks

    def __str__(self) -> str:
        if self.grid.nodes > 1:
            return f"grid {self.grid}"
        if self.mode == "2d":
            return f"2d {self.row_ranks} x {self.column_ranks}"
        return f"{self.mode} over {self.group_size}"

    @property
    def flags(self) -> str:
        """The command-line flags that select this layout."""
        if self.grid.nodes > 1:
            return f"--memory-grid {self.grid}"
        cut = f" --memory-column-ranks {self.column_ranks}" if self.mode == "2d" else ""
        return f"--memory-mode {self.mode} --memory-group-size {self.group_size}{cut}"


@dataclass(frozen=True, kw_only=True)
class MemorySpec:
    """The memory layers of one run. MemoryConfig describes what each setting does."""

    layers: tuple[int, ...]
    """Numbers of the memory layers, from 0, in ascending order."""
    variant: str
    """Name of the variant; megamem.layers.variants defines what it does."""
    hidden_size: int
    """D, the width of the hidden states."""
    num_keys: int
    """N, whose square is the number of rows of a table, for each of the layers that share it."""
    heads: int
    """H, the number of heads."""
    topk: int
    """K, the number of rows that a head reads; with Tucker scores, the number of sub-keys of each
    half that the first stage keeps."""
    key_dim: int
    """Q, the width of one head's query, both halves together."""
    value_dim: int
    """V, the width of a row of the values."""
    pool: Literal["shared", "layer"]
    qk_norm: bool
    keep_ffn: bool
    value_init_std: float

    # of UltraMem alone
    tucker_rank: int = 0
    """A, numbers per sub-key and query of which a core makes a score; 0 where scores are sums."""
    final_topk: int = 0
    """F, the number of rows that a head reads of the K * K pairs of the first stage."""
    cores: int = 1
    """O, the number of cores, each of which weights its own columns of a row."""
    expansion: int = 1
    """E, the number of virtual blocks that read the same rows, a square."""
    expansion_proj: ExpansionProj = "single"
    """Whether each block has a projection of its own, or all have one."""
    rank_queries: bool = False
    """Whether each Tucker rank has a query of its own."""
    pre_value_dim: int = 0
    """Width of a row of the pre-values; 0 where there are none."""
    skip: int = 0
    """The output of a memory is added this number of layers after the one where it reads."""
    query_conv: int = 0
    """Tokens that the convolution before the query sees; 0 for none."""
    core_aux_weight: float = 0
    core_aux_margin: float = 0.15
    balance_weight: float = 0
    lr_times: float = 1
    """Factor of the tables' learning rate at the start."""
    lr_times_until: float = 1
    """Part of the training after which this factor is 1."""
    share_layers: int = 1
    """g, the number of neighbouring memory layers that share their tables."""
    dropout: float = 0
    query_gain: float = 1
    """Initial gain of the norm of queries."""
    key_gain: float = 1
    """Initial gain of the norm of sub-keys."""
    init: Literal["paper", "released"] = "paper"
    placement: Literal["seed", "stored"] = "seed"
    """Whether the permutation of rows follows from a seed, or is part of a layer's state."""

    layout: Layout
    wire: Wire
    pieces: int = 1
    """Number of pieces in which the tokens of a layer pass, so that their exchanges overlap."""
    lookup_weights: Literal["fp32", "bf16"] = "fp32"
    """What the weights of lookups are rounded to before they are sent and used."""
    placement_seed: int
    check_row_ids: bool
    tokens_vary: bool
    """Whether the ranks that share a table may get sequences of different lengths."""
    seed: int
    """Seed of the run, on which the initial weights depend."""
    timeout_minutes: float
    """How long a collective of the ranks that share a table waits for one of them."""

    reduce_rows: ReducedRows
    """Rows whose gradients are summed over the replicas of a table."""
    optimizer: Optimizer
    stochastic_rounding: bool
    lr: float | OfModel
    lr_schedule: Literal["scheduled", "constant"]
    weight_decay: float | OfModel
    clip_grad: float | OfModel
    """Norm to which the tables' gradient is clipped; "model": it is clipped with the model's."""
    finetune_rows: int
    """T, the number of rows of a table that a step trains; 0 means all of them."""
    background: str
    """Checkpoint folder with the read counts of the background; empty for that of --load."""
    metrics: Literal["auto", "on", "off"]
    tuning: str = ""
    """File of `megamem tune`, or "off"; empty for the one in the user's cache folder."""

    @property
    def num_rows(self) -> int:
        """R, the number of rows of a table: N * N for each layer of --memory-share-layers."""
        return self.share_layers * self.num_keys**2

    @property
    def keys_per_side(self) -> int:
        """Number of sub-keys per query half that a layer has: their pairs are the E blocks of R
        rows, or fewer by the remainder where their number is no square."""
        return math.isqrt(self.expansion * self.num_rows)

    @property
    def timeout(self) -> timedelta:
        """timeout_minutes as a timedelta."""
        return timedelta(minutes=self.timeout_minutes)

    @property
    def reads_per_head(self) -> int:
        """The number of rows that a head reads for a token: F with Tucker scores, otherwise K."""
        return self.final_topk or self.topk

    @property
    def lookups_per_token(self) -> int:
        """L, the number of rows read for a token by all heads."""
        return self.heads * self.reads_per_head

    @property
    def bags_per_token(self) -> int:
        """Y, the number of sums that the lookups of a token are split into."""
        return self.expansion if self.expansion_proj == "block" else 1

    @property
    def read_width(self) -> int:
        """Width of a token's read-out: all of its bags."""
        return self.bags_per_token * self.value_dim


def next_multiple(number: int, of: int) -> int:
    """Return the smallest positive multiple of `of` that is not below a number."""
    return max(of, -(-number // of) * of)
