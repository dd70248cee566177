"""The memory layers of a run with every default filled in.

MemoryConfig holds what a user asked for. MemorySpec holds what this means for one model on its
ranks: each width is a number, and the ranks that hold a table are known. `megamem.resolve` makes it
once, and every layer, optimizer, plan and report takes it.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

Mode = Literal["row", "column", "2d"]
Wire = Literal["alltoall", "allgather"]
ReducedRows = Literal["all", "touched"]
Optimizer = Literal["adamw", "lazy_adamw", "rowwise_adamw", "sgd"]
OfModel = Literal["model"]
"""Stands in place of a number where the tables use the model's own setting."""


@dataclass(frozen=True)
class Layout:
    """How a table is sharded over the ranks of a memory group."""

    mode: Mode = "row"
    group_size: int = 1
    """W, the ranks of the memory group."""
    column_ranks: int = 1
    """Number of ranks that the columns of a row are divided over."""

    @property
    def row_ranks(self) -> int:
        """Number of ranks, or of sets of ranks, that the rows are divided over."""
        return self.group_size // self.column_ranks

    def __str__(self) -> str:
        if self.mode == "2d":
            return f"2d {self.row_ranks} x {self.column_ranks}"
        return f"{self.mode} over {self.group_size}"

    @property
    def flags(self) -> str:
        """The command-line flags that select this layout."""
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
    """N, the number of sub-keys per query half."""
    heads: int
    """H, the number of heads."""
    topk: int
    """K, the number of rows that a head reads."""
    key_dim: int
    """Q, the width of one head's query."""
    value_dim: int
    """V, the width of a row of a table."""
    pool: Literal["shared", "layer"]
    qk_norm: bool
    keep_ffn: bool
    value_init_std: float

    layout: Layout
    wire: Wire
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
        """R = N * N, the number of rows of a table."""
        return self.num_keys**2

    @property
    def timeout(self) -> timedelta:
        """timeout_minutes as a timedelta."""
        return timedelta(minutes=self.timeout_minutes)

    @property
    def lookups_per_token(self) -> int:
        """L = H * K, the number of rows read for a token."""
        return self.heads * self.topk
