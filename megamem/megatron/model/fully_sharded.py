"""Memory layers in a model that Megatron wraps with torch's FSDP2.

FSDP2 shards weights over data-parallel ranks and gathers those of a layer where it computes. The
value tables are left out of it, because they are sharded already and nothing needs more of them
than the rows that it reads: their rows stay where their memory group has them, and their optimizer
sums the gradients of replicas. All other weights of a memory layer are FSDP2's.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron.core.dist_checkpointing import optimizer as saved_optimizer
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import TorchFullyShardedDataParallel
from megatron.core.distributed import torch_fully_sharded_data_parallel as torch_fsdp
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from megamem.config import ConfigurationError
from megamem.layers.keys import Keys
from megamem.layers.value_table import ValueTable
from megamem.patching import replace

KEYS_AXIS = 2
"""The axis of sub-keys [2, H, N, C] that is sharded."""


def keep_tables_out_of_fsdp2() -> None:
    """Let Megatron's wrapper leave value tables out, and find the other weights when it saves.

    Call it before Megatron wraps a model; megamem.run does. A second call changes nothing.
    """
    replace(torch_fsdp, "fully_shard", leave_tables_out)
    replace(saved_optimizer, "to_local_if_dtensor", keep_local_tensor)


def refuse_sharded(tables: Mapping[str, ValueTable]) -> None:
    """Raise a ConfigurationError if FSDP2 shards a table, too."""
    sharded = [name for name, table in tables.items() if isinstance(table.weight, DTensor)]
    if sharded:
        raise ConfigurationError(
            f"FSDP2 was applied to value table {', '.join(sharded)}, of which it would gather all "
            "rows on every rank; call keep_tables_out_of_fsdp2() of "
            "megamem.megatron.model.fully_sharded before Megatron wraps the model."
        )


def is_fully_sharded(chunks: Iterable[nn.Module]) -> bool:
    """Whether Megatron wraps this model with torch's FSDP2."""
    return any(isinstance(chunk, TorchFullyShardedDataParallel) for chunk in chunks)


def leave_tables_out(fully_shard: Callable[..., Any]) -> Callable[..., Any]:
    """The fully_shard() of torch, which then ignores the value tables of a module.

    It also shards sub-keys along N instead of along the two halves of a query, because the ranks
    beyond the second would have nothing and all would gather the padding of their empty parts.
    """

    def fully_shard_without_tables(module: nn.Module, *, mesh: Any, **how: Any) -> Any:
        tables = {m.weight for m in module.modules() if isinstance(m, ValueTable)}
        keys = {m.sub_keys for m in module.modules() if isinstance(m, Keys)}
        if tables:
            how["ignored_params"] = tables | (how.get("ignored_params") or set())
        given = how.pop("shard_placement_fn", None)

        def place(weight: nn.Parameter) -> Any:
            # torch shards only its first axis unevenly
            if weight in keys and weight.shape[KEYS_AXIS] % mesh.size() == 0:
                return Shard(KEYS_AXIS)
            return None if given is None else given(weight)

        if keys or given is not None:
            how["shard_placement_fn"] = place
        return fully_shard(module, mesh=mesh, **how)

    return fully_shard_without_tables


def keep_local_tensor(to_local: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function with which Megatron gets the local tensor of a weight, to look it up.

    Since torch 2.15 the result of DTensor.to_local() is another object each time if the tensor is a
    parameter, and Megatron finds the state of no weight.
    """

    def to_local_if_dtensor(tensor: Any) -> Any:
        return tensor._local_tensor if isinstance(tensor, DTensor) else to_local(tensor)

    return to_local_if_dtensor


def sharded_weight(replicated: ShardedTensor, weight: DTensor) -> ShardedTensor:
    """The entry of a checkpoint for this rank's part of a weight of FSDP2.

    Megatron's own entry assumes that the first axis is sharded, and that ranks divide it.

    Args:
        replicated: Megatron's entry, of which the key and the tensor-parallel rank are taken.
        weight: the sharded weight.
    """
    mesh, (placement,) = weight.device_mesh, weight.placements
    assert isinstance(placement, Shard)
    # Megatron finds the state of a weight by the identity of this very tensor
    axis, ranks, local = placement.dim, mesh.size(), weight._local_tensor
    length = weight.shape[axis]
    start = min(length, mesh.get_local_rank() * -(-length // ranks))
    even = length % ranks == 0
    return ShardedTensor(
        replicated.key,
        local,
        local.dtype,
        tuple(local.shape),
        tuple(weight.shape),
        tuple(start if n == axis else 0 for n in range(weight.dim())),
        tuple(ranks if n == axis else 1 for n in range(weight.dim())) if even else None,
        # every part is the main one
        replica_id=(*replicated.replica_id[:2], 0),
    )
