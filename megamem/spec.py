"""What the memory layers of a run are, with everything decided.

MemoryConfig is what a person asks for; MemorySpec is what that means in one model on its ranks:
each width is a number, and a table lies over known ranks. `megamem.resolve` makes it once, and
every layer, optimizer, plan and report takes it.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

Mode = Literal["row", "column", "2d"]
Wire = Literal["alltoall", "allgather"]
Optimizer = Literal["adamw", "lazy_adamw", "rowwise_adamw", "sgd"]
OfModel = Literal["model"]
"""In place of a number: whatever the model itself is trained with."""


@dataclass(frozen=True)
class Layout:
    """How one table lies over the ranks of a memory group."""

    mode: Mode = "row"
    group_size: int = 1
    """W."""
    column_ranks: int = 1
    """Ranks over which the columns of a row are cut."""

    @property
    def row_ranks(self) -> int:
        """Ranks over which the rows are cut."""
        return self.group_size // self.column_ranks

    def __str__(self) -> str:
        if self.mode == "2d":
            return f"2d {self.row_ranks} x {self.column_ranks}"
        return f"{self.mode} over {self.group_size}"

    @property
    def flags(self) -> str:
        """The flags of a command line that asks for this layout."""
        cut = f" --memory-column-ranks {self.column_ranks}" if self.mode == "2d" else ""
        return f"--memory-mode {self.mode} --memory-group-size {self.group_size}{cut}"


@dataclass(frozen=True, kw_only=True)
class MemorySpec:
    """The memory layers of one run. MemoryConfig says what each choice means."""

    layers: tuple[int, ...]
    """Counted from 0, ascending."""
    variant: str
    """Its name; megamem.layers.variants has what it does."""
    hidden_size: int
    """D."""
    num_keys: int
    """N."""
    heads: int
    """H."""
    topk: int
    """K."""
    key_dim: int
    """Q."""
    value_dim: int
    """V."""
    pool: Literal["shared", "layer"]
    qk_norm: bool
    keep_ffn: bool
    value_init_std: float

    layout: Layout
    wire: Wire
    placement_seed: int
    check_row_ids: bool
    tokens_vary: bool
    """Sequences of different lengths may reach the ranks that share a table."""
    seed: int
    """Of the run: the initial weights depend on it."""
    timeout_minutes: float
    """How long a collective between the ranks that share a table may wait for one of them."""

    optimizer: Optimizer
    stochastic_rounding: bool
    lr: float | OfModel
    lr_schedule: Literal["scheduled", "constant"]
    weight_decay: float | OfModel
    clip_grad: float | OfModel
    """A norm at which the tables' gradient is clipped apart; "model": together with the model."""
    finetune_rows: int
    """T, rows of a table that a step trains; 0: all of them."""
    background: str
    """Checkpoint folder with the background's read counts; empty: those of --load."""
    metrics: Literal["auto", "on", "off"]

    @property
    def num_rows(self) -> int:
        """R, the rows of one value table."""
        return self.num_keys**2

    @property
    def timeout(self) -> timedelta:
        return timedelta(minutes=self.timeout_minutes)

    @property
    def lookups_per_token(self) -> int:
        """L = H * K."""
        return self.heads * self.topk
