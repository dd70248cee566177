"""What differs between the supported releases of megatron-core lives here alone."""

import copy
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core import utils as core_utils
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import transformer_block
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.training import argument_utils, arguments, get_args, training
from megatron.training import utils as training_utils
from megatron.training.global_vars import set_global_variables
from megatron.training.initialize import initialize_megatron

from megamem.config import ConfigurationError
from megamem.hybrid_pattern import FEED_FORWARDS, symbols
from megamem.patching import require


def _import_if_there(module: str) -> Any:
    """The module, or None in a release without it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        return None


# where core_transformer_config_from_args is defined, which moved in 0.18
CONFIG_ROOM: Any = (
    argument_utils if hasattr(argument_utils, "core_transformer_config_from_args") else arguments
)

# hybrid models, which came in 0.18
HybridModel: Any = getattr(
    _import_if_there("megatron.core.models.hybrid.hybrid_model"), "HybridModel", None
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
    """Numbers, from 0, of the layers that a stage builds."""
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
    """What Transformer Engine's specs use for a norm that stands alone, saved as its weights.

    The norm itself would also save an extra state, empty as it computes nothing in low precision,
    and could not be loaded from checkpoints without one: those of other layers, and converted ones.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Megatron's arguments, Transformer Engine's module."""
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
    """A dense Transformer Engine MLP's spec with a first linear that does not normalise.

    It is a plain MLP also where Megatron was told to fuse its operations: the fused one takes no
    other first linear than the one that normalises.
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
    """Whether this is the class of an MLP that --use-transformer-engine-op-fuser asks for."""
    from megatron.core.extensions.transformer_engine import TEFusedMLP

    # which is None without Transformer Engine
    return TEFusedMLP is not None and isinstance(mlp, type) and issubclass(mlp, TEFusedMLP)


def mlp_builder(mlp: Any) -> Callable[..., Any]:
    """What builds the module of an MLP slot, called as this release calls it.

    Since 0.18 a slot holds a builder that takes all keywords; in 0.17, and where a user's spec says
    so, it holds a ModuleSpec, whose module may take fewer.
    """
    if not isinstance(mlp, ModuleSpec):
        return mlp

    def build(config: TransformerConfig, pg_collection: Any = None, **_: Any) -> Any:
        groups = {"tp_group": pg_collection.tp} if pg_collection is not None else {}
        return build_module(mlp, config=config, **groups)

    return build


def feed_forwards(args: Any) -> list[str]:
    """What each of the model's layers, before memories, has: "dense", "experts", or "" for none."""
    if pattern := getattr(args, "hybrid_layer_pattern", None):
        return [FEED_FORWARDS.get(symbol, "") for symbol in symbols(pattern)]
    if getattr(args, "num_experts", None) is None:
        return ["dense"] * args.num_layers
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        frequency = [layer % frequency == 0 for layer in range(args.num_layers)]
    return ["experts" if has_experts else "dense" for has_experts in frequency]


def without_ffn(args: Any, kind: str) -> Any:
    """The command line of a model whose "dense", or whose "experts", have no width."""
    bare = copy.copy(args)
    if kind == "experts":
        bare.moe_ffn_hidden_size = bare.moe_shared_expert_intermediate_size = 0
        bare.moe_latent_size = None
    else:
        # Megatron lets experts take this width where they have none of their own
        if bare.num_experts is not None and bare.moe_ffn_hidden_size is None:
            bare.moe_ffn_hidden_size = bare.ffn_hidden_size
        bare.ffn_hidden_size = 0
    return bare


# what a training script does differently from release to release


def build_gpt(args: Any, config: TransformerConfig | None = None) -> Callable[..., Any]:
    """What makes a stage of the GPT of a command line of groups, pre_process, post_process and
    vp_stage.
    """
    if hasattr(argument_utils, "gpt_config_from_args"):
        described = argument_utils.gpt_config_from_args(args, config)
        return described.get_builder_cls()(described).build_model
    # before 0.19 every script did it itself
    config = config or CONFIG_ROOM.core_transformer_config_from_args(args)

    def build_model(
        groups: ProcessGroupCollection, pre_process: bool, post_process: bool, vp_stage: int | None
    ) -> GPTModel:
        spec = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=args.transformer_impl == "transformer_engine",
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=vp_stage,
        )
        return GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            vp_stage=vp_stage,
            pg_collection=groups,
        )

    return build_model


