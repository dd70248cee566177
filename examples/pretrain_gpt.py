"""Pretrain a GPT with Megatron's own loop, for those without a Megatron-LM checkout.

    torchrun --nproc-per-node 8 -m megamem.run examples/pretrain_gpt.py \\
        <Megatron's usual flags> --memory-layers 4 12 20

The megatron-core wheel (0.19) holds the training loop but no script that starts it; this is one. It
takes every flag of Megatron-LM's pretrain_gpt.py except those in UNSUPPORTED, and gives the same
losses bit for bit.

Nothing here knows of memory layers: the launcher brings them in.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.core.utils import get_batch_on_this_tp_rank as broadcast_batch
from megatron.training import get_args, get_timers, get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from megamem.config import ConfigurationError

BATCH_FIELDS = ("tokens", "position_ids", "labels", "loss_mask", "attention_mask")
# settings that change what a batch or the loss is
UNSUPPORTED = (
    *("sft", "fim_data", "mtp_num_layers", "hybrid_context_parallel", "logits_load_dir"),
    *("dataloader_inter_document_masking", "overlap_moe_expert_parallel_comm"),
    "per_dataset_sequences_path",
)


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> GPTModel:
    """The pipeline stage of the model described by the command line, for a script of one's own."""
    model_config = gpt_config_from_args(get_args(), config)
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    builder = model_config.get_builder_cls()(model_config)
    return builder.build_model(groups, pre_process, post_process, vp_stage)


def get_batch(data_iterator: Iterator[dict] | None, vp_stage: int | None) -> dict[str, Any]:
    """This rank's part of the next microbatch; a stage in the middle of the pipeline has none."""
    batch: dict[str, Any] = dict.fromkeys(BATCH_FIELDS)
    if not is_first_or_last_pipeline_stage(vp_stage):
        return batch
    if data_iterator is not None:
        sample = next(data_iterator)
        batch |= {name: sample[name].cuda(non_blocking=True) for name in batch if name in sample}
    args = get_args()
    # one rank of a tensor-parallel group has read, and tells the others
    batch = broadcast_batch(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        cp_size=args.context_parallel_size,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
        **dict.fromkeys(("has_cu_seqlens", "is_hybrid_cp", "mtp_on_this_rank"), False),
    )
    batch.setdefault("cu_seqlens", None)
    return get_batch_on_this_cp_rank(batch, False, cp_group=mpu.get_context_parallel_group())


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The summed loss of a microbatch, its number of tokens, and what the log shows of them."""
    weights = loss_mask.flatten().float()
    loss = torch.sum(losses.flatten().float() * weights)
    num_tokens = weights.sum().int()
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=lambda value: not torch.isfinite(value),
            message="the loss of a microbatch is not finite",
        )
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator: Iterator[dict] | None, model: GPTModel) -> tuple[Tensor, partial]:
    """The model's output for the next microbatch, and the function that makes a loss of it."""
    get_timers()("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    get_timers()("batch-generator").stop()
    inputs = (batch[name] for name in ("tokens", "position_ids", "attention_mask"))
    return model(*inputs, labels=batch["labels"]), partial(loss_func, batch["loss_mask"])


def dataset_config(args: Any) -> GPTDatasetConfig:
    """The data settings of the command line: most fields bear the name of their flag."""
    names = [field.name for field in fields(GPTDatasetConfig)]
    settings = {name: getattr(args, name) for name in names if hasattr(args, name)}
    settings["blend"], settings["blend_per_split"] = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        create_attention_mask=args.create_attention_mask_in_dataloader,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        **settings,
    )


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> list[Any]:
    """Training, validation and test set; None on the ranks that read no data."""
    first = mpu.get_tensor_model_parallel_rank() == 0
    reads = first and is_first_or_last_pipeline_stage(vp_stage)
    kind = MockGPTDataset if get_args().mock_data else GPTDataset
    config = dataset_config(get_args())
    return BlendedMegatronDatasetBuilder(kind, num_samples, lambda: reads, config).build()


def main(model_config: Callable[[Namespace], Any] = gpt_config_from_args) -> None:
    """Read the command line and train the model that model_config makes of it."""
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    refused = [f"--{name.replace('_', '-')}" for name in UNSUPPORTED if getattr(args, name, None)]
    if refused:
        raise ConfigurationError(f"only Megatron-LM's pretrain_gpt.py knows {', '.join(refused)}")
    # every rank calls the provider, and the builder tells the ranks apart
    vars(datasets_provider)["is_distributed"] = True
    settings = pretrain_cfg_container_from_args(args, model_config(args))
    pretrain(settings, datasets_provider, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
