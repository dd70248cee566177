"""Descriptions of models with memories, for Megatron 0.19 and later, whose scripts choose them.

    described = gpt_config_from_args(args, model_config_cls=MemoryGPTModelConfig)
    described.memory = spec

They build what Megatron's own descriptions do, with memories in place of feed-forwards.
"""

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

try:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.training.models import gpt, hybrid
except ImportError as error:
    raise ImportError(
        "MemoryGPTModelConfig and MemoryHybridModelConfig need Megatron-Core 0.19 or later. Older "
        "releases have no descriptions of models; use memory_layer_spec() and register_tables()."
    ) from error

from megamem.layers.memory_pool import MemoryPool
from megamem.megatron.model.hybrid import memory_stack_spec
from megamem.megatron.model.layer_specs import memory_layer_spec
from megamem.megatron.model.memory_mlp import register_tables
from megamem.spec import MemorySpec


@dataclass(kw_only=True)
class MemoryGPTModelConfig(gpt.GPTModelConfig):
    """A GPT with memory layers; without a spec, Megatron's GPT."""

    builder: ClassVar[str] = f"{__name__}.MemoryGPTModelBuilder"
    memory: MemorySpec | None = None


class MemoryGPTModelBuilder(gpt.GPTModelBuilder):
    """Builds a MemoryGPTModelConfig, chunk by chunk or wrapped for training."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """One chunk, with the tables of its memories registered. All ranks must call it."""
        given: Any = self._model_config
        where = {"pg_collection": pg_collection, "vp_stage": vp_stage}
        pools: dict[str, MemoryPool] = {}

        def with_memories(config: Any, vp_stage: int | None) -> TransformerBlockSubmodules:
            block, found = memory_layer_spec(
                given.transformer, _layer_spec(given, vp_stage), given.memory, **where
            )
            pools.update(found)
            return block

        described = given
        if given.memory is not None:
            described = dataclasses.replace(given, transformer_layer_spec=with_memories)
        model = gpt.GPTModelBuilder(described).build_model(
            pg_collection, pre_process, post_process, vp_stage
        )
        register_tables(model, pools)
        return model


def _layer_spec(config: Any, vp_stage: int | None) -> Any:
    """What the description says of its layers: a spec, a function of it, or nothing."""
    spec = config.transformer_layer_spec
    if spec is None:
        return gpt.default_layer_spec(config, vp_stage)
    if callable(spec) and not isinstance(spec, ModuleSpec):
        takes_stage = "vp_stage" in inspect.signature(spec).parameters
        return spec(config, vp_stage=vp_stage) if takes_stage else spec(config)
    return spec


@dataclass(kw_only=True)
class MemoryHybridModelConfig(hybrid.HybridModelConfig):
    """A hybrid model with memory layers; without a spec, Megatron's."""

    builder: ClassVar[str] = f"{__name__}.MemoryHybridModelBuilder"
    memory: MemorySpec | None = None


class MemoryHybridModelBuilder(hybrid.HybridModelBuilder):
    """Builds a MemoryHybridModelConfig, chunk by chunk or wrapped for training."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> HybridModel:
        """One chunk, with the tables of its memories registered. All ranks must call it."""
        given: Any = self._model_config
        described = given
        pools: dict[str, MemoryPool] = {}
        if given.memory is not None:
            stack = given.hybrid_stack_spec or hybrid.default_hybrid_stack_spec
            stack, pools = memory_stack_spec(
                given.transformer,
                stack,
                given.memory,
                given.hybrid_layer_pattern,
                pg_collection=pg_collection,
                vp_stage=vp_stage,
            )
            described = dataclasses.replace(given, hybrid_stack_spec=stack)
        model = hybrid.HybridModelBuilder(described).build_model(
            pg_collection, pre_process, post_process, vp_stage
        )
        register_tables(model, pools)
        return model