def build_hybrid(args: Any, config: TransformerConfig | None = None) -> Callable[..., Any]:
    """The same for a hybrid model.

    Raises:
        ConfigurationError: in 0.17, which has none.
    """
    if HybridModel is None:
        raise ConfigurationError(
            "hybrid models need Megatron-Core 0.18 or later; train a GPT, or install that"
        )
    described = argument_utils.hybrid_config_from_args(args, config)
    return described.get_builder_cls()(described).build_model


def next_batch(data_iterator: Iterator[dict] | None, fields: Sequence[str]) -> dict[str, Any]:
    """This rank's part of the next microbatch; a field that its stage does not need is None.

    One rank of a tensor-parallel group has the iterator, and tells the others.
    """
    args = get_args()
    if hasattr(training_utils, "get_batch_on_this_tp_rank"):  # 0.17
        batch = training_utils.get_batch_on_this_tp_rank(data_iterator)
        batch = {name: batch[name] for name in fields}
        return core_utils.get_batch_on_this_cp_rank(batch)
    batch = dict.fromkeys(fields)
    if data_iterator is not None:
        sample = next(data_iterator)
        batch |= {name: sample[name].cuda(non_blocking=True) for name in batch if name in sample}
    broadcast = core_utils.get_batch_on_this_tp_rank
    absent = ("is_sft", "has_cu_seqlens", "is_hybrid_cp", "mtp_on_this_rank")
    known = inspect.signature(broadcast).parameters
    batch = broadcast(
        batch,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        cp_size=args.context_parallel_size,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
        **{name: False for name in absent if name in known},
    )
    batch.setdefault("cu_seqlens", None)
    cp_group = parallel_state.get_context_parallel_group()
    return core_utils.get_batch_on_this_cp_rank(batch, False, cp_group=cp_group)


def read_args(
    extra_args_provider: Callable[..., Any] | None = None,
    args_defaults: dict[str, Any] | None = None,
) -> Any:
    """The command line, checked, and Megatron's globals made of it."""
    if hasattr(arguments, "parse_and_validate_args"):
        return arguments.parse_and_validate_args(extra_args_provider, False, args_defaults or {})
    # 0.17 does this while it initialises
    args = arguments.parse_args(extra_args_provider)
    arguments.validate_args(args, args_defaults or {})
    set_global_variables(args)
    return args


def initialize(extra_args_provider: Callable[..., Any] | None = None) -> Any:
    """Read the command line and make the process groups, for a script that does not train."""
    if hasattr(arguments, "parse_and_validate_args"):
        read_args(extra_args_provider)
        initialize_megatron()
    else:
        initialize_megatron(extra_args_provider)
    return get_args()


def train(
    datasets_provider: Callable[..., Any],
    model_provider: Callable[..., Any],
    forward_step: Callable[..., Any],
    args_defaults: dict[str, Any],
) -> None:
    """Read the command line and run Megatron's loop."""
    # every rank calls the provider, and Megatron's builder of datasets tells the ranks apart
    vars(datasets_provider)["is_distributed"] = True
    given = {
        "train_valid_test_dataset_provider": datasets_provider,
        "model_provider": model_provider,
        "model_type": ModelType.encoder_or_decoder,
        "forward_step_func": forward_step,
    }
    if not hasattr(arguments, "parse_and_validate_args"):  # 0.17
        training.pretrain(**given, args_defaults=args_defaults)
        return
    args = read_args(args_defaults=args_defaults)
    with warnings.catch_warnings():
        # 0.19 would like a description of the model as well, which 0.18 does not take
        warnings.simplefilter("ignore")
        settings = argument_utils.pretrain_cfg_container_from_args(args)
    training.pretrain(settings, **given)
