"""Handles all differences between the supported releases of megatron-core."""

import copy
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.distributed import TorchFullyShardedDataParallel
from megatron.core.transformer import transformer_block
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.training import argument_utils, arguments, training

from megamem.hybrid_pattern import FEED_FORWARDS, PREDICTION, symbols
from megamem.patching import require


def _import_if_there(module: str) -> Any:
    """The module, or None in a release without it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        return None


# the module that defines core_transformer_config_from_args, which moved in 0.18
CONFIG_MODULE: Any = (
    argument_utils if hasattr(argument_utils, "core_transformer_config_from_args") else arguments
)

# None in releases before 0.18, which have no hybrid models
HybridModel: Any = getattr(
    _import_if_there("megatron.core.models.hybrid.hybrid_model"), "HybridModel", None
)

# before 0.19 it lacks the argument of finish_grad_sync() that finalize_model_grads() gives
RUNS_TORCH_FSDP2 = "finish_grad_sync" in vars(TorchFullyShardedDataParallel)

# the function of megatron.training that makes Muon in 0.17; None where get_megatron_optimizer does
MAKES_MUON: str | None = (
    "get_megatron_muon_optimizer" if hasattr(training, "get_megatron_muon_optimizer") else None
)


def block_submodules(
    config: TransformerConfig,
    spec: ModuleSpec | TransformerBlockSubmodules,
    vp_stage: int | None,
    pp_rank: int,
) -> TransformerBlockSubmodules:
    """The layer specs of this stage, one for each of its layers."""
    return require(transformer_block, "_get_block_submodules")(config, spec, vp_stage, pp_rank)


def stage_layers(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> list[int]:
    """Numbers, from 0, of the layers that a pipeline stage builds."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        counts = [[chunk.count(LayerType.decoder) for chunk in chunks] for chunks in layout.layout]
        stage = vp_stage or 0
        start = sum(chunks[vp] for vp in range(stage) for chunks in counts)
        start += sum(chunks[stage] for chunks in counts[:pp_rank])
        return list(range(start, start + counts[pp_rank][stage]))
    start = get_transformer_layer_offset(config, vp_stage, pp_rank)
    return list(range(start, start + get_num_layers_to_build(config, vp_stage, pp_rank)))


class TransformerEngineNorm:
    """Transformer Engine's separate norm, whose checkpoint holds its weights only.

    Transformer Engine would also save an extra state, although it is empty because a norm computes
    nothing in low precision, and could then not load checkpoints without this state, such as those
    of dense models and converted ones.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Build Transformer Engine's module from the arguments that Megatron passes to a norm."""
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm(*args, **kwargs)
        norm.register_state_dict_post_hook(_drop_extra_state)
        norm.register_load_state_dict_pre_hook(_supply_extra_state)
        return norm


def _drop_extra_state(norm: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    state.pop(f"{prefix}_extra_state", None)


def _supply_extra_state(norm: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.setdefault(f"{prefix}_extra_state", None)


def without_fused_norm(mlp: Any) -> Any:
    """The spec of a dense Transformer Engine MLP whose first linear layer does not apply the norm.

    With --use-transformer-engine-op-fuser the result is a plain MLP, because the fused MLP only
    accepts a first linear layer that applies the norm.
    """
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
    )

    submodules = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    if getattr(submodules, "linear_fc1", None) is not TELayerNormColumnParallelLinear:
        return mlp
    plain = copy.copy(submodules)
    plain.linear_fc1 = TEColumnParallelLinear
    if isinstance(mlp, partial):
        build = mlp.func
        if _fuses_operations(getattr(build, "__self__", None)):
            build = MLP.as_mlp_submodule
        return partial(build, *mlp.args, **{**mlp.keywords, "submodules": plain})
    changed = copy.copy(mlp)
    changed.submodules = plain
    if _fuses_operations(mlp.module):
        changed.module = MLP
    return changed


def _fuses_operations(mlp: Any) -> bool:
    """Whether this is the MLP class that --use-transformer-engine-op-fuser selects."""
    from megatron.core.extensions.transformer_engine import TEFusedMLP

    # the class is None if Transformer Engine is not installed
    return TEFusedMLP is not None and isinstance(mlp, type) and issubclass(mlp, TEFusedMLP)


def mlp_builder(mlp: Any) -> Callable[..., Any]:
    """A function that builds the module of an MLP slot and accepts every keyword of this release.

    Since 0.18 a slot holds such a builder. In 0.17, and in a user's own spec, it may hold a
    ModuleSpec, whose module may accept fewer keywords.
    """
    if not isinstance(mlp, ModuleSpec):
        return mlp

    def build(config: TransformerConfig, pg_collection: Any = None, **_: Any) -> Any:
        if isinstance(mlp.module, type) and issubclass(mlp.module, BaseMoELayer):
            return build_module(mlp, config=config, pg_collection=pg_collection)
        groups = {"tp_group": pg_collection.tp} if pg_collection is not None else {}
        return build_module(mlp, config=config, **groups)

    return build


def feed_forwards(args: Any) -> list[str]:
    """The feed-forward of each layer without memories: "dense", "experts", or "" for none."""
    if pattern := getattr(args, "hybrid_layer_pattern", None):
        return [FEED_FORWARDS.get(symbol, "") for symbol in symbols(pattern)]
    if getattr(args, "num_experts", None) is None:
        return ["dense"] * args.num_layers
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        frequency = [layer % frequency == 0 for layer in range(args.num_layers)]
    return ["experts" if has_experts else "dense" for has_experts in frequency]


def without_prediction(args: Any) -> Any:
    """The arguments of the model without multi-token prediction."""
    model = copy.copy(args)
    model.mtp_num_layers = None
    if pattern := getattr(args, "hybrid_layer_pattern", None):
        model.hybrid_layer_pattern = pattern.split(PREDICTION)[0]
    return model


def without_ffn(args: Any, kind: str) -> Any:
    """The arguments of a model in which the width of "dense", or of "experts", is 0."""
    bare = copy.copy(args)
    if kind == "experts":
        bare.moe_ffn_hidden_size = bare.moe_shared_expert_intermediate_size = 0
        bare.moe_latent_size = None
    else:
        # Megatron gives experts this width if they have none of their own
        if bare.num_experts is not None and bare.moe_ffn_hidden_size is None:
            bare.moe_ffn_hidden_size = bare.ffn_hidden_size
        bare.ffn_hidden_size = 0
    return bare
