"""The one place a setting of memory layers is declared.

Command-line flags are made from MemoryConfig; nothing else in the package adds an argument or a
default. What the settings mean for one model on its ranks is a MemorySpec (megamem.resolution).
"""

from argparse import Namespace
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

MAX_NUM_KEYS = 46340
"""N * N row ids fit into an int32."""


class ConfigurationError(ValueError):
    """What a run asks for cannot be done; the message names the flags, their values and the fix."""

    @classmethod
    def collect(cls, problems: list[str]) -> None:
        """Raise one error that lists every problem, or return when there is none."""
        if len(problems) == 1:
            raise cls(problems[0])
        if problems:
            lines = "".join(f"\n  {i}. {problem}" for i, problem in enumerate(problems, 1))
            raise cls(f"{len(problems)} settings cannot work:{lines}")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Product-key memory layers inside a Megatron transformer."""

    memory_layers: list[int] = field(default_factory=list)
    """Layers, counted from 0, whose feed-forward becomes a memory; without it memory is off."""

    memory_variant: Literal["memory", "memory+", "peer"] = "memory+"
    """memory: the read-out is the output. memory+: it is gated by silu(W x), then projected. peer:
    an expert is a row u of one table and a row v of another, and adds gelu(u x) v."""

    memory_num_keys: int = 1024
    """N, sub-keys per query half; the value table has N*N rows."""

    memory_heads: int = 4
    """Independent reads per token; their results are summed."""

    memory_topk: int = 32
    """Rows each head reads."""

    memory_key_dim: int | None = None
    """Q, width of one head's query, both halves together. Default: half of the value width for
    memory+, 256 for memory and peer."""

    memory_value_dim: int | None = None
    """V, width of one row of the value table, a multiple of 8. Default: the hidden size."""

    memory_pool: Literal["shared", "layer"] = "shared"
    """shared: one value table for all memory layers. layer: each layer has a table of its own."""

    memory_qk_norm: bool = False
    """RMS-normalise queries and sub-keys, with learnable gains, before they are compared."""

    memory_keep_ffn: bool = False
    """Keep the feed-forward of a memory layer and add the memory's output to it."""

    memory_value_init_std: float | None = None
    """Standard deviation of the initial values; of peer, of v alone. Default: V**-0.5."""

    memory_lr: float | None = None
    """Peak learning rate of the value table. Default: the model's --lr."""

    memory_lr_schedule: Literal["scheduled", "constant"] = "scheduled"
    """scheduled: the table's learning rate decays as the model's does. constant: it stays at
    --memory-lr once the warm-up is over."""

    memory_weight_decay: float | None = None
    """Weight decay of the value table. Default: the model's --weight-decay."""

    memory_clip_grad: float | None = None
    """Clip the gradient of the value tables apart, at this norm. Default: together with the model,
    at --clip-grad."""

    memory_optimizer: Literal["adamw", "lazy_adamw", "rowwise_adamw", "sgd"] = "adamw"
    """What updates the value table. adamw: exact AdamW on every row. lazy_adamw: touched rows only,
    each with a step count and a catch-up decay of its own; not Adam, as momentum waits with its
    row. rowwise_adamw: one second moment per row. sgd: no state."""

    memory_stochastic_rounding: bool = False
    """In a bf16 model, round the table's updates to bf16 at random, without bias, and keep no fp32
    copy of it."""

    memory_finetune_rows: int | None = None
    """T: finetune sparsely. Of each table, only the T rows are trained that a batch reads often and
    the background's batches seldom; all else stays as it was loaded, bit for bit. Needs
    --memory-optimizer sgd or lazy_adamw. Default: train everything."""

    memory_background: str | None = None
    """Checkpoint folder, as of --load, whose counts of rows read are the background of
    --memory-finetune-rows. Default: the counts in the checkpoint of --load."""

    memory_mode: Literal["row", "column", "2d", "auto"] = "row"
    """How a table is cut. row: each rank holds some rows. column: each rank holds some columns of
    every row. 2d: rows across, columns within sets of --memory-column-ranks neighbours. auto:
    whichever sends the fewest bytes. Results and checkpoints are the same."""

    memory_group_size: int | None = None
    """Ranks that one table is spread over, at most tensor x context x data parallel size; what is
    left are replicas. Default: the tensor-parallel size."""

    memory_column_ranks: int | None = None
    """Ranks that share a row in mode 2d. Default: the tensor-parallel size."""

    memory_placement_seed: int = 0
    """Decides which row of the table a pair of sub-keys reads, so that pairs that are read together
    lie on different ranks. Part of a checkpoint: it cannot change later."""

    memory_check_row_ids: bool = False
    """Look for row ids that the table does not have before every read, for debugging: a GPU has to
    wait for the answer."""

    memory_wire: Literal["auto", "alltoall", "allgather"] = "auto"
    """How lookups reach the ranks that own their rows. alltoall: each only to its owner, after the
    counts were exchanged (one host sync). allgather: all to all ranks, at fixed sizes, without a
    sync. auto: allgather up to 8 ranks, alltoall beyond."""

    memory_metrics: Literal["auto", "on", "off"] = "auto"
    """Measure how the memory is used, for TensorBoard, wandb and the log. auto: where
    --tensorboard-dir or --wandb-project is given."""

    def __post_init__(self) -> None:
        ConfigurationError.collect(self._problems())

    def _problems(self) -> list[str]:
        found = []
        layers = self.memory_layers
        if repeated := sorted({n for n in layers if layers.count(n) > 1}):
            found.append(
                f"--memory-layers {_words(layers)} names layer {_words(repeated)} more than once; "
                "name each layer once."
            )
        if negative := [n for n in layers if n < 0]:
            found.append(
                f"--memory-layers {_words(negative)}: layers are counted from 0; "
                "there are no negative ones."
            )
        positive = {
            "memory_num_keys": self.memory_num_keys,
            "memory_heads": self.memory_heads,
            "memory_topk": self.memory_topk,
            "memory_key_dim": self.memory_key_dim,
            "memory_value_dim": self.memory_value_dim,
            "memory_group_size": self.memory_group_size,
            "memory_column_ranks": self.memory_column_ranks,
            "memory_finetune_rows": self.memory_finetune_rows,
        }
        for name, value in positive.items():
            if value is not None and value < 1:
                found.append(f"{flag(name)} {value} must be at least 1.")
        if self.memory_topk > self.memory_num_keys:
            found.append(
                f"--memory-topk {self.memory_topk} is larger than --memory-num-keys "
                f"{self.memory_num_keys}: a head cannot read more rows than a half has sub-keys; "
                "lower the first or raise the second."
            )
        if self.memory_num_keys > MAX_NUM_KEYS:
            found.append(
                f"--memory-num-keys {self.memory_num_keys} is larger than {MAX_NUM_KEYS}: the "
                f"number of a row, at most --memory-num-keys squared, has to fit into 31 bits; use "
                f"at most {MAX_NUM_KEYS}."
            )
        if self.memory_key_dim is not None and self.memory_key_dim % 2:
            found.append(
                f"--memory-key-dim {self.memory_key_dim} is odd: a query is cut into two halves; "
                f"use {self.memory_key_dim + 1}."
            )
        if self.memory_value_dim is not None and self.memory_value_dim % 8:
            found.append(
                f"--memory-value-dim {self.memory_value_dim} is not a multiple of 8, which the "
                f"kernels load at once; use {_next_multiple(self.memory_value_dim, 8)}."
            )
        if self.memory_column_ranks is not None and self.memory_mode != "2d":
            found.append(
                f"--memory-column-ranks {self.memory_column_ranks} says how --memory-mode 2d cuts "
                f"rows, but the mode is {self.memory_mode}; use 2d or drop it."
            )
        sparse, rows = ("sgd", "lazy_adamw"), self.memory_finetune_rows
        if rows is not None and self.memory_optimizer not in sparse:
            found.append(
                f"--memory-finetune-rows {rows} leaves all other rows alone, but "
                f"--memory-optimizer {self.memory_optimizer} moves every row at every step; use "
                "--memory-optimizer sgd or lazy_adamw."
            )
        if self.memory_background is not None and rows is None:
            found.append(
                f"--memory-background {self.memory_background} is what --memory-finetune-rows "
                "compares a batch with, but that is not given; add it or drop this one."
            )
        if not 0 <= self.memory_placement_seed < 2**31:
            found.append(
                f"--memory-placement-seed {self.memory_placement_seed} must be from 0 to 2**31 - 1."
            )
        for name in (
            "memory_value_init_std",
            "memory_lr",
            "memory_weight_decay",
            "memory_clip_grad",
        ):
            value = getattr(self, name)
            # written so that a NaN is caught too
            if value is not None and not 0 <= value < float("inf"):
                found.append(f"{flag(name)} {value} must be a finite number, zero or more.")
        return found

    @property
    def enabled(self) -> bool:
        return bool(self.memory_layers)

    @classmethod
    def from_args(cls, args: Namespace) -> "MemoryConfig":
        """The settings in a parsed command line; fields it lacks keep their defaults.

        Raises:
            ConfigurationError: a setting, or two of them together, cannot work.
        """
        given = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, as a checkpoint stores them."""
        return asdict(self)


def flag(field_name: str) -> str:
    """The command-line flag of a field."""
    return "--" + field_name.replace("_", "-")


def _words(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def _next_multiple(number: int, of: int) -> int:
    return max(of, -(-number // of) * of)
