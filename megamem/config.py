"""The only place where a setting of memory layers is declared.

The command-line flags are generated from MemoryConfig; no other module adds an argument or a
default. megamem.resolution turns the settings into a MemorySpec for one model on its ranks.
"""

from argparse import Namespace
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from megamem.spec import Grid

MAX_NUM_KEYS = 46340
"""The largest N for which all N * N row ids fit into an int32."""


class ConfigurationError(ValueError):
    """The settings of a run cannot work; the message names the flags, their values and the fix."""

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
    """Numbers, from 0, of the layers whose feed-forward is replaced by a memory layer. Without this
    flag the model has no memory layers."""

    memory_variant: Literal["memory", "memory+", "peer"] = "memory+"
    """memory: the output is the weighted sum of the rows that were read. memory+: this sum is gated
    by silu(W x) and then projected. peer: an expert is a row u of one table and a row v of another,
    and contributes weight * gelu(u . x) * v."""

    memory_num_keys: int = 1024
    """N, the number of sub-keys per query half; the value table has N*N rows."""

    memory_heads: int = 4
    """Number of heads, which read the table independently; their results are summed."""

    memory_topk: int = 32
    """Number of rows that each head reads for a token."""

    memory_key_dim: int | None = None
    """Q, the width of one head's query, both halves together. Default: half of the value width for
    memory+, 256 for memory and peer."""

    memory_value_dim: int | None = None
    """V, the width of a row of the value table, a multiple of 8. Default: the hidden size."""

    memory_pool: Literal["shared", "layer"] = "shared"
    """shared: all memory layers read one value table. Every pipeline stage that has memory layers
    holds this table, sharded over the ranks of the stage, and the gradients of these copies are
    summed once a step. layer: each memory layer has its own."""

    memory_qk_norm: bool = False
    """Apply RMSNorm with learnable gains to queries and sub-keys before they are compared."""

    memory_keep_ffn: bool = False
    """Keep the feed-forward of a memory layer and add the memory's output to its output."""

    memory_value_init_std: float | None = None
    """Standard deviation of the initial values of a table; with peer, of its rows v only. Default:
    V**-0.5."""

    memory_lr: float | None = None
    """Peak learning rate of the value tables. Default: the model's --lr."""

    memory_lr_schedule: Literal["scheduled", "constant"] = "scheduled"
    """scheduled: the learning rate of the tables decays as the model's does. constant: it stays at
    --memory-lr after the warm-up."""

    memory_weight_decay: float | None = None
    """Weight decay of the value tables. Default: the model's --weight-decay."""

    memory_clip_grad: float | None = None
    """Norm to which the gradient of the value tables is clipped, separately from the model's.
    Default: it is clipped together with the model's gradient, to --clip-grad."""

    memory_optimizer: Literal["adamw", "lazy_adamw", "rowwise_adamw", "sgd"] = "adamw"
    """Optimizer of the value tables. adamw: exact AdamW on every row. lazy_adamw: AdamW on the rows
    that a batch read, each with its own step count and with the weight decay of the steps that it
    missed; it differs from AdamW because a row that is not read is not moved by its momentum.
    rowwise_adamw: AdamW with one second moment per row. sgd: no optimizer state."""

    memory_stochastic_rounding: bool = False
    """In a bf16 model, round the updates of the tables to bf16 stochastically and without bias, and
    keep no fp32 copy of the tables."""

    memory_finetune_rows: int | None = None
    """Turns on sparse memory finetuning: each step trains only T rows of each table, those that its
    batch reads often and the batches of the background read seldom. Everything else stays as it was
    loaded, bit for bit. Needs --memory-optimizer sgd or lazy_adamw. Default: train everything."""

    memory_background: str | None = None
    """Checkpoint folder, given as for --load, whose read counts of the rows are the background of
    --memory-finetune-rows. Default: the read counts in the checkpoint of --load."""

    memory_mode: Literal["row", "column", "2d", "auto"] = "row"
    """How a table is sharded. row: each rank holds some of the rows. column: each rank holds some
    columns of every row. 2d: each set of --memory-column-ranks neighbouring ranks holds some of the
    rows, and each rank of a set holds some of their columns. auto: the mode whose exchange is
    estimated to take the least time. The mode changes neither results nor checkpoints."""

    memory_group_size: int | None = None
    """Number of ranks that a table is sharded over; it must divide tensor x context x data parallel
    size, and each such group of ranks holds a replica. Default: the tensor-parallel size."""

    memory_column_ranks: int | None = None
    """Number of ranks that share a row in mode 2d. Default: the tensor-parallel size."""

    memory_grid: str | None = None
    """Names any layout, in place of --memory-mode: node rows x node columns x local rows x local
    columns, such as 1x16x8x1 for 16 nodes of 8 ranks. The rows of a table are divided over node
    rows x local rows, the columns over node columns x local columns, and the product of all four is
    the number of ranks that a table is sharded over. What the ranks of a node have in common
    crosses to other nodes once."""

    memory_pieces: int = 1
    """Number of pieces in which the tokens of a layer pass through the exchange. The exchange of
    one piece overlaps with the reads of another. The forward is the same bit for bit; the gradient
    of a row is summed piece by piece, so it differs by rounding."""

    memory_lookup_weights: Literal["fp32", "bf16"] = "fp32"
    """What the weights of lookups are rounded to, once, before they are sent and used. bf16 sends 2
    bytes fewer per lookup to every rank."""

    memory_placement_seed: int = 0
    """Seed of the permutation that maps pairs of sub-keys to rows of the table, so that pairs that
    are often read together lie on different ranks. It is saved in checkpoints and cannot be changed
    later."""

    memory_check_row_ids: bool = False
    """For debugging, check before every read that the table has the rows asked for. On a GPU, each
    check makes the host wait for the device."""

    memory_wire: Literal["auto", "alltoall", "allgather"] = "auto"
    """Collective that sends lookups to the ranks that own their rows. alltoall: each lookup is sent
    to the owner of its row only, after the ranks have exchanged their counts (one host sync).
    allgather: every lookup is sent to all ranks, in messages of fixed size, without a host sync.
    auto: the one that is estimated to be faster from the layout, the tokens of a microbatch, the
    width of a row and the links; usually allgather on up to 8 ranks, and alltoall on more."""

    memory_reduce_rows: Literal["auto", "all", "touched"] = "auto"
    """Rows of a table whose gradients are summed over its replicas in each step. all: every row.
    touched: those that the batch read on any replica, for whose number the host waits once a step.
    auto: touched if a batch is expected to read at most half of the rows. It changes nothing in
    the result."""

    memory_metrics: Literal["auto", "on", "off"] = "auto"
    """Measure how the memory is used, and report it to TensorBoard, wandb and the log. auto: on if
    --tensorboard-dir or --wandb-project is given."""

    memory_tuning: str | None = None
    """File of `megamem tune` with the block sizes and forms that kernels use; all ranks use those
    that rank 0 reads. off: use the built-in ones. They change results by rounding only: the order
    of sums, and which of two sub-keys is read whose scores are equal up to rounding. Default: the
    file for this kind of GPU in the user's cache folder, if there is one."""

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
                f"--memory-layers {_words(negative)} is negative: layers are counted from 0; "
                "use numbers of 0 or more."
            )
        positive = {
            "memory_num_keys": self.memory_num_keys,
            "memory_heads": self.memory_heads,
            "memory_topk": self.memory_topk,
            "memory_key_dim": self.memory_key_dim,
            "memory_value_dim": self.memory_value_dim,
            "memory_group_size": self.memory_group_size,
            "memory_column_ranks": self.memory_column_ranks,
            "memory_pieces": self.memory_pieces,
            "memory_finetune_rows": self.memory_finetune_rows,
        }
        for name, value in positive.items():
            if value is not None and value < 1:
                found.append(f"{flag(name)} {value} must be at least 1.")
        if self.memory_topk > self.memory_num_keys > 0:
            found.append(
                f"--memory-topk {self.memory_topk} is larger than --memory-num-keys "
                f"{self.memory_num_keys}: a head cannot read more rows than there are sub-keys per "
                f"query half; use --memory-topk {self.memory_num_keys} or less, or "
                f"--memory-num-keys {self.memory_topk} or more."
            )
        if self.memory_num_keys > MAX_NUM_KEYS:
            found.append(
                f"--memory-num-keys {self.memory_num_keys} is larger than {MAX_NUM_KEYS}: row ids, "
                "which go up to its square, must fit into 31 bits; use at most "
                f"{MAX_NUM_KEYS}."
            )
        if self.memory_key_dim is not None and self.memory_key_dim % 2:
            found.append(
                f"--memory-key-dim {self.memory_key_dim} is odd, but a query has two halves; "
                f"use {self.memory_key_dim + 1}."
            )
        if self.memory_value_dim is not None and self.memory_value_dim % 8:
            found.append(
                f"--memory-value-dim {self.memory_value_dim} is not a multiple of 8, the "
                "number of elements that kernels load at once; use "
                f"{_next_multiple(self.memory_value_dim, 8)}."
            )
        if self.memory_column_ranks is not None and self.memory_mode != "2d":
            found.append(
                f"--memory-column-ranks {self.memory_column_ranks} needs --memory-mode 2d, but "
                f"--memory-mode is {self.memory_mode}; use --memory-mode 2d or drop "
                "--memory-column-ranks."
            )
        found.extend(self._grid_problems())
        sparse, rows = ("sgd", "lazy_adamw"), self.memory_finetune_rows
        if rows is not None and self.memory_optimizer not in sparse:
            found.append(
                f"--memory-finetune-rows {rows} must leave all other rows unchanged, but "
                f"--memory-optimizer {self.memory_optimizer} updates every row at every step; use "
                "--memory-optimizer sgd or lazy_adamw."
            )
        if self.memory_background is not None and rows is None:
            found.append(
                f"--memory-background {self.memory_background} needs --memory-finetune-rows, which "
                "is not given; add --memory-finetune-rows or drop --memory-background."
            )
        if not 0 <= self.memory_placement_seed < 2**31:
            found.append(
                f"--memory-placement-seed {self.memory_placement_seed} must be from 0 to "
                f"{2**31 - 1}."
            )
        for name in (
            "memory_value_init_std",
            "memory_lr",
            "memory_weight_decay",
            "memory_clip_grad",
        ):
            value = getattr(self, name)
            # written in this way so that a NaN is refused, too
            if value is not None and not 0 <= value < float("inf"):
                found.append(f"{flag(name)} {value:g} must be a finite number, zero or more.")
        return found

    def _grid_problems(self) -> list[str]:
        text = self.memory_grid
        if text is None:
            return []
        try:
            size = Grid.parse(text).size
        except ValueError:
            return [
                f"--memory-grid {text} must be four positive numbers, node rows x node columns x "
                "local rows x local columns; use for example 1x2x8x1."
            ]
        found = []
        if self.memory_mode != "row":
            found.append(
                f"--memory-grid {text} and --memory-mode {self.memory_mode} both name a layout; "
                "drop one of them."
            )
        if self.memory_group_size not in (None, size):
            found.append(
                f"--memory-grid {text} has {size} ranks, which --memory-group-size "
                f"{self.memory_group_size} contradicts; drop --memory-group-size or use {size}."
            )
        return found

    @property
    def asked_group_size(self) -> int | None:
        """Number of ranks that a table is to be sharded over; None for the default."""
        return Grid.parse(self.memory_grid).size if self.memory_grid else self.memory_group_size

    @property
    def enabled(self) -> bool:
        """Whether the model has memory layers."""
        return bool(self.memory_layers)

    @classmethod
    def from_args(cls, args: Namespace) -> "MemoryConfig":
        """The settings of a parsed command line; a field that it lacks keeps its default.

        Raises:
            ConfigurationError: a setting or a combination of settings cannot work.
        """
        given = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain numbers, strings and lists, as a checkpoint stores them."""
        return asdict(self)


def flag(field_name: str) -> str:
    """The command-line flag of a field of MemoryConfig."""
    return "--" + field_name.replace("_", "-")


def _words(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def _next_multiple(number: int, of: int) -> int:
    return max(of, -(-number // of) * of)
