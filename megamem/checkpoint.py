"""How a value table lies in a checkpoint: as what it is, R rows of width V.

Every rank writes the piece it holds, at its place in the whole table; nothing is gathered, padded
or flattened, so that any other number of ranks, cutting by rows, columns or both, can read it back.
The optimizer's state lies beside it in the same way.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from megamem.parallel.row_shard import TableShard

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

TABLES = "memory_values"
"""Name, in the model, of what holds its value tables; checkpoint keys start with it."""

OPTIMIZER = "optimizer"
"""What checkpoint keys of optimizer state start with."""

SHARED = "shared"
"""Name of the table of `--memory-pool shared`."""


def table_key(table: str) -> str:
    """Checkpoint key of a table's weight."""
    return f"{TABLES}.{table}.weight"


def layer_table(layer: int) -> str:
    """Name of a layer's own table, under `--memory-pool layer`."""
    return f"layer_{layer}"


def sub_keys_key(layer: int) -> str:
    """Checkpoint key of a memory layer's sub-keys."""
    return f"decoder.layers.{layer}.mlp.memory.keys.sub_keys"


def state_key(table: str, slot: str) -> str:
    """Checkpoint key of a table's optimizer state."""
    return f"{OPTIMIZER}.{TABLES}.{table}.{slot}"


def placement_key(table: str) -> str:
    """Checkpoint key of the seed that placed a table's rows."""
    return f"{TABLES}.{table}.placement"


def sharded_piece(
    key: str, piece: Tensor, shard: TableShard, replica: int, per_row: bool = False
) -> "ShardedTensor":
    """This rank's piece of an [R, V] table, or of something with one number per row.

    Args:
        key: in the checkpoint.
        piece: [r, v], or [r] where per_row.
        shard: where it lies.
        replica: 0 on one of the ranks that hold this piece, another number on each other.
        per_row: the column ranks hold the same numbers.
    """
    # only who saves has imported Megatron: layers, which take names from here, have no need of it
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
        # None says that the pieces differ in size
        fragments if even else None,
        replica_id=(0, columns.rank if per_row else 0, replica),
    )


def same_everywhere(key: str, tensor: Tensor, shard: TableShard, replica: int) -> "ShardedTensor":
    """A tensor that all ranks of a table hold alike."""
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
