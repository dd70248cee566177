"""The only place where a setting of memory layers is declared.

The command-line flags are generated from MemoryConfig; no other module adds an argument or a
default. megamem.resolution turns the settings into a MemorySpec for one model on its ranks.
"""

from argparse import Namespace
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from megamem.spec import Grid, next_multiple

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

    memory_variant: Literal["memory", "memory+", "peer", "ultramem", "ultramem-v2"] = "memory+"
    """memory: the output is the weighted sum of the rows that were read. memory+: this sum is gated
    by silu(W x) and then projected. peer: an expert is a row u of one table and a row v of another,
    and contributes weight * gelu(u . x) * v. ultramem: the scores of rows are Tucker products, each
    core of which weights its own columns, and rows are read through E projections. ultramem-v2: an
    expert is a row p of the pre-values and a row v, and contributes score * (p . W x) * v. Both
    keep the feed-forward of their layers."""

    memory_num_keys: int = 1024
    """N, the number of sub-keys per query half; the value table has N*N rows. With
    --memory-expansion E there are sqrt(E)*N sub-keys."""

    memory_heads: int | None = None
    """Number of heads, which read the table independently; their results are summed. Default: 4; 2
    for ultramem, 1 for ultramem-v2."""

    memory_topk: int | None = None
    """Number of rows that each head reads for a token; with ultramem and ultramem-v2, the number of
    sub-keys of each half that its first stage keeps. Default: 32; 42 for ultramem."""

    memory_final_topk: int | None = None
    """For ultramem and ultramem-v2: number of rows that each head reads of the pairs of the first
    stage. Default: --memory-topk."""

    memory_key_dim: int | None = None
    """Q, the width of one head's query, both halves together. Default: half of the value width for
    memory+, 256 for memory and peer, the hidden size for ultramem and ultramem-v2."""

    memory_value_dim: int | None = None
    """V, the width of a row of the value table, a multiple of 8, and with ultramem and ultramem-v2
    of 8 times --memory-cores. Default: the hidden size; about a half of it for ultramem, three
    eighths for ultramem-v2."""

    memory_pre_value_dim: int | None = None
    """For ultramem-v2: width of a row of the pre-values and of the projected token, a multiple of
    8. Default: about an eighth of the hidden size."""

    memory_tucker_rank: int | None = None
    """For ultramem and ultramem-v2: numbers per sub-key and query of which a core makes a score.
    Default: 2."""

    memory_cores: int | None = None
    """For ultramem and ultramem-v2: number of cores. Rows are chosen by the score of their sum;
    each weights its own part of the columns. Default: 2."""

    memory_expansion: int | None = None
    """E, for ultramem and ultramem-v2: number of virtual blocks of rows that read the same N*N
    rows, a square. Default: 4 for ultramem, 1 for ultramem-v2."""

    memory_expansion_proj: Literal["block", "single"] | None = None
    """block: the rows of each virtual block are summed and projected by themselves. single: all are
    summed and projected once. Default: block for ultramem, single for ultramem-v2."""

    memory_rank_queries: Literal["auto", "on", "off"] = "auto"
    """For ultramem and ultramem-v2, whether each Tucker rank has a query of its own. auto: on for
    ultramem-v2."""

    memory_query_conv: int = 0
    """For ultramem and ultramem-v2: number of tokens that a causal depth-wise convolution before
    the query sees. 0: there is none."""

    memory_skip: int = 0
    """For ultramem: the output of a memory layer is added this number of layers after the one where
    it reads, so that the lookups are sent while the layers between are computed."""

    memory_share_layers: int = 1
    """For ultramem and ultramem-v2: number of neighbouring memory layers that share tables of as
    many rows as theirs would have together. Each has sub-keys for all of them."""

    memory_pool: Literal["shared", "layer"] | None = None
    """shared: all memory layers read one value table. Every pipeline stage that has memory layers
    holds this table, sharded over the ranks of the stage, and the gradients of these copies are
    summed once a step. layer: each memory layer has its own. Default: shared; layer for ultramem
    and ultramem-v2."""

    memory_qk_norm: bool = False
    """Apply RMSNorm with learnable gains to queries and sub-keys before they are compared. ultramem
    and ultramem-v2 always do."""

    memory_keep_ffn: bool = False
    """Keep the feed-forward of a memory layer and add the memory's output to its output. ultramem
    and ultramem-v2 always do."""

    memory_init: Literal["paper", "released"] = "paper"
    """For ultramem and ultramem-v2: initial weights and gains as their papers derive them, or those
    of the released code."""

    memory_value_init_std: float | None = None
    """Standard deviation of the initial values of a table; with peer, of its rows v only. Default:
    V**-0.5; for ultramem and ultramem-v2 as --memory-init says."""

    memory_dropout: float = 0
    """For ultramem and ultramem-v2: part of the numbers of a memory's output that are dropped in
    training."""

    memory_core_aux_weight: float | None = None
    """For ultramem and ultramem-v2: weight of the loss that keeps all singular values of a head's
    core but the first below --memory-core-aux-margin. Default: 0.001 for ultramem, 0 for
    ultramem-v2."""

    memory_core_aux_margin: float = 0.15
    """Singular values up to this one add nothing to the loss of --memory-core-aux-weight."""

    memory_balance_weight: float = 0
    """For ultramem and ultramem-v2: weight of the loss that makes all sub-keys chosen alike."""

    memory_lr: float | None = None
    """Peak learning rate of the value tables. Default: the model's --lr."""

    memory_lr_times: float | None = None
    """Factor of the learning rate of the value tables at the start of the training, which decays
    linearly to 1. Default: 1; 10 for ultramem."""

    memory_lr_times_until: float = 1.0
    """Part of the training after which the factor of --memory-lr-times is 1."""

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

    memory_placement: Literal["seed", "stored"] = "seed"
    """For ultramem and ultramem-v2. seed: the permutation is that of --memory-placement-seed.
    stored: it is part of each layer's state, as an imported checkpoint may need, and starts as that
    of the seed."""

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
        for name in (
            *("memory_num_keys", "memory_heads", "memory_topk", "memory_final_topk"),
            *("memory_key_dim", "memory_value_dim", "memory_pre_value_dim", "memory_tucker_rank"),
            *("memory_cores", "memory_expansion", "memory_share_layers", "memory_group_size"),
            *("memory_column_ranks", "memory_pieces", "memory_finetune_rows"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{flag(name)} {value} must be at least 1.")
        for name in ("memory_skip", "memory_query_conv"):
            if getattr(self, name) < 0:
                found.append(f"{flag(name)} {getattr(self, name)} must be zero or more.")
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
        for name in ("memory_value_dim", "memory_pre_value_dim"):
            width = getattr(self, name)
            if width is not None and width % 8:
                found.append(
                    f"{flag(name)} {width} is not a multiple of 8, the number of elements that "
                    f"kernels load at once; use {next_multiple(width, 8)}."
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
            "memory_lr_times",
            "memory_lr_times_until",
            "memory_core_aux_weight",
            "memory_core_aux_margin",
            "memory_balance_weight",
        ):
            value = getattr(self, name)
            # written in this way so that a NaN is refused, too
            if value is not None and not 0 <= value < float("inf"):
                found.append(f"{flag(name)} {value:g} must be a finite number, zero or more.")
        if not 0 <= self.memory_dropout < 1:
            found.append(
                f"--memory-dropout {self.memory_dropout:g} must be at least 0 and below 1."
            )
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
