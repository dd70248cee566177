"""Handles the differences between Megatron 0.17, 0.18 and 0.19 for a training script."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core import utils as core_utils
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import argument_utils, arguments, get_args, training
from megatron.training import utils as training_utils
from megatron.training.global_vars import set_global_variables
from megatron.training.initialize import initialize_megatron

from megamem.config import ConfigurationError
from megamem.megatron.compat import CONFIG_MODULE, HybridModel


def build_gpt(args: Any, config: TransformerConfig | None = None) -> Callable[..., Any]:
    """A function that builds a pipeline stage of the GPT that the command line describes.

    Its arguments are the process groups, pre_process, post_process and vp_stage.
    """
    if hasattr(argument_utils, "gpt_config_from_args"):
        described = argument_utils.gpt_config_from_args(args, config)
        return described.get_builder_cls()(described).build_model
    # before 0.19 each script has to build the model itself
    config = config or CONFIG_MODULE.core_transformer_config_from_args(args)

    def build_model(
        groups: ProcessGroupCollection, pre_process: bool, post_process: bool, vp_stage: int | None
    ) -> GPTModel:
        engine = args.transformer_impl == "transformer_engine"
        spec = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=engine,
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=vp_stage,
        )
        prediction = None
        if config.mtp_num_layers:
            prediction = get_gpt_mtp_block_spec(config, spec, engine, vp_stage=vp_stage)
        return GPTModel(
            config=config,
            transformer_layer_spec=spec,
            mtp_block_spec=prediction,
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
    """Like build_gpt(), for a hybrid model.

    Raises:
        ConfigurationError: Megatron is 0.17, which has no hybrid models.
    """
    if HybridModel is None:
        raise ConfigurationError(
            "hybrid models need Megatron-Core 0.18 or later; install it, or train a GPT"
        )
    described = argument_utils.hybrid_config_from_args(args, config)
    return described.get_builder_cls()(described).build_model


def predicts_several_tokens(vp_stage: int | None) -> bool:
    """Whether this stage has layers for multi-token prediction, which need the batch."""
    args = get_args()
    if not args.mtp_num_layers:
        return False
    config = CONFIG_MODULE.core_transformer_config_from_args(args)
    if "config" in inspect.signature(mtp_on_this_rank).parameters:  # 0.17
        return mtp_on_this_rank(config, ignore_virtual=False, vp_stage=vp_stage)
    layout = config.pipeline_model_parallel_layout
    return mtp_on_this_rank(layout, config.mtp_num_layers, False, vp_stage)


def next_batch(
    data_iterator: Iterator[dict] | None, fields: Sequence[str], predicts: bool = False
) -> dict[str, Any]:
    """This rank's part of the next microbatch; a field that its stage does not need is None.

    Only one rank of a tensor-parallel group has the iterator; it broadcasts to the others.

    Args:
        data_iterator: the iterator, or None on ranks without it.
        fields: the fields of a batch.
        predicts: whether this stage has layers for multi-token prediction.
    """
    args = get_args()
    if hasattr(training_utils, "get_batch_on_this_tp_rank"):  # 0.17
        batch = training_utils.get_batch_on_this_tp_rank(data_iterator, predicts)
        batch = {name: batch[name] for name in fields}
        return core_utils.get_batch_on_this_cp_rank(batch)
    batch = dict.fromkeys(fields)
    if data_iterator is not None:
        sample = next(data_iterator)
        batch |= {name: sample[name].cuda(non_blocking=True) for name in batch if name in sample}
    broadcast = core_utils.get_batch_on_this_tp_rank
    absent = ("is_sft", "has_cu_seqlens", "is_hybrid_cp")
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
        mtp_on_this_rank=predicts,
        **{name: False for name in absent if name in known},
    )
    batch.setdefault("cu_seqlens", None)
    cp_group = parallel_state.get_context_parallel_group()
    return core_utils.get_batch_on_this_cp_rank(batch, False, cp_group=cp_group)


def read_args(
    extra_args_provider: Callable[..., Any] | None = None,
    args_defaults: dict[str, Any] | None = None,
) -> Any:
    """Parse and validate the command line, and set Megatron's global variables."""
    if hasattr(arguments, "parse_and_validate_args"):
        return arguments.parse_and_validate_args(extra_args_provider, False, args_defaults or {})
    # 0.17 does this when it initialises
    args = arguments.parse_args(extra_args_provider)
    arguments.validate_args(args, args_defaults or {})
    set_global_variables(args)
    return args


def initialize(extra_args_provider: Callable[..., Any] | None = None) -> Any:
    """Read the command line and make the process groups, for scripts that do not train."""
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
    """Read the command line and run Megatron's training loop."""
    # with this mark all ranks call the provider; the dataset builder decides which of them read
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
        # 0.19 warns that it got no description of the model, which 0.18 does not accept
        warnings.simplefilter("ignore")
        settings = argument_utils.pretrain_cfg_container_from_args(args)
    training.pretrain(settings, **given)
