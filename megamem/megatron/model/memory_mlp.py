"""The memory layer as a module for the MLP slot of Megatron's transformer layer."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from megamem.checkpoint import (
    TABLES,
    placement_key,
    same_everywhere,
    sharded_piece,
    state_key,
    table_key,
)
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.layers.value_table import ValueTable
from megamem.megatron.model.fully_sharded import sharded_weight
from megamem.megatron.model.loss_scale import megatrons_loss_scale
from megamem.megatron.model.skip import Flight
from megamem.megatron.model.whole_sequences import need_whole_sequences
from megamem.optimizer.state import BATCHES, HITS
from megamem.parallel.memory_group import MemoryGroup
from megamem.spec import MemorySpec

FFNBuilder = Callable[..., nn.Module]


class MemoryMLP(MegatronModule):
    """Maps hidden states [S, B, D] to (output [S, B, D], bias or None), as Megatron's MLP does.

    With `--memory-keep-ffn` the output of the feed-forward that was in the slot is added, which is
    an MLP or a mixture of experts. To Megatron both are a dense layer, as it takes apart only
    layers of experts whose module is a MoELayer, and would leave out the memory.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        spec: MemorySpec,
        pool: MemoryPool,
        layer: int,
        ffn: FFNBuilder | None = None,
        flight: Flight | None = None,
        **slot: Any,
    ) -> None:
        """Build the layer's weights.

        Args:
            config: Megatron's config of the model.
            pg_collection: the process groups of the model; the tensor-parallel group is used.
            spec: the spec of the run.
            pool: the tables to read, which the caller registers in the model.
            layer: number of the layer in the model, from 0.
            ffn: builds the feed-forward that was in the slot, if it is kept.
            flight: takes the lookups to a later layer, which adds the memory.
            slot: all other keywords that this release passes to an MLP.
        """
        super().__init__(config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.memory = MemoryLayer(
            spec,
            pool,
            layer=layer,
            group=several_ranks(groups.tp),
            tokens_sharded=config.sequence_parallel,
            device=torch.cuda.current_device(),
            dtype=config.params_dtype,
        )
        for param in self.memory.parameters():
            # with this mark Megatron sums their gradients over the ranks, as it does for norms
            param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if self.memory.losses is not None:
            self.memory.losses.scale = megatrons_loss_scale()
        self.ffn = ffn(config=config, pg_collection=pg_collection, **slot) if ffn else None
        self.flight = flight

    def forward(self, hidden_states: Tensor, **how: Any) -> tuple[Tensor, Tensor | None]:
        """The output [S, B, D] and a bias or None; a kept feed-forward also gets `how`."""
        ffn, outputs = self.ffn, []
        if ffn is None:
            return self.memory(hidden_states), None
        if self.flight is not None:
            self.flight.launch(self.memory, hidden_states)
            return ffn(hidden_states, **how)
        # the feed-forward runs while the lookups are sent
        out = self.memory(
            hidden_states, meanwhile=lambda: outputs.append(ffn(hidden_states, **how))
        )
        ffn_out, bias = outputs.pop()
        return out + ffn_out, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As for any module; a weight that FSDP2 shards is stored as the unsharded one."""
        entries: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, weight in self.memory.named_parameters(f"{prefix}memory"):
            if isinstance(weight, DTensor):
                entries[name] = sharded_weight(entries[name], weight)
        return entries

    def backward_dw(self) -> None:
        """Compute the weight gradients that the backward left out, with --delay-wgrad-compute.

        These are gradients of a kept feed-forward alone: the backward of a memory computes all of
        its own.
        """
        if isinstance(self.ffn, MoELayer):
            # the attention does not compute those of shared experts, as it does in other layers
            self.ffn.backward_dw(routed_experts=True, shared_experts=True)
        elif self.ffn is not None:
            compute: Any = self.ffn.backward_dw
            compute()

    def set_layer_number(self, layer_number: int) -> None:
        """Check the number that TransformerLayer, which counts from 1, gives this layer.

        A mixture of experts logs its losses under this number.
        """
        assert layer_number == self.memory.layer + 1, (layer_number, self.memory.layer)
        number_ffn: Any = getattr(self.ffn, "set_layer_number", None)
        if number_ffn is not None:
            number_ffn(layer_number)


class ValueTables(MegatronModule):
    """The tables of a model chunk, registered once, although several layers may read them."""

    def __init__(self, config: TransformerConfig, pools: dict[str, MemoryPool]) -> None:
        super().__init__(config)
        for name, pool in pools.items():
            self.add_module(name, pool.tables)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Each table as shards of R x V, with its placement seed and, if saved, its read counts."""
        entries = {}
        for path, table in self.named_modules():
            if not isinstance(table, ValueTable):
                continue
            shard, replica, here = table.shard, table.group.replica, f"{prefix}{path}"
            weight, placement = table_key(table.name), placement_key(table.name)
            entries[f"{here}.weight"] = sharded_piece(weight, table.weight, shard, replica)
            entries[f"{here}.placement"] = same_everywhere(
                placement, table.placement, shard, replica
            )
            if table.reads is not None and table.reads.in_checkpoint:
                entries |= {f"{here}.{key}": part for key, part in counters(table).items()}
        return entries


def register_tables(model: nn.Module, pools: dict[str, MemoryPool]) -> None:
    """Register the tables that the memory layers of a model read; call it once for each chunk.

    Args:
        model: the chunk, a GPTModel or HybridModel.
        pools: the pools that memory_layer_spec() or memory_stack_spec() returned; may be empty.
            Those that another chunk of the model has registered are left out.
    """
    own = {name: pool for name, pool in pools.items() if not pool.registered}
    if own:
        model.add_module(TABLES, ValueTables(model.config, own))
    for pool in own.values():
        pool.registered = True
    need_whole_sequences(model, pools)


def counters(table: ValueTable) -> dict[str, Any]:
    """The read counters of a table as shards for a checkpoint; empty if it has no counters.

    They have keys of optimizer state, so a program that loads only the model does not need them.
    """
    if (reads := table.reads) is None:
        return {}
    shard, replica = table.shard, table.group.replica
    counts, batches = state_key(table.name, HITS), state_key(table.name, BATCHES)
    return {
        "read_counts": sharded_piece(counts, reads.counts, shard, replica, per_row=True),
        "batches": same_everywhere(batches, reads.batches, shard, replica),
    }


def build_pool(
    config: TransformerConfig, spec: MemorySpec, name: str, group: MemoryGroup
) -> MemoryPool:
    """A pool whose tables are sharded over a memory group and have no gradient in Megatron.

    The tables have their own optimizer, because Megatron would allocate, reduce and gather dense
    gradients of complete tables.
    """
    device = torch.cuda.current_device()
    pool = MemoryPool(spec, name, group, device=device, dtype=config.params_dtype)
    for table in pool:
        table.leave_to_optimizer()
        # so that Megatron's parameter counts add the shards of all ranks
        set_tensor_model_parallel_attributes(table.weight, True, 0, 1)
    return pool


def several_ranks(group: ProcessGroup) -> ProcessGroup | None:
    """The group, or None if it has one rank, so that no collective is called."""
    return group if torch.distributed.get_world_size(group) > 1 else None
