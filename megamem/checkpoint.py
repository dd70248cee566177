"""How a value table lies in a checkpoint: as what it is, R rows of width V.

Every rank writes the rows it holds, at their place in the whole table; nothing is gathered, padded
or flattened, so that any other number of ranks can read it back.
"""

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megamem.parallel.row_shard import RowShard

TABLES = "memory_values"
"""Name, in the model, of what holds its value tables; checkpoint keys start with it."""

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


def sharded_rows(key: str, rows_rV: Tensor, shard: RowShard, replica: int) -> ShardedTensor:
    """This rank's rows as a piece of the whole table.

    Args:
        key: in the checkpoint.
        rows_rV: the rows of `shard`.
        replica: 0 on one of the ranks that hold these rows, another number on each other.
    """
    even = shard.num_rows % shard.world_size == 0
    return ShardedTensor(
        key,
        rows_rV,
        rows_rV.dtype,
        tuple(rows_rV.shape),
        (shard.num_rows, rows_rV.shape[1]),
        (shard.start, 0),
        # None says that the pieces differ in size
        (shard.world_size, 1) if even else None,
        replica_id=(0, 0, replica),
    )
