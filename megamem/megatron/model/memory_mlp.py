"""The memory layer as Megatron sees it: what stands in a transformer layer's MLP slot."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

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
from megamem.optimizer.state import BATCHES, HITS
from megamem.parallel.memory_group import MemoryGroup
from megamem.spec import MemorySpec

FFNBuilder = Callable[..., nn.Module]


class MemoryMLP(MegatronModule):
    """hidden states [S, B, D] -> (output, bias or None), as Megatron's MLP does.

    With `--memory-keep-ffn` the feed-forward that was in the slot stays, and both are added.
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
        **slot: Any,
    ) -> None:
        """Build the layer's weights.

        Args:
            config: Megatron's.
            pg_collection: the ranks of the tensor-parallel group share a sequence.
            spec: of the run.
            pool: its tables are registered in the model by the caller.
            layer: its number in the model, from 0.
            ffn: builds what was in the slot, where it stays.
            slot: whatever else this release passes to an MLP.
        """
        super().__init__(config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.memory = MemoryLayer(
            spec,
            pool,
            layer=layer,
            group=sharing(groups.tp),
            tokens_sharded=config.sequence_parallel,
            device=torch.cuda.current_device(),
            dtype=config.params_dtype,
        )
        for param in self.memory.parameters():
            # Megatron then sums their gradients over the ranks, as it does for norms
            param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.ffn = ffn(config=config, pg_collection=pg_collection, **slot) if ffn else None

    def forward(self, hidden_states: Tensor, **how: Any) -> tuple[Tensor, Tensor | None]:
        """The MLP's contract; `how` is passed on to a feed-forward that stays."""
        out_SBD = self.memory(hidden_states)
        if self.ffn is None:
            return out_SBD, None
        ffn_SBD, bias_D = self.ffn(hidden_states, **how)
        return out_SBD + ffn_SBD, bias_D

    def set_layer_number(self, layer_number: int) -> None:
        """Called by TransformerLayer, which counts from 1."""
        assert layer_number == self.memory.layer + 1, (layer_number, self.memory.layer)


class ValueTables(MegatronModule):
    """The tables of one model chunk, pool by pool: registered, sharded and saved once."""

    def __init__(self, config: TransformerConfig, pools: dict[str, MemoryPool]) -> None:
        super().__init__(config)
        for name, pool in pools.items():
            self.add_module(name, pool.tables)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Each table as pieces of R x V, the seed that placed its rows, and what read them."""
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
    """Make the tables that a model's memories read a part of the model; once for each chunk.

    Args:
        model: the chunk, a GPTModel or HybridModel.
        pools: as memory_layer_spec() or memory_stack_spec() returned them; there may be none.
    """
    if pools:
        model.add_module(TABLES, ValueTables(model.config, pools))


def counters(table: ValueTable) -> dict[str, Any]:
    """The counters of a table, where it has them, as pieces of a checkpoint.

    Their keys are those of optimizer state, which whoever wants the model alone leaves out.
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
    """Tables spread over a memory group, kept out of Megatron's gradient buffers.

    Their optimizer is their own: Megatron would allocate, reduce and gather dense gradients of it
    all.
    """
    device = torch.cuda.current_device()
    pool = MemoryPool(spec, name, group, device=device, dtype=config.params_dtype)
    for weight in pool.tables.parameters():
        weight.requires_grad_(False)
        # so that reports of sizes count every rank's piece
        set_tensor_model_parallel_attributes(weight, True, 0, 1)
    return pool


def sharing(group: ProcessGroup) -> ProcessGroup | None:
    """The group, or None where there is nobody to share with: then nothing is ever sent."""
    return group if torch.distributed.get_world_size(group) > 1 else None
