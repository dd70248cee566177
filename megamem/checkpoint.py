"""The format of value tables in a checkpoint: one [R, V] tensor for each table.

Every rank writes its shard, with its offset in the unsharded table. Nothing is gathered, padded or
flattened, so a run with any other number of ranks or any other --memory-mode can load it. The state
of the optimizer is stored in the same way. A rank's shard has r rows and v columns. The settings of
the layers are stored with them.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from megamem.parallel.row_shard import TableShard
from megamem.spec import MemorySpec

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

FORMAT = 1
"""Version of the settings, and of the keys and shapes of tables. A release of megamem reads every
version up to its own, and refuses newer ones."""

SAVED = "memory_settings"
"""Name of the settings in a checkpoint."""

SETTINGS = (
    *("layers", "variant", "num_keys", "heads", "topk", "key_dim", "value_dim"),
    *("pool", "qk_norm", "keep_ffn", "placement_seed"),
)
"""What settings_of() takes from a spec beside the hidden size; each has a flag --memory-NAME."""

TUCKER_SETTINGS = (
    *("final_topk", "tucker_rank", "cores", "expansion", "expansion_proj", "rank_queries"),
    *("pre_value_dim", "skip", "query_conv", "share_layers", "placement"),
)
"""What it takes besides where scores are those of UltraMem; the flags have the same names."""

TABLES = "memory_values"
"""Name of the submodule of the model that holds the value tables; keys start with it."""

OPTIMIZER = "optimizer"
"""Prefix of the keys of optimizer state."""

SHARED = "shared"
"""Name of the pool of `--memory-pool shared`."""


def table_key(table: str) -> str:
    """Return the checkpoint key of a table's weight."""
    return f"{TABLES}.{table}.weight"


def layer_table(layer: int) -> str:
    """Return the name of a layer's own pool, with `--memory-pool layer`."""
    return f"layer_{layer}"


def sub_keys_key(layer: int) -> str:
    """Return the checkpoint key of a memory layer's sub-keys."""
    return f"decoder.layers.{layer}.mlp.memory.keys.sub_keys"


def state_key(table: str, slot: str) -> str:
    """Return the checkpoint key of a tensor of a table's optimizer state."""
    return f"{OPTIMIZER}.{TABLES}.{table}.{slot}"


def placement_key(table: str) -> str:
    """Return the checkpoint key of the placement seed of a table."""
    return f"{TABLES}.{table}.placement"


def settings_of(spec: MemorySpec) -> dict[str, Any]:
    """Return everything that decides what memory layers compute: numbers, strings and lists.

    A checkpoint holds it, so that it never loads as something else than it was.
    """
    names = SETTINGS + (TUCKER_SETTINGS if spec.tucker_rank else ())
    found = {name: getattr(spec, name) for name in ("hidden_size", *names)}
    return {"format": FORMAT, **found, "layers": list(spec.layers)}


def sharded_piece(
    key: str, piece: Tensor, shard: TableShard, replica: int, per_row: bool = False
) -> "ShardedTensor":
    """Return a ShardedTensor for this rank's shard of an [R, V] tensor, or of an [R] one.

    Args:
        key: the key in the checkpoint.
        piece: [r, v], or [r] where per_row.
        shard: the position of the shard in the unsharded tensor.
        replica: number of this rank among those that hold the same shard; 0 on exactly one.
        per_row: whether the tensor has one number per row, which all column ranks hold.
    """
    # imported here, as the layers, which use the names above, do not need Megatron
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    rows, columns = shard.rows, shard.column_blocks
    dims = 1 if per_row else 2
    assert tuple(piece.shape) == shard.shape[:dims], (piece.shape, shard.shape)
    fragments = (rows.world_size, columns.world_size)[:dims]
    even = rows.even if per_row else shard.even
    return ShardedTensor(
        key,
        piece,
        piece.dtype,
        tuple(piece.shape),
        shard.global_shape[:dims],
        shard.offset[:dims],
        # None where the shards differ in size
        fragments if even else None,
        replica_id=(0, columns.rank if per_row else 0, replica),
    )


def same_everywhere(key: str, tensor: Tensor, shard: TableShard, replica: int) -> "ShardedTensor":
    """Return a ShardedTensor for a tensor that is replicated over all ranks of a table."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return ShardedTensor(
        key,
        tensor,
        tensor.dtype,
        tuple(tensor.shape),
        tuple(tensor.shape),
        (0,) * tensor.dim(),
        (1,) * tensor.dim(),
        replica_id=(shard.rows.rank, shard.column_blocks.rank, replica),
    )
