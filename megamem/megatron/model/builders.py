"""Descriptions of models with memory layers, for scripts that use Megatron 0.19 or later.

    described = gpt_config_from_args(args, model_config_cls=MemoryGPTModelConfig)
    described.memory = spec

They build the models of Megatron's own descriptions with memory layers in place of feed-forwards.
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
    """Describes a GPT with memory layers; if `memory` is None, it is Megatron's GPT."""

    builder: ClassVar[str] = f"{__name__}.MemoryGPTModelBuilder"
    memory: MemorySpec | None = None


class MemoryGPTModelBuilder(gpt.GPTModelBuilder):
    """Builds the model of a MemoryGPTModelConfig, by chunks or wrapped for training."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Build one chunk and register the tables of its memory layers; all ranks must call it."""
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
    """The layer spec of a description, which may hold a function that makes it, or None."""
    spec = config.transformer_layer_spec
    if spec is None:
        return gpt.default_layer_spec(config, vp_stage)
    if callable(spec) and not isinstance(spec, ModuleSpec):
        takes_stage = "vp_stage" in inspect.signature(spec).parameters
        return spec(config, vp_stage=vp_stage) if takes_stage else spec(config)
    return spec


@dataclass(kw_only=True)
class MemoryHybridModelConfig(hybrid.HybridModelConfig):
    """Describes a hybrid model with memory layers; if `memory` is None, it is Megatron's."""

    builder: ClassVar[str] = f"{__name__}.MemoryHybridModelBuilder"
    memory: MemorySpec | None = None


class MemoryHybridModelBuilder(hybrid.HybridModelBuilder):
    """Builds the model of a MemoryHybridModelConfig, by chunks or wrapped for training."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> HybridModel:
        """Build one chunk and register the tables of its memory layers; all ranks must call it."""
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
