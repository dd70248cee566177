"""Descriptions of models with memory layers, for scripts that use Megatron 0.19 or later.

    described = gpt_config_from_args(args, model_config_cls=MemoryGPTModelConfig)
    described.memory = spec

They build the models of Megatron's own descriptions with memory layers in place of feed-forwards.
"""

import dataclasses
import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec

try:
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


class _MemoryModelBuilder(ABC):
    """What both builders have in common: they build the chunk of a changed description."""

    plain: ClassVar[type]
    """Megatron's builder."""
    _model_config: Any

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Any:
        """Build one chunk and register the tables of its memory layers; all ranks must call it."""
        described: Any = self._model_config
        pools: dict[str, MemoryPool] = {}
        if described.memory is not None:
            described, pools = self.with_memories(described, pg_collection, vp_stage)
        model = self.plain(described).build_model(
            pg_collection, pre_process, post_process, vp_stage
        )
        register_tables(model, pools)
        return model

    @abstractmethod
    def with_memories(
        self, given: Any, pg_collection: ProcessGroupCollection, vp_stage: int | None
    ) -> tuple[Any, dict[str, MemoryPool]]:
        """The description with memories in its layer specs, and the pools that they read."""


@dataclass(kw_only=True)
class MemoryGPTModelConfig(gpt.GPTModelConfig):
    """Describes a GPT with memory layers; if `memory` is None, it is Megatron's GPT."""

    builder: ClassVar[str] = f"{__name__}.MemoryGPTModelBuilder"
    memory: MemorySpec | None = None


class MemoryGPTModelBuilder(_MemoryModelBuilder, gpt.GPTModelBuilder):
    """Builds the model of a MemoryGPTModelConfig, by chunks or wrapped for training."""

    plain = gpt.GPTModelBuilder

    def with_memories(
        self, given: Any, pg_collection: ProcessGroupCollection, vp_stage: int | None
    ) -> tuple[Any, dict[str, MemoryPool]]:
        block, pools = memory_layer_spec(
            given.transformer,
            _layer_spec(given, vp_stage),
            given.memory,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        return dataclasses.replace(given, transformer_layer_spec=block), pools


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


class MemoryHybridModelBuilder(_MemoryModelBuilder, hybrid.HybridModelBuilder):
    """Builds the model of a MemoryHybridModelConfig, by chunks or wrapped for training."""

    plain = hybrid.HybridModelBuilder

    def with_memories(
        self, given: Any, pg_collection: ProcessGroupCollection, vp_stage: int | None
    ) -> tuple[Any, dict[str, MemoryPool]]:
        stack, pools = memory_stack_spec(
            given.transformer,
            given.hybrid_stack_spec or hybrid.default_hybrid_stack_spec,
            given.memory,
            given.hybrid_layer_pattern,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        return dataclasses.replace(given, hybrid_stack_spec=stack), pools
