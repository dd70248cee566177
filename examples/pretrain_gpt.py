"""Pretrain a GPT with Megatron's training loop, without a Megatron-LM checkout.

    torchrun --nproc-per-node 8 -m megamem.pretrain_gpt \\
        <Megatron's usual flags> --memory-layers 4 12 20

The megatron-core wheel holds the training loop, but no script that starts it. This script accepts
the flags of Megatron-LM's pretrain_gpt.py except those in UNSUPPORTED, and gives the same losses,
bit for bit. megatron_releases.py handles the differences between the releases of Megatron.

Memory layers are not mentioned here, because the launcher adds them.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import megatron_releases
import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor
from torch.nn import Module

from megamem.config import ConfigurationError

BATCH_FIELDS = ("tokens", "position_ids", "labels", "loss_mask", "attention_mask")
# settings that change the contents of a batch or the loss
UNSUPPORTED = (
    *("sft", "fim_data", "hybrid_context_parallel", "logits_load_dir"),
    *("dataloader_inter_document_masking", "per_dataset_sequences_path"),
)


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    build: Callable[..., Any] = megatron_releases.build_gpt,
) -> Any:
    """The pipeline stage of the model described by the command line."""
    args = get_args()
    refused = [f"--{name.replace('_', '-')}" for name in UNSUPPORTED if getattr(args, name, None)]
    if refused:
        raise ConfigurationError(
            f"this script does not support {', '.join(refused)}; use pretrain_gpt.py of a "
            "Megatron-LM checkout, or drop these flags"
        )
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    return build(args, config)(groups, pre_process, post_process, vp_stage)


def get_batch(data_iterator: Iterator[dict] | None, vp_stage: int | None) -> dict[str, Any]:
    """This rank's part of the next microbatch; all None on middle stages of the pipeline."""
    predicts = megatron_releases.predicts_several_tokens(vp_stage)
    if not is_first_or_last_pipeline_stage(vp_stage) and not predicts:
        return dict.fromkeys(BATCH_FIELDS)
    return megatron_releases.next_batch(data_iterator, BATCH_FIELDS, predicts)


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The summed loss of a microbatch, its number of tokens, and both as the log needs them."""
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


def forward_step(
    data_iterator: Iterator[dict] | None, model: Module, return_schedule_plan: bool = False
) -> tuple[Any, partial]:
    """The model's output for the next microbatch, and the function that computes the loss of it.

    With --overlap-moe-expert-parallel-comm Megatron asks for a plan instead of the output, and runs
    the parts of the model in the order that it chooses.
    """
    get_timers()("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    get_timers()("batch-generator").stop()
    inputs = (batch[name] for name in ("tokens", "position_ids", "attention_mask"))
    # multi-token prediction computes losses of its own
    mask = {"loss_mask": batch["loss_mask"]} if get_args().mtp_num_layers else {}
    run: Any = model.build_schedule_plan if return_schedule_plan else model
    output = run(*inputs, labels=batch["labels"], **mask)
    return output, partial(loss_func, batch["loss_mask"])


def dataset_config(args: Any) -> GPTDatasetConfig:
    """The dataset settings of the command line; most fields have the name of their flag."""
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
    """The training, validation and test sets; None on ranks that read no data."""
    first = mpu.get_tensor_model_parallel_rank() == 0
    predicts = megatron_releases.predicts_several_tokens(vp_stage)
    reads = first and (is_first_or_last_pipeline_stage(vp_stage) or predicts)
    kind = MockGPTDataset if get_args().mock_data else GPTDataset
    config = dataset_config(get_args())
    return BlendedMegatronDatasetBuilder(kind, num_samples, lambda: reads, config).build()


def main(build: Callable[..., Any] = megatron_releases.build_gpt) -> None:
    """Read the command line and train the model that `build` makes from it."""
    provider = partial(model_provider, build=build)
    megatron_releases.train(
        datasets_provider, provider, forward_step, {"tokenizer_type": "GPT2BPETokenizer"}
    )


if __name__ == "__main__":
    main()
