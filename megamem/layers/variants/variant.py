"""The interface of a variant of memory layers.

All variants share the data path of MemoryLayer.forward: query, product keys, lookups sent to the
owners of rows, read-out there, output. A variant defines two of these steps and what they need:

    tables       the tables of a pool, all indexed by the same row ids
    read_out     on the owner of the rows: rows -> a sum for every bag
    output       on the rank of the token: read-out -> the output of the layer

The planner, checkpoints, converters and reports use the same object, so a new variant changes none
of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from megamem.layers.init import WeightFactory
from megamem.layers.keys import Keys
from megamem.layers.output import Output
from megamem.layers.product_keys import ProductKeys
from megamem.layers.query import Query
from megamem.layers.value_table import ReceivedLookups, ValueTable
from megamem.spec import ExpansionProj, MemorySpec

VALUES = "v"
"""The table that every variant has; in checkpoints it has the name of its pool."""


@dataclass(frozen=True)
class TableUse:
    """One table of a pool."""

    name: str = VALUES
    """Name within the pool."""

    read: Literal["bag", "dot"] = "bag"
    """bag: the weighted sum of the rows of each bag. dot: the dot product of each row with the
    token of its bag, which the owner of the row therefore needs."""


@dataclass(frozen=True, kw_only=True)
class Tucker:
    """What a variant with Tucker scores does where no flag says something else."""

    expansion: int
    expansion_proj: ExpansionProj
    rank_queries: bool
    core_aux_weight: float
    lr_times: float
    pre_values: bool = False
    """Whether there is a table of pre-values."""
    skips: bool = False
    """Whether the output may be added behind a later layer."""


class Variant(ABC):
    """One variant of memory layers."""

    heads: ClassVar[int] = 4
    """H for a model that does not set --memory-heads."""

    topk: ClassVar[int] = 32
    """K for a model that does not set --memory-topk."""

    pool: ClassVar[Literal["shared", "layer"]] = "shared"
    """The pools of a model that does not set --memory-pool."""

    keeps_ffn: ClassVar[bool] = False
    """Whether the feed-forward of a memory layer always stays beside it."""

    qk_norm: ClassVar[bool] = False
    """Whether queries and sub-keys are always normalized."""

    tucker: ClassVar[Tucker | None] = None
    """The defaults of a variant with Tucker scores; None where scores are sums."""

    tables: ClassVar[tuple[TableUse, ...]] = (TableUse(),)
    """The tables of a pool; the values come first."""

    cuts_rows: ClassVar[bool] = True
    """Whether a rank can work with some of the columns of a row, so that `--memory-mode column` and
    `2d` are possible."""

    projects: ClassVar[bool] = False
    """Whether the output projects read-outs of width V to the hidden size, so that the two may
    differ."""

    silent_output: ClassVar[tuple[str, ...]] = ()
    """Weights of the output that make the output of a new layer zero when they are zero. If there
    are none, the values are set to zero instead."""

    kept_widths: ClassVar[int] = 0
    """Number of [T, V] tensors that the output keeps from the forward to the backward."""

    gradient_widths: ClassVar[int] = 1
    """Number of [T, V] gradients that exist at the same time in the backward of the output."""

    def kept_per_lookup(self, cores: int) -> int:
        """Return the number of fp32 numbers per lookup that the read-out keeps for the backward,
        beside id and weights."""
        return 0

    @property
    def reads_tokens(self) -> bool:
        """Whether the owners of rows need the tokens, which are then sent with the lookups."""
        return any(use.read == "dot" for use in self.tables)

    def table_name(self, pool: str, use: TableUse) -> str:
        """Return the name of a table in the model, in checkpoints and in reports."""
        return pool if use.name == VALUES else f"{pool}.{use.name}"

    def key_dim(self, hidden_size: int, value_dim: int) -> int:
        """Return Q for a model that does not set --memory-key-dim."""
        return 256

    def value_dim(self, hidden_size: int, cores: int) -> int:
        """Return V for a model that does not set --memory-value-dim."""
        return hidden_size

    def table_width(self, spec: MemorySpec, use: TableUse) -> int:
        """Return the width of the rows of a table."""
        return spec.value_dim

    def init_std(self, spec: MemorySpec, use: TableUse) -> float:
        """Return the standard deviation of a table's initial rows."""
        return spec.value_init_std

    def initial_scales(self, spec: MemorySpec, num_layers: int, ffn_width: int) -> dict[str, float]:
        """Return the settings of a spec that follow from others and from the model.

        Args:
            spec: the settings, without those that are returned.
            num_layers: layers of the model.
            ffn_width: inner width of a feed-forward.
        """
        return {"value_init_std": spec.value_dim**-0.5}

    def query(self, spec: MemorySpec, make: WeightFactory) -> nn.Module:
        """Return the module that makes queries of tokens [T, D]."""
        return Query(spec, make)

    def keys(self, spec: MemorySpec, make: WeightFactory) -> Keys:
        """Return the module that chooses the rows that each query reads."""
        return ProductKeys(spec, make)

    def token(self, spec: MemorySpec, make: WeightFactory) -> nn.Module:
        """Return the module that makes of tokens [T, D] what the owners of rows get of them."""
        return nn.Identity()

    @abstractmethod
    def read_out(self, tables: Mapping[str, ValueTable], received: ReceivedLookups) -> Tensor:
        """Return what the rows of this rank contribute to each bag, [G, v].

        Args:
            tables: the tables of the pool, by their names within it.
            received: the lookups of this rank's rows.
        """

    @abstractmethod
    def output(self, spec: MemorySpec, make: WeightFactory) -> Output:
        """Return the module that turns a layer's read-outs into its output.

        Its weights are replicated. They are linears of megamem.layers.linear, or are used through
        `reduce_gradient`, so that their gradients are summed over the tokens of all ranks.
        """
